"""`kvmmm calibrate`: writes, shows and deletes a file, and says why one is not used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvmmm.bench import calibrate as bench_calibrate
from kvmmm.bench.calibrate import Calibration
from kvmmm.cli.group import kvmmm as group
from kvmmm.errors import EXIT_OS, EXIT_USAGE
from kvmmm.mm import calibration
from kvmmm.mm.policy import DEFAULTS, read_calibration

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from .conftest import Command

NUMBERS = DEFAULTS | {"mirror_reuses": 77}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's own file would be."""
    monkeypatch.delenv("KVMMM_CALIBRATION")
    monkeypatch.delenv("KVMMM_POLICY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvmmm" / "calibration.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_calibrate.calibrate, "__defaults__", (0.05,))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(group, ("calibrate", *args), prog_name="kvmmm")


@pytest.mark.usefixtures("quick")
def test_it_writes_where_the_memory_manager_looks(path: Path):
    result = invoke()

    assert result.exit_code == 0, result.output
    assert f"{path}: written" in result.output
    numbers = read_calibration(path)
    assert set(numbers) == set(DEFAULTS)
    for name, number in numbers.items():
        assert name in result.output
        assert str(number) in result.output
    content = json.loads(path.read_text())
    assert content["costs"]["fault_ns"] > 0
    assert set(content["reasons"]) == set(DEFAULTS) - {"mirror_vmas"}


def found(changes: dict[str, int]) -> Calibration:
    """What a calibration might come to."""
    costs = bench_calibrate.calibrate(0.0).costs
    return Calibration(costs, DEFAULTS | changes, {"mirror": "it wins here"}, 10**9)


def test_it_says_what_changes_and_why(path: Path, monkeypatch: pytest.MonkeyPatch):
    same, other = found({}), found({"mirror": 1})
    monkeypatch.setattr(bench_calibrate, "calibrate", lambda: same)
    assert "nothing changes" in invoke().output

    monkeypatch.setattr(bench_calibrate, "calibrate", lambda: other)
    result = invoke()
    assert "mirror changes from 0 to 1, because it wins here" in result.output
    assert "nothing changes" in invoke().output  # a second time
    assert read_calibration(path)["mirror"] == 1


def test_what_was_found_is_shown_even_if_it_cannot_be_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = found({"mirror_reuses": 77})
    monkeypatch.setattr(bench_calibrate, "calibrate", lambda: one)
    path.parent.write_bytes(b"")  # where its directory should be

    result = invoke()

    assert result.exit_code == EXIT_OS
    assert "77" in result.output


def test_it_says_if_the_file_is_not_in_force(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = found({})
    monkeypatch.setattr(bench_calibrate, "calibrate", lambda: one)
    other = tmp_path / "other.json"
    assert (
        f"not in force: that needs KVMMM_CALIBRATION={other}" in invoke("--out", str(other)).output
    )
    monkeypatch.setenv("KVMMM_POLICY", "mirror=1")
    assert f"overridden: KVMMM_POLICY over {path}" in invoke().output


@pytest.mark.usefixtures("quick")
def test_another_file(path: Path, tmp_path: Path):
    other = tmp_path / "a" / "b" / "c.json"

    assert invoke("--out", str(other)).exit_code == 0
    assert read_calibration(other)
    assert not path.exists()


def test_show_says_what_is_in_force(path: Path):
    result = invoke("--show")
    assert result.exit_code == 0
    assert "in force: defaults" in result.output
    assert f"{path}: there is none; `kvmmm calibrate` makes it" in result.output

    calibration.write(path, NUMBERS, {}, {"mirror_reuses": "repaid then"})
    result = invoke("--show")
    assert result.exit_code == 0
    assert f"in force: {path}" in result.output
    assert "mirror_reuses" in result.output
    assert "77" in result.output
    assert "repaid then" in result.output
    assert f"{path}: new, made 2" in result.output
    assert calibration.host_fingerprint()["kernel"] in result.output


def test_show_says_what_is_overridden(path: Path, monkeypatch: pytest.MonkeyPatch):
    calibration.write(path, NUMBERS, {}, {"mirror": "it loses"})
    monkeypatch.setenv("KVMMM_POLICY", "mirror=1")

    result = invoke("--show")

    assert f"in force: KVMMM_POLICY over {path}" in result.output
    assert "overridden by KVMMM_POLICY" in result.output
    assert "it loses" not in result.output


def test_show_says_why_a_file_is_refused(path: Path):
    calibration.write(path, NUMBERS, {})
    path.write_text(path.read_text().replace("microcode", "millicode"))

    result = invoke("--show")

    assert result.exit_code == 0
    assert "in force: defaults" in result.output
    assert f"refused: {path}: made for another host" in result.output
    assert "77" not in result.output.partition("in force")[0]


def test_show_of_another_file(path: Path, tmp_path: Path):
    other = tmp_path / "other.json"
    calibration.write(other, NUMBERS, {})

    assert f"in force: {other}" in invoke("--show", "--out", str(other)).output
    assert f"in force: {path}" not in invoke("--show").output


def test_show_where_it_is_off(path: Path, monkeypatch: pytest.MonkeyPatch):
    calibration.write(path, NUMBERS, {})
    monkeypatch.setenv("KVMMM_CALIBRATION", "off")

    result = invoke("--show")

    assert "in force: defaults" in result.output
    assert "KVMMM_CALIBRATION is off" in result.output


def test_delete(path: Path):
    calibration.write(path, NUMBERS, {})

    assert f"{path}: deleted" in invoke("--delete").output
    assert not path.exists()
    result = invoke("--delete")
    assert result.exit_code == 0
    assert f"{path}: there is none" in result.output


def test_errors_have_exit_codes(path: Path, monkeypatch: pytest.MonkeyPatch):
    assert invoke("--show", "--delete").exit_code == EXIT_USAGE
    path.parent.write_bytes(b"")  # where its directory should be
    assert invoke("--delete").exit_code == EXIT_OS
    monkeypatch.setenv("KVMMM_CALIBRATION", "off")
    result = invoke()
    assert result.exit_code == EXIT_USAGE
    assert "--out FILE" in result.output


def test_a_new_process_uses_it(path: Path, kvmmm: Command):
    import subprocess
    import sys

    calibration.write(path, NUMBERS, {})
    code = "from kvmmm.mm.policy import default_policy as p; print(p().mirror_reuses, p().source)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["77", str(path)]
    # The variable is as it was when the command was made.
    kvmmm.environment["KVMMM_CALIBRATION"] = str(path)
    assert str(path) in kvmmm("calibrate", "--show").stdout.decode()
