"""Figures of a run: the sums that must come out even, and that they notice when they do not."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvmmm.mm.manager import Counters
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.statistics import RunStatistics
from tests.vmm.guest_run import TIMEOUT, load_code
from tests.vmm.machine_code import BASE, Code

EVEN: dict[str, Any] = {
    "n_mmio": 5, "n_emulated_pages": 2, "n_page_faults": 1,
    "reads": 3, "writes": 4, "executes": 1, "vma_lookups": 8,
    "pma_insertions": 4, "pma_hits": 3, "refused": 1, "exits": {6: 5, 2: 9, 17: 2},
}  # fmt: skip


def statistics(**changed: Any) -> RunStatistics:
    facts = EVEN | changed
    counters = Counters()
    for name in Counters.__slots__:
        setattr(counters, name, facts.get(name, 0))
    vcpu = {
        "exits": facts["exits"], "ignored_ports": 0, "coalesced_bytes": 0, "guest_ns": 0,
        "handler_ns": 0,
    }  # fmt: skip
    arena: Any = SimpleNamespace(used_bytes=1, peak_used_bytes=2)
    return RunStatistics.of(
        vcpu, counters, arena, n_slots=3, n_mmio=facts["n_mmio"],
        n_emulated_pages=facts["n_emulated_pages"], n_page_faults=facts["n_page_faults"],
        n_console_bytes=0,
    )  # fmt: skip


def test_even():
    found = statistics()
    assert found.adds_up
    assert found.ept_violations == 7
    assert found.faults == 8
    assert found.exits == {"mmio": 5, "io": 9, "internal_error": 2}


@pytest.mark.parametrize("name", [n for n in EVEN if n != "exits"])
def test_one_more_of_anything_is_noticed(name: str):
    assert not statistics(**{name: EVEN[name] + 1}).adds_up


def test_an_mmio_exit_that_nobody_served_is_noticed():
    assert not statistics(exits={6: 6}).adds_up


def test_as_dict_is_json():
    found = json.loads(json.dumps(statistics().as_dict()))
    assert found["adds_up"] is True
    assert found["exits"]["mmio"] == 5
    assert set(found) == {*RunStatistics.__slots__, "adds_up"}


@pytest.mark.kvm
@pytest.mark.npt
def test_of_a_guest_whose_every_step_is_known():
    """A read and a write of one window, one of another, three exits, two of them ignored."""
    code = Code().ring3()  # pushes: the stack's window
    code.mov("rbx", 0x80_0000).load("rax", "rbx").store("rbx", "rbx")
    code.mov("rbx", 0xC0_0000).store("rbx", "rbx").out8(0xB4, 0).out8(0xB5, 0).exit(0)
    with load_code(code) as vm:
        stats = vm.run(timeout=TIMEOUT).stats
        assert stats is not None
        assert (stats.mmio_faults, stats.emulated_faults, stats.page_faults) == (3, 0, 0)
        assert (stats.reads, stats.writes, stats.executes) == (1, 2, 0)
        assert (stats.pma_insertions, stats.pma_hits, stats.refused) == (3, 0, 0)
        assert stats.exits == {"mmio": 3, "io": 3}
        assert stats.ignored_ports == 2
        assert stats.n_slots == 5  # kvmmm's own, the image, three windows
        assert stats.allocated_bytes == (3 * 2 << 20) + 4096
        assert stats.used_bytes == stats.allocated_bytes + (2 << 20)
        assert stats.adds_up
        assert (stats.guest_ns, stats.handler_ns) == (0, 0)


@pytest.mark.kvm
def test_time_adds_up_when_it_is_measured():
    with MicroVM("64M") as vm:
        vm.load(Code().ring3().spin().bytes, base=BASE)
        vm.vcpu.timed = True
        stats = vm.run(timeout=0.2).stats
    assert stats is not None
    assert stats.guest_ns > 100_000_000
    assert stats.handler_ns < stats.guest_ns


@pytest.mark.kvm
def test_they_count_over_all_runs_of_a_vm():
    with load_code(Code().out32(0xB0).out32(0xB0).exit(0)) as vm:
        vm.on_out(0xB0, lambda _port, _value: vm.stop(), value_only=True)
        counts = [vm.run(timeout=TIMEOUT).stats.exits["io"] for _ in range(3)]  # type: ignore[union-attr]
    assert counts == [1, 2, 3]
