"""`bench exits`: what the Python side adds to an exit.

One guest makes all exits, a mark after every few: at each mark it becomes the next variant's turn,
in random order, so that floor and handlers meet the same VM, the same memory and the same load.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench import floor
from kvmmm.bench.case import NS, Case, Group
from kvmmm.bench.guest import MARK_START, WORK_PORT, check_exited, run_guest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.safemem.ffi import IoExit, Registers
    from kvmmm.vmm.microvm import MicroVM

_EXITS, _CYCLES = 20, 20
"""Exits from mark to mark, shorter than a scheduler's tick; turns of each variant."""

TYPED, DATA, FLOOR = "typed", "data", "floor"
_VARIANTS = (TYPED, DATA, FLOOR)
_WORDS = (f"n={_EXITS * _CYCLES * len(_VARIANTS)}", f"mark={_EXITS}")


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


class _Turns:
    """Gives each variant its turn, and keeps the times: from mark to mark, in ns."""

    def __init__(self) -> None:
        self.times: dict[str, list[int]] = {variant: [] for variant in _VARIANTS}
        self._order: list[str] = []
        for _ in range(_CYCLES):
            self._order += random.sample(_VARIANTS, len(_VARIANTS))
        self._current = ""
        self._start_ns = 0

    def prepare(self, vm: MicroVM) -> None:
        self._vm = vm
        self._typed, self._data = _TypedHandler(vm.vcpu.regs), _DataHandler()
        vm.on_out(MARK_START, self.on_mark, value_only=True)

    def on_mark(self, _port: int, _value: int) -> None:
        now_ns = perf_counter_ns()
        if self._current:
            self.times[self._current].append(now_ns - self._start_ns)
        self._current = ""
        while self._order and not self._current:
            self._begin(self._order.pop())
        self._start_ns = perf_counter_ns()

    def _begin(self, variant: str) -> None:
        if variant == FLOOR:
            # The loop in C runs on to the next mark, from within this handler.
            [taken_ns], n_exits = floor.run_exits(self._vm, WORK_PORT, MARK_START, 1)
            assert n_exits == _EXITS + 1  # noqa: S101 - the guest counts so
            self.times[FLOOR].append(taken_ns)
            return
        if variant == TYPED:
            self._vm.on_out(WORK_PORT, self._typed.on_out)
        else:
            self._vm.on_out(WORK_PORT, self._data.on_out, value_only=True)
        self._current = variant


def _take_turns() -> Sample:
    turns = _Turns()
    check_exited(run_guest("bench_pio", *_WORDS, prepare=turns.prepare), "bench_pio")
    exit_ns = median(turns.times[FLOOR]) / (_EXITS + 1)
    return {FLOOR: exit_ns} | {
        variant: exit_ns + _extra_ns(turns.times[variant], turns.times[FLOOR])
        for variant in (TYPED, DATA)
    }


def _extra_ns(product: list[int], floor_ns: list[int]) -> float:
    # Turn by turn: those of one cycle are neighbours. The mark is an exit as well, but what Python
    # does until it has the time of it counts as the handlers'.
    return median((p - f) / _EXITS for p, f in zip(product, floor_ns, strict=True))


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    yield {"guest": _take_turns}


GROUPS = (
    Group(
        "exits: port I/O",
        (
            Case(
                "exits/pio", unit=NS, goal=2500,
                product=("guest", TYPED), floor=("guest", FLOOR),
                note="ring 3; method(exit) reads and writes a register; minus a KVM_RUN loop in C",
            ),
            Case(
                "exits/pio_data", unit=NS, goal=1200,
                product=("guest", DATA), floor=("guest", FLOOR),
                note="ring 3; method(port, value); minus a KVM_RUN loop in C",
            ),
        ),
        open=_probes, rounds=25, quick_rounds=5,
    ),
)  # fmt: skip
"""One group: both handlers beside one floor."""
