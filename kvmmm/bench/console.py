"""The console's part of `bench exits`: 64 KiB in one piece, in lines; how soon a line is seen."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench import floor
from kvmmm.bench.case import MS, RATIO, WORST, Case, Group
from kvmmm.bench.guest import (
    MARK_START,
    WORK_PORT,
    BenchmarkError,
    check_exited,
    guest_at_start,
    run_guest,
)
from kvmmm.safemem.ffi import ffi
from kvmmm.vmm.result import STOPPED
from kvmmm.vmm.system_area import OUTPUT_OFFSET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.vmm.microvm import MicroVM

_BYTES, _LINE = 64 << 10, 64
_GUEST = "bench_console"
TEXT = bytes(
    10 if i % _LINE == _LINE - 1 else ord("a") + (i // _LINE + i % _LINE) % 26
    for i in range(_BYTES)
)
"""What the guest writes; guest/bench/console/main.c makes the same."""


class _Sink:
    """Collects what the guest prints, and takes the time when it has all."""

    __slots__ = ("chunks", "exits_before", "full_ns", "left", "start_ns", "vm", "will_stop")

    def __init__(self, expected_bytes: int, *, will_stop: bool = False) -> None:
        self.left = expected_bytes
        self.will_stop = will_stop
        self.chunks: list[bytes] = []
        self.start_ns = self.full_ns = 0
        self.exits_before = 0
        self.vm: MicroVM | None = None

    def prepare(self, vm: MicroVM) -> None:
        self.vm = vm
        vm.on_out(MARK_START, self.start, value_only=True)

    def start(self, _port: int, _value: int) -> None:
        self.exits_before = self.n_exits()
        self.start_ns = perf_counter_ns()

    def n_exits(self) -> int:
        assert self.vm is not None  # noqa: S101 - prepare() ran
        return sum(self.vm.vcpu.statistics()["exits"].values())

    def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        self.left -= len(chunk)
        if self.left <= 0:
            self.full_ns = perf_counter_ns()
            if self.will_stop and self.vm is not None:
                self.vm.stop()

    def sample(self, expected: bytes, n_exits: int) -> Sample:
        if b"".join(self.chunks) != expected:
            raise BenchmarkError(f"{_GUEST}: the console lost or changed bytes")
        return {"seen": self.full_ns - self.start_ns, "exits": n_exits}


def _print(mode: str) -> Sample:
    sink = _Sink(_BYTES)
    words = (f"mode={mode}", f"bytes={_BYTES}", f"line={_LINE}", "mark=1")
    result = run_guest(_GUEST, *words, prepare=sink.prepare, console=sink.write)
    check_exited(result, _GUEST)
    assert result.stats is not None  # noqa: S101 - run() fills it in
    return sink.sample(TEXT, sum(result.stats.exits.values()) - sink.exits_before)


def _print_bulk() -> Sample:
    return _print("bulk")


def _print_lines() -> Sample:
    return _print("lines")


def _print_and_spin() -> Sample:
    # The first line rings; from then on the host looks by itself, so the second waits longest.
    n_bytes = 2 * _LINE
    sink = _Sink(n_bytes, will_stop=True)
    words = ("mode=lines", f"bytes={n_bytes}", f"line={_LINE}", "mark=1", "after=spin")
    result = run_guest(_GUEST, *words, prepare=sink.prepare, console=sink.write)
    if result.outcome != STOPPED:
        raise BenchmarkError(f"{_GUEST}: its second line was not seen: {result.report}")
    return sink.sample(TEXT[:n_bytes], 0)


@contextmanager
def _probes() -> Iterator[Mapping[str, Probe]]:
    copy = ffi.new("uint8_t[]", _BYTES)
    empty = bytes(_BYTES)

    def copy_in_c() -> Sample:
        ffi.memmove(copy, empty, _BYTES)  # resident, and not what is expected
        words = ("mode=raw", f"bytes={_BYTES}", f"line={_LINE}", "mark=1")
        with guest_at_start(_GUEST, *words) as vm:
            shared_hva = vm.area.hva + OUTPUT_OFFSET
            taken_ns = floor.run_bulk(vm, WORK_PORT, copy, shared_hva, _BYTES)
        if bytes(ffi.buffer(copy)) != TEXT:
            raise BenchmarkError(f"{_GUEST}: the floor lost or changed bytes")
        return {"seen": taken_ns}

    yield {
        "bulk": _print_bulk, "lines": _print_lines, "spin": _print_and_spin, "floor": copy_in_c,
    }  # fmt: skip


GROUPS = (
    Group(
        "exits: console",
        (
            Case(
                "exits/console_64k", unit=RATIO, goal=2, limits={"exits": 64},
                product=("bulk", "seen"), floor=("floor", "seen"),
                note="ring 3, resident; floor: rep movsb into shared memory, one out, memcpy in C",
            ),
            Case(
                "exits/console_lines", unit=RATIO, goal=3, limits={"exits": 64},
                product=("lines", "seen"), floor=("floor", "seen"),
                note="ring 3, resident; 1,024 flushed lines; the floor of console_64k",
            ),
        ),
        open=_probes, rounds=60, quick_rounds=10, warm_up=2,
    ),
    Group(
        "exits: console latency",
        (
            Case(
                "exits/console_latency", unit=MS, goal=20, reduce=WORST, product=("spin", "seen"),
                note="the worst of all; from before a ring-3 guest flushes two lines, then spins",
            ),
        ),
        open=_probes, rounds=25, quick_rounds=5,
    ),
)  # fmt: skip
"""Two groups: throughput beside its floor, and latency."""
