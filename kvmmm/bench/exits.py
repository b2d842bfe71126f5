"""`bench exits`: what the Python side adds to an exit."""

from __future__ import annotations

from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

from kvmmm.bench import floor
from kvmmm.bench.case import NS, Case, Group
from kvmmm.bench.guest import (
    MARK_START,
    WORK_PORT,
    Clock,
    check_exited,
    guest_at_start,
    run_guest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.safemem.ffi import IoExit, Registers
    from kvmmm.vmm.microvm import MicroVM

_EXITS, _MARKS = 20, 50
"""Exits from mark to mark (shorter than a scheduler's tick), and how many such stretches."""
_WORDS = (f"n={_EXITS * _MARKS}", f"mark={_EXITS}")


class _TypedHandler:
    """Reads one register and writes one."""

    __slots__ = ("regs",)

    def __init__(self, regs: Registers) -> None:
        self.regs = regs

    def on_out(self, _exit: IoExit) -> None:
        regs = self.regs
        regs.rbx = regs.rax


class _DataHandler:
    """Looks at what was written."""

    __slots__ = ("last",)

    def on_out(self, _port: int, value: int) -> None:
        self.last = value


def _set_typed(vm: MicroVM) -> None:
    vm.on_out(WORK_PORT, _TypedHandler(vm.vcpu.regs).on_out)


def _set_data(vm: MicroVM) -> None:
    vm.on_out(WORK_PORT, _DataHandler().on_out, value_only=True)


def _product(set_handler: Callable[[MicroVM], None]) -> Probe:
    def run() -> Sample:
        clock = Clock()

        def prepare(vm: MicroVM) -> None:
            vm.on_out(MARK_START, clock.tick, value_only=True)
            set_handler(vm)

        check_exited(run_guest("bench_pio", *_WORDS, prepare=prepare), "bench_pio")
        return _sample(clock.intervals())

    return run


def _floor() -> Sample:
    with guest_at_start("bench_pio", *_WORDS) as vm:
        intervals, _ = floor.run_exits(vm, WORK_PORT, MARK_START, _MARKS)
    return _sample(intervals)


def _sample(intervals: list[int]) -> Sample:
    # The mark that ends a stretch is an exit as well.
    return {"exit": median(intervals) / (_EXITS + 1)}


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    yield {"typed": _product(_set_typed), "data": _product(_set_data), "floor": _floor}


GROUPS = (
    Group(
        "exits: port I/O",
        (
            Case(
                "exits/pio", unit=NS, goal=2500,
                product=("typed", "exit"), floor=("floor", "exit"),
                note="ring 3; method(exit) reads and writes a register; minus a KVM_RUN loop in C",
            ),
            Case(
                "exits/pio_data", unit=NS, goal=1200,
                product=("data", "exit"), floor=("floor", "exit"),
                note="ring 3; method(port, value); minus a KVM_RUN loop in C",
            ),
        ),
        open=_probes, rounds=25, quick_rounds=5,
    ),
)  # fmt: skip
"""One group: both handlers beside one floor."""
