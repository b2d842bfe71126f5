"""`bench paging`: memory that appears on first touch, beside memory registered beforehand."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmmm.bench import floor
from kvmmm.bench.case import RATIO, Case, Group
from kvmmm.bench.guest import (
    MARK_END,
    MARK_START,
    WORK_PORT,
    BenchmarkError,
    Clock,
    check_exited,
    guest_at_start,
    run_guest,
)
from kvmmm.hostarch.access import WRITE
from kvmmm.safemem.ffi import fill

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.vmm.microvm import MicroVM

_START, _BYTES = 4 << 20, 64 << 20
_MEMORY = "80M"
_WORDS = (f"start={_START}", f"bytes={_BYTES}", "mark=1")
_WINDOW = 2 << 20


def _make_resident(vm: MicroVM) -> None:
    """Have the host allocate and map the arena pages that the guest will touch."""
    home = vm.mm.home
    if home is None:
        raise BenchmarkError("this VM has no home in its arena")
    fill(vm.arena.hva + home.delta + _START, 0, _BYTES)


def _touch_lazily(*, resident: bool) -> Sample:
    clock = Clock()

    def prepare(vm: MicroVM) -> None:
        vm.on_out(MARK_START, clock.tick, value_only=True)
        vm.on_out(MARK_END, clock.tick, value_only=True)
        if resident:
            _make_resident(vm)

    result = run_guest("bench_touch", *_WORDS, prepare=prepare, memory=_MEMORY)
    check_exited(result, "bench_touch")
    assert result.stats is not None  # noqa: S101 - run() fills it in
    [touch_ns] = clock.intervals()
    return {"touch": touch_ns, "exits": result.stats.ept_violations}


def _touch_registered(*, resident: bool) -> Sample:
    with guest_at_start("bench_touch", *_WORDS, memory=_MEMORY) as vm:
        if resident:
            _make_resident(vm)
        # The very slots that faults would make, one after the other.
        for addr in range(_START, _START + _BYTES, _WINDOW):
            if not vm.address_space.is_mapped(addr, WRITE):
                vm.mm.handle_user_fault(addr, WRITE)
        [taken_ns], n_exits = floor.run_exits(vm, WORK_PORT, MARK_END, 1)
    if n_exits != 1:
        raise BenchmarkError(f"bench_touch: the floor left the guest {n_exits - 1} times")
    return {"touch": taken_ns}


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    yield {
        "lazy": lambda: _touch_lazily(resident=True),
        "registered": lambda: _touch_registered(resident=True),
        "lazy_fresh": lambda: _touch_lazily(resident=False),
        "registered_fresh": lambda: _touch_registered(resident=False),
    }


GROUPS = (
    Group(
        "paging: first touches",
        (
            Case(
                "paging/touch_64m", unit=RATIO, goal=1.2, limits={"exits": 40},
                product=("lazy", "touch"), floor=("registered", "touch"),
                note="ring 3, arena resident; floor: the same slots registered before, one KVM_RUN",
            ),
            Case(
                "paging/touch_64m_fresh", unit=RATIO, goal=1.1, limits={"exits": 40},
                product=("lazy_fresh", "touch"), floor=("registered_fresh", "touch"),
                note="ring 3, arena pages not allocated yet; the same floor",
            ),
        ),
        open=_probes, rounds=15, quick_rounds=3,
    ),
)  # fmt: skip
"""One group."""
