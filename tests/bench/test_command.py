"""`kvmmm bench`: table, file, exit status, Ctrl-C."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvmmm.bench import command, registry
from tests.bench.fake import FakeProbes, group_of, ratio_case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    from kvmmm.bench.case import Sample


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command over a benchmark `fake` whose samples come from `product`."""

    def run(
        *args: str, product: Callable[[int], Sample] = lambda _n: {"t": 30, "exits": 2}
    ) -> Result:
        probes = FakeProbes(p=product, f=lambda _n: {"t": 20})
        module = SimpleNamespace(GROUPS=(group_of(probes, [ratio_case(limits={"exits": 64})]),))
        monkeypatch.setattr(registry, "BENCHMARKS", {"fake": ("for tests", ("fake",))})
        monkeypatch.setattr(command, "BENCHMARKS", registry.BENCHMARKS)
        monkeypatch.setitem(sys.modules, "kvmmm.bench.fake", module)
        monkeypatch.setattr("kvmmm.bench.host.host_record", lambda: {"kernel": "6.18"})
        return CliRunner().invoke(command.bench, list(args))

    return run


def test_a_table_shows_value_goal_and_noise(invoke: Callable[..., Result]) -> None:
    result = invoke("fake")

    assert result.exit_code == 0
    for words in ("case", "value", "unit", "goal", "A/A noise"):
        assert words in result.stdout
    [row] = [line for line in result.stdout.splitlines() if "fake/ratio" in line]
    assert row.split() == ["fake/ratio", "1.500", "ratio", "≤", "2", "0.0%", "met"]


def test_a_missed_goal_is_shown_and_fails_nothing(invoke: Callable[..., Result]) -> None:
    result = invoke("fake", product=lambda _n: {"t": 90, "exits": 2})

    assert result.exit_code == 0
    assert "missed" in result.stdout


def test_what_is_missing_is_told_by_name_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes = FakeProbes(p=lambda _n: {"t": 30}, f=lambda _n: {"t": 20})
    groups = [group_of(probes, [ratio_case(f"fake/{name}")]) for name in ("here", "gone")]
    groups[1].missing = lambda: "no peer is installed"
    monkeypatch.setattr(registry, "BENCHMARKS", {"fake": ("for tests", ("fake",))})
    monkeypatch.setitem(sys.modules, "kvmmm.bench.fake", SimpleNamespace(GROUPS=groups))

    result = CliRunner().invoke(command.bench, ["fake"])

    assert result.exit_code == 0
    assert "fake/gone: skipped: no peer is installed" in result.stderr
    assert "fake/here" in result.stdout
    assert "fake/gone" not in result.stdout


def test_a_count_above_its_limit_fails_loudly(invoke: Callable[..., Result]) -> None:
    result = invoke("fake", product=lambda _n: {"t": 30, "exits": 65})

    assert result.exit_code == command.EXIT_OVER_LIMIT
    assert "65 exits, at most 64 allowed" in " ".join(result.stdout.split())


def test_json_lines_are_written(invoke: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    result = invoke("fake", "--quick", "--json", str(path))

    assert result.exit_code == 0
    host, case = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert host == {"host": {"kernel": "6.18"}}
    assert (case["case"], case["value"], case["exits"], case["n"]) == ("fake/ratio", 1.5, 2, 4)


def test_a_file_that_cannot_be_written_is_told_before_measuring(
    invoke: Callable[..., Result], tmp_path: Path
) -> None:
    calls: list[int] = []

    def count(n: int) -> Sample:
        calls.append(n)
        return {"t": 1, "exits": 0}

    result = invoke("fake", "--json", str(tmp_path / "nowhere" / "out.json"), product=count)

    assert result.exit_code == 2
    assert "there is no directory" in result.output
    assert not calls


def test_ctrl_c_ends_it_without_traceback_or_file(
    invoke: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "out.json"

    def interrupted(n: int) -> Sample:
        if n > 2:
            raise KeyboardInterrupt
        return {"t": 30, "exits": 2}

    result = invoke("fake", "--json", str(path), product=interrupted)

    assert result.exit_code == command.EXIT_INTERRUPTED
    assert "interrupted" in result.output
    assert "was not written" in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not path.exists()


@pytest.mark.parametrize("args", [[], ["nonsense"]], ids=["none", "unknown"])
def test_a_name_that_is_none_lists_the_names(
    invoke: Callable[..., Result], args: list[str]
) -> None:
    result = invoke(*args)

    assert result.exit_code == 2
    assert "fake, all" in result.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fake", "--out", "x"], "--out is for faults, exits, crossover"),
        (["--out", "x"], "--out is for faults"),
        (["faults", "--out", "x", "--json", "y"], "--json is not for sweeps"),
        (["faults", "--resume"], "they need --out"),
        (["faults", "--seed", "1"], "they need --out"),
    ],
)
def test_sweeps_are_asked_for_with_a_folder_and_by_name(
    invoke: Callable[..., Result], args: list[str], says: str
) -> None:
    result = invoke(*args)

    assert result.exit_code == 2
    assert says in result.output


def test_a_sweep_is_given_what_was_asked_for(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[object] = []

    def sweep(subject: str, folder: Path, **options: object) -> int:
        asked.extend((subject, folder, options))
        return 3

    monkeypatch.setattr("kvmmm.bench.economics.command.sweep", sweep)
    result = invoke("exits", "--quick", "--out", str(tmp_path), "--seed", "7")

    assert result.exit_code == 3
    assert asked == ["exits", tmp_path, {"quick": True, "resume": False, "seed": 7}]


def test_list_names_every_case_with_its_goal(invoke: Callable[..., Result]) -> None:
    result = invoke("--list")

    assert result.exit_code == 0
    assert "fake: for tests" in result.output
    assert "fake/ratio [ratio] <= 2" in result.output
