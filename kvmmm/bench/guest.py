"""VMs that run the guests of guest/bench, and stop at their marks.

A benchmark guest makes one `out` to MARK_START when everything that shall not be measured is done.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.errors import KvmmmError
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import EXITED, RunResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORK_PORT, MARK_START, MARK_END = 0xB0, 0xB1, 0xB2
TIMEOUT_S = 20.0
"""Ends a guest that does not do what it should; longer than any sane host needs."""


class BenchmarkError(KvmmmError, RuntimeError):
    """What was measured did not do what it should, so its time means nothing."""


def guest_path(name: str) -> str:
    """Return the path of a bundled guest."""
    return str(bundled.directory() / f"{name}.elf")


class Clock:
    """Takes the time at a guest's marks."""

    __slots__ = ("ticks",)

    def __init__(self) -> None:
        self.ticks: list[int] = []

    def tick(self, _port: int, _value: int) -> None:
        """Handle a mark."""
        self.ticks.append(perf_counter_ns())

    def intervals(self) -> list[int]:
        """Return the ns from each mark to the next."""
        return [b - a for a, b in pairwise(self.ticks)]


@contextmanager
def guest_at_start(name: str, *words: str, memory: str = "64M") -> Iterator[MicroVM]:
    """Run a guest up to MARK_START and leave it there: for floors, which go on with its vCPU.

    Args:
        name: The guest.
        words: Its command line.
        memory: As in `MicroVM`.
    """
    with MicroVM(memory) as vm:
        vm.load(guest_path(name), args=words)
        vm.on_out(MARK_START, _end_here, value_only=True)
        check_exited(vm.run(timeout=TIMEOUT_S), name)
        yield vm


def _end_here(_port: int, _value: int) -> RunResult:
    return RunResult(EXITED, status=0)


def run_guest(
    name: str, *words: str, prepare: Callable[[MicroVM], object], memory: str = "64M",
    console: Callable[[bytes], object] | None = None,
) -> RunResult:  # fmt: skip
    """Run a guest from start to end, with the handlers that `prepare` sets."""
    with MicroVM(memory, console=console) as vm:
        vm.load(guest_path(name), args=words)
        prepare(vm)
        return vm.run(timeout=TIMEOUT_S)


def check_exited(result: RunResult, name: str) -> None:
    """Raise BenchmarkError unless the guest ended with status 0."""
    if result.outcome != EXITED or result.status:
        raise BenchmarkError(f"guest {name}: {result!r} {result.report} {result.console!r}")
