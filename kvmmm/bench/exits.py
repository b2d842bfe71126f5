"""`bench exits`: what the Python side adds to an exit."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench import floor
from kvmmm.bench.case import NS, Case, Group
from kvmmm.bench.guest import (
    MARK_END,
    MARK_START,
    WORK_PORT,
    check_exited,
    guest_at_start,
    run_guest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.safemem.ffi import IoExit, Registers
    from kvmmm.vmm.microvm import MicroVM

_N = 1000
_WORDS = (f"n={_N}", "mark=1")


class Clock:
    """Takes the time at a guest's two marks."""

    __slots__ = ("end_ns", "start_ns")

    def __init__(self) -> None:
        self.start_ns = self.end_ns = 0

    def start(self, _port: int, _value: int) -> None:
        """Handle MARK_START."""
        self.start_ns = perf_counter_ns()

    def end(self, _port: int, _value: int) -> None:
        """Handle MARK_END."""
        self.end_ns = perf_counter_ns()

    def attach(self, vm: MicroVM) -> None:
        """Listen to both marks."""
        vm.on_out(MARK_START, self.start, value_only=True)
        vm.on_out(MARK_END, self.end, value_only=True)


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
            clock.attach(vm)
            set_handler(vm)

        check_exited(run_guest("bench_pio", *_WORDS, prepare=prepare), "bench_pio")
        return {"run": clock.end_ns - clock.start_ns, "exits": _N + 1}

    return run


def _floor() -> Sample:
    with guest_at_start("bench_pio", *_WORDS) as vm:
        taken_ns, n_exits = floor.run_exits(vm, WORK_PORT, MARK_END)
    return {"run": taken_ns, "exits": n_exits}


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    yield {"typed": _product(_set_typed), "data": _product(_set_data), "floor": _floor}


GROUPS = (
    Group(
        "exits: port I/O",
        (
            Case(
                "exits/pio", unit=NS, goal=2500, per="exits",
                product=("typed", "run"), floor=("floor", "run"),
                note="ring 3; method(exit) reads and writes a register; minus a KVM_RUN loop in C",
            ),
            Case(
                "exits/pio_data", unit=NS, goal=1200, per="exits",
                product=("data", "run"), floor=("floor", "run"),
                note="ring 3; method(port, value); minus a KVM_RUN loop in C",
            ),
        ),
        open=_probes, rounds=25, quick_rounds=5,
    ),
)  # fmt: skip
"""One group: both handlers beside one floor."""
