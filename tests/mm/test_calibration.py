"""The calibration file: whose it is, how it is replaced, and where it is not to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kvmmm.errors import PolicyError
from kvmmm.mm import calibration
from kvmmm.mm.policy import DEFAULTS, from_environment

NUMBERS = DEFAULTS | {"mirror_reuses": 77}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kvmmm" / "calibration.json"


def reuses(path: Path) -> int:
    return from_environment({"KVMMM_CALIBRATION": str(path)}).mirror_reuses


class TestHost:
    def test_it_is_told_by_what_costs_depend_on(self):
        host = calibration.host_fingerprint()

        assert host == calibration.host_fingerprint()
        assert os.uname().machine in host["processor"]
        assert os.uname().release in host["kernel"]
        assert set(host) == {
            "processor", "microcode", "hypervisor", "mitigations", "kernel", "shared huge pages",
            "kvm",
        }  # fmt: skip
        # Nothing that names the machine, for a file is shown to others.
        assert os.uname().nodename not in json.dumps(host).split()

    @pytest.mark.parametrize("name", sorted(calibration.host_fingerprint()))
    def test_what_is_another_there_is_named(
        self, path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ):
        """A copied home directory, a kernel that was updated, a setting that was changed."""
        calibration.write(path, NUMBERS, {})
        here = calibration.host_fingerprint()
        monkeypatch.setattr(calibration, "host_fingerprint", lambda: here | {name: "new"})

        with pytest.raises(
            PolicyError, match=f"another host: its {name} was '.*', here it is 'new"
        ):
            calibration.read(path)
        policy = from_environment({"KVMMM_CALIBRATION": str(path)})
        assert policy.as_dict() == DEFAULTS
        assert "calibrate again" in policy.refused

    def test_a_host_that_says_nothing_has_a_fingerprint(self, monkeypatch: pytest.MonkeyPatch):
        """No /proc, no /sys: a sandbox."""
        nothing = Path("/nonexistent/file")
        monkeypatch.setattr(calibration, "Path", lambda _path: nothing)
        monkeypatch.setattr(calibration, "_text", lambda _path: "")

        assert calibration.host_fingerprint()["kernel"]

    def test_nobody_is_warned(self, path: Path):
        """A refused file costs a look at it once a process, and no word."""
        calibration.write(path, NUMBERS, {})
        path.write_text(path.read_text().replace("microcode", "millicode"))
        code = (
            "from kvmmm.arena import Arena; from kvmmm.mm import MemoryManager\n"
            "from kvmmm.bench.no_cpu import NoCpu\n"
            "with Arena(1 << 20) as arena:\n"
            "    mms = [MemoryManager(arena, NoCpu(1 << 30)) for _ in range(3)]\n"
            "    print(mms[2].policy.mirror_reuses, mms[0].policy is mms[2].policy)\n"
            "    for mm in mms: mm.close()\n"
        )
        environ = {**os.environ, "KVMMM_CALIBRATION": str(path)}
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", code],
            env=environ, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stdout.split() == [str(DEFAULTS["mirror_reuses"]), "True"]
        assert not done.stderr


class TestWriting:
    def test_a_link_stays_one(self, path: Path, tmp_path: Path):
        real = tmp_path / "elsewhere" / "real.json"
        path.parent.mkdir(parents=True)
        path.symlink_to(real)
        calibration.write(path, NUMBERS, {})

        assert path.is_symlink()
        assert reuses(real) == 77

    def test_a_link_to_itself_is_an_error(self, path: Path):
        path.parent.mkdir(parents=True)
        path.symlink_to(path)

        assert "symbolic links" in from_environment({"KVMMM_CALIBRATION": str(path)}).refused

    def test_nothing_is_left_of_one_that_failed(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        calibration.write(path, NUMBERS, {})

        def fail(_self: Path, _target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            calibration.write(path, DEFAULTS, {})

        assert [found.name for found in path.parent.iterdir()] == [path.name]
        assert reuses(path) == 77

    def test_where_nothing_can_be_written(self, tmp_path: Path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(FileExistsError):
            calibration.write(tmp_path / "file" / "c.json", NUMBERS, {})
        with pytest.raises(OSError):  # which, is the host's choice
            calibration.write(Path("/proc/kvmmm/c.json"), NUMBERS, {})

    def test_permissions_are_the_users_choice(self, path: Path):
        before = os.umask(0o027)
        try:
            calibration.write(path, NUMBERS, {})
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o640

    def test_two_processes_at_once(self, path: Path):
        """Whoever reads meanwhile finds the one or the other, and never a part."""
        code = (
            "import sys; from pathlib import Path; from kvmmm.mm import calibration\n"
            "from kvmmm.mm.policy import DEFAULTS\n"
            "costs = {str(n): n for n in range(2000)}\n"
            "for _ in range(30):\n"
            "    numbers = DEFAULTS | {'mirror_reuses': int(sys.argv[2])}\n"
            "    calibration.write(Path(sys.argv[1]), numbers, costs)\n"
        )
        calibration.write(path, NUMBERS, {})
        writers = [
            subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in (78, 79)
        ]
        found = set()
        try:
            while any(writer.poll() is None for writer in writers):
                policy = from_environment({"KVMMM_CALIBRATION": str(path)})
                assert not policy.refused
                found.add(policy.mirror_reuses)
        finally:
            for writer in writers:
                assert writer.wait(60) == 0
        assert found <= {77, 78, 79}
        assert reuses(path) in {78, 79}
        assert [left.name for left in path.parent.iterdir()] == [path.name]


class TestReading:
    def test_half_of_one_is_refused(self, path: Path):
        calibration.write(path, NUMBERS, {})
        whole = path.read_bytes()
        for n in range(0, len(whole) - 2, 37):
            path.write_bytes(whole[:n])
            assert "no calibration" in from_environment({"KVMMM_CALIBRATION": str(path)}).refused

    def test_no_more_is_read_than_one_can_have(self):
        refused = from_environment({"KVMMM_CALIBRATION": "/dev/zero"}).refused

        assert "more than" in refused

    def test_one_that_may_not_be_read_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        def refuse(*_args: Any, **_kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)

        assert "denied" in from_environment({"KVMMM_CALIBRATION": str(path)}).refused

    @pytest.mark.parametrize("home", ["relative", "."])
    def test_the_working_directory_is_no_home(self, home: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", home)

        assert calibration.calibration_path({}) is None
        assert from_environment({}).source == "defaults"

    def test_a_user_without_a_home_has_none(self, monkeypatch: pytest.MonkeyPatch):
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)

        assert calibration.calibration_path({}) is None
        assert calibration.calibration_path({"XDG_CACHE_HOME": "/c"}) is not None


@pytest.mark.parametrize(
    ("age", "told"),
    [
        (timedelta(seconds=5), "new"),
        (timedelta(seconds=61), "1 minute old"),
        (timedelta(hours=5, minutes=1), "5 hours old"),
        (timedelta(days=1, minutes=1), "1 day old"),
        (timedelta(days=100, minutes=1), "100 days old"),
        (timedelta(hours=-3), "new"),
    ],
)
def test_its_age_in_words(age: timedelta, told: str):
    assert calibration.age_of({"made": (datetime.now(UTC) - age).isoformat()}) == told


def test_reasons_are_of_the_numbers_that_are_in_force(path: Path):
    calibration.write(path, NUMBERS, {}, {"mirror": "it loses", "mirror_reuses": "repaid then"})
    content = calibration.read(path)

    reasons = calibration.reasons_for(NUMBERS | {"mirror": 1}, content)

    assert set(reasons) == {"mirror", "mirror_reuses"}
    assert reasons["mirror_reuses"] == "repaid then"
    assert "KVMMM_POLICY" in reasons["mirror"]
    assert not calibration.reasons_for(NUMBERS, {})
