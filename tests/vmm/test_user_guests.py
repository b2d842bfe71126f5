"""The bundled programs for ring 3 end as the manifest says; and on Linux itself they end alike."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.vmm import bundled
from kvmmm.vmm.user_vm import UserVM
from tests.guest.test_run import VERBS, command_line
from tests.vmm.guest_run import TIMEOUT, describe

if TYPE_CHECKING:
    from pathlib import Path

# What `make test-npt` runs in its quick selection.
QUICK = {
    *("user_hello-0", "user_stack-0", "user_mmap-0", "user_fork-0", "user_syscalls-0"),
    *("user_fault-0", "user_fault-1", "user_fault-2", "user_fault-4", "user_fault-6"),
}


def cases() -> list[Any]:
    found = []
    for guest in bundled.guests():
        if not guest.is_user:
            continue
        for n, case in enumerate([{}, *guest.entry.get("case", ())]):
            name = f"{guest.name}-{n}"
            marks = [pytest.mark.npt] if name in QUICK else []
            found.append(pytest.param({**guest.entry, **case}, id=name, marks=marks))
    return found


@pytest.mark.kvm
@pytest.mark.timeout(200)
@pytest.mark.parametrize("case", cases())
def test_guest(case: dict[str, Any]):
    expect = case["expect"]
    with UserVM(case["memory"]) as vm:
        path = bundled.find(case["name"]).path
        vm.load(path, argv=[case["name"], *command_line(case).split()])
        result = vm.run(timeout=TIMEOUT)
        told = describe(result)
        vm.mm.check_invariants()
    assert result.outcome == expect["outcome"], told
    assert result.status == expect.get("status"), told
    console = result.console.decode()
    assert case.get("console", "") in console, told
    assert "FAIL" not in console, told
    if "access" in expect:
        assert VERBS[expect["access"]] in result.report, told
    if "address" in expect:
        assert result.addr == expect["address"], told
    stats = result.stats
    assert stats is not None
    assert stats.adds_up, f"{told}\n{stats.as_dict()}"
    assert stats.refused == (result.outcome == "fault")
    assert stats.console_bytes == len(result.console) > 0
    assert stats.syscalls > 0
    assert len(result.report.splitlines()) <= 32
    assert all(len(line) <= 100 for line in result.report.splitlines()), told


@pytest.mark.parametrize("case", cases())
def test_the_same_on_linux(case: dict[str, Any], tmp_path: Path):
    """The oracle: what the manifest expects of us is what Linux does."""
    path = tmp_path / case["name"]
    path.write_bytes(bundled.find(case["name"]).path.read_bytes())
    path.chmod(0o700)
    done = subprocess.run(
        [path, *case["cmdline"].split()], capture_output=True, check=False, timeout=60, env={}
    )
    console = done.stdout.decode()
    if case["expect"]["outcome"] == "exited":
        assert done.returncode == case["expect"]["status"], console
        assert case["console"] in console
    else:
        assert done.returncode < 0, "it died of a signal"
    assert "FAIL" not in console
    assert re.match(r"fault|PASS|parent|hello", console)
