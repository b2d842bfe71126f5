"""The bundled guests' figures: exits, faults and pages come out even, verdicts as printed.

That each ends as the manifest says is tested in tests/guest/test_run.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from tests.guest.test_run import command_line
from tests.vmm.guest_run import TIMEOUT, describe

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

# What `make test-npt` runs in its quick selection: name, and which case of the manifest.
QUICK = {
    "hello-0", "touch-2", "straddle-1", "nox-0", "nox-1", "ro-0", "ro-1", "null-0", "null-1",
    "traps-0", "triple-0", "spin-0",
}  # fmt: skip


def cases() -> list[Any]:
    found = []
    for guest in bundled.guests():
        if guest.group in {"bench", "user"} or guest.name == "echo":
            continue
        for n, case in enumerate([{}, *guest.entry.get("case", ())]):
            name = f"{guest.name}-{n}"
            marks = [pytest.mark.npt] if name in QUICK else []
            found.append(pytest.param({**guest.entry, **case}, id=name, marks=marks))
    return found


@pytest.mark.parametrize("case", cases())
def test_guest(case: dict[str, Any]):
    with MicroVM(case["memory"], arena=case.get("arena")) as vm:
        vm.load(bundled.find(case["name"]).path, args=command_line(case).split())
        endless = case["expect"]["outcome"] == "deadline"
        result = vm.run(timeout=0.3 if endless else TIMEOUT)
        told = describe(result)
        assert result.outcome == case["expect"]["outcome"], told
        assert result.status == case["expect"].get("status"), told

        console = result.console.decode()
        passed, failed = result.tests
        assert failed == 0, told
        assert len(re.findall(r"^PASS", console, re.MULTILINE)) == passed, told
        assert "FAIL" not in console, told
        assert "SKIP" not in console.upper(), told

        stats = result.stats
        assert stats is not None
        assert stats.adds_up, f"{told}\n{stats.as_dict()}"
        assert stats.refused == (result.outcome in {"fault", "memory"})
        assert stats.console_bytes == len(result.console) > 0
        # The stack at least; that one is all registers.
        assert (stats.ept_violations > 0) == (case["name"] != "qemu"), told
        assert stats.used_bytes <= stats.peak_bytes
        assert stats.n_slots <= vm.vm.memslots.limit
        assert (not result.report) == (result.outcome == "exited"), told
        lines = result.report.splitlines()
        assert len(lines) <= 40, told
        assert all(len(line) <= 100 for line in lines), told
        vm.mm.check_invariants()


@pytest.mark.npt
def test_demand_paging_takes_few_exits():
    with MicroVM("64M") as vm:
        vm.load(bundled.find("touch").path)
        stats = vm.run(timeout=TIMEOUT).stats
    assert stats is not None
    assert stats.pma_insertions <= 16  # 48 MiB in windows from 2 to 16
    assert stats.allocated_bytes >= 48 << 20


@pytest.mark.parametrize("memory", ["3M", "4M", "64M", "256M"])
def test_hello_in_any_memory(memory: str):
    """The system area follows memory: nothing may depend on where that is."""
    with MicroVM(memory) as vm:
        vm.load(bundled.find("hello").path)
        result = vm.run(timeout=TIMEOUT)
    assert result.ok, describe(result)


def test_rwx_gives_all_permissions():
    with MicroVM("64M") as vm:
        vm.load(bundled.find("ro").path, rwx=True)
        result = vm.run(timeout=TIMEOUT)
    assert result.outcome == "exited", describe(result)
    assert result.stats is not None
    assert result.stats.adds_up
