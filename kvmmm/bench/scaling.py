"""`bench mm`, without a CPU: what looking up, faulting and unmapping cost as an mm grows."""

from __future__ import annotations

import random
from array import array
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from kvmmm.arena import Arena
from kvmmm.bench.case import RATIO, Case, Group
from kvmmm.bench.guest import BenchmarkError
from kvmmm.bench.no_cpu import NoCpu
from kvmmm.hostarch.access import READ_WRITE, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.mm import MemoryManager
from kvmmm.safemem.ffi import ffi, lib
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

_C = cast("Any", lib)
FEW, MANY = 10, 100_000
_ADDRESSES, _REPEATS = 64, 20
_FINDS = 20_000
_OPERATIONS = 200
_STRIDE = 4 * PAGE_BYTES
"""From one mapping of a page to the next, so that none touches another."""


class _Mappings:
    """An mm with `n` mappings of one page each, all of them backed.

    Args:
        n: How many.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.arena = Arena((n + 1024) * PAGE_BYTES)
        space = NoCpu((n + 1) * _STRIDE)
        self.mm = MemoryManager(self.arena, space)
        for i in range(n):
            self._map(i)
            self.mm.handle_user_fault(i * _STRIDE, WRITE)
        if not len(self.mm.vmas) == len(self.mm.pmas) == n:
            raise BenchmarkError(f"{n} mappings became {self.mm.vmas!r:.200} and fewer pmas")

    def _map(self, i: int) -> None:
        self.mm.mmap(PAGE_BYTES, READ_WRITE, addr=i * _STRIDE, fixed=True)

    def measure(self) -> Sample:
        """Unmap, map and fault at random places; ns by operation."""
        fault_ns = unmap_ns = 0
        mm = self.mm
        for i in random.choices(range(self.n), k=_OPERATIONS):
            addr = i * _STRIDE
            start_ns = perf_counter_ns()
            mm.munmap(addr, PAGE_BYTES)
            unmapped_ns = perf_counter_ns()
            self._map(i)
            mapped_ns = perf_counter_ns()
            mm.handle_user_fault(addr, WRITE)
            fault_ns += perf_counter_ns() - mapped_ns
            unmap_ns += unmapped_ns - start_ns
        return {"fault": fault_ns / _OPERATIONS, "unmap": unmap_ns / _OPERATIONS}

    def close(self) -> None:
        """Release everything."""
        self.mm.close()
        self.arena.close()


def _filled(n: int) -> SegmentSet[int]:
    segments: SegmentSet[int] = SegmentSet()
    for i in range(n):
        segments.insert(i * _STRIDE, i * _STRIDE + PAGE_BYTES, i)
    return segments


def _find_few_addresses(segments: SegmentSet[int], addresses: list[int]) -> Probe:
    def probe() -> Sample:
        find = segments.find
        start_ns = perf_counter_ns()
        for _ in range(_REPEATS):
            for addr in addresses:
                find(addr)
        return {"find": (perf_counter_ns() - start_ns) / (_REPEATS * len(addresses))}

    return probe


def _loop_alone() -> Sample:
    # What of the probe beside it is the loop and the call: a method of the same kind, that looks
    # nothing up.
    segments: SegmentSet[int] = SegmentSet()
    find = segments.find
    addresses = random.choices(range(0, MANY * _STRIDE, _STRIDE), k=_FINDS)
    start_ns = perf_counter_ns()
    for addr in addresses:
        find(addr)
    return {"find": (perf_counter_ns() - start_ns) / _FINDS}


def _find_random(segments: SegmentSet[int]) -> Probe:
    def probe() -> Sample:
        addresses = random.choices(range(0, MANY * _STRIDE, _STRIDE), k=_FINDS)
        find = segments.find
        start_ns = perf_counter_ns()
        for addr in addresses:
            find(addr)
        return {"find": (perf_counter_ns() - start_ns) / _FINDS}

    return probe


def _find_in_c() -> Probe:
    starts = array("Q", range(0, MANY * _STRIDE, _STRIDE))
    starts_c = ffi.from_buffer("uint64_t[]", starts)

    def probe() -> Sample:
        addresses = random.choices(range(0, MANY * _STRIDE, _STRIDE), k=_FINDS)
        wanted = ffi.new("uint64_t[]", addresses)
        total = ffi.new("uint64_t *")
        ns = _C.kvmmm_floor_find(starts_c, MANY, wanted, _FINDS, total)
        if total[0] != sum(addresses):
            raise BenchmarkError("the binary search found something else")
        return {"find": ns / _FINDS}

    return probe


@contextmanager
def _finding() -> Iterator[Mapping[str, Probe]]:
    few, many = _filled(FEW), _filled(MANY)
    yield {
        "few": _find_few_addresses(few, random.choices(range(FEW * _STRIDE), k=_ADDRESSES)),
        "many": _find_few_addresses(many, random.choices(range(MANY * _STRIDE), k=_ADDRESSES)),
        "random": _find_random(many),
        "loop": _loop_alone,
        "c": _find_in_c(),
    }


@contextmanager
def _operating() -> Iterator[Mapping[str, Probe]]:
    few, many = _Mappings(FEW), _Mappings(MANY)
    try:
        yield {"few": few.measure, "many": many.measure}
    finally:
        few.close()
        many.close()


GROUPS = (
    Group(
        "mm: looking up",
        (
            Case(
                "mm/find_scaling", unit=RATIO, goal=2,
                product=("many", "find"), floor=("few", "find"),
                note="64 addresses again and again: among 100 000 segments, divided by among 10",
            ),
            Case(
                "mm/find_100k", unit=RATIO, goal=5, shown=(("loop", "find"),),
                product=("random", "find"), floor=("c", "find"),
                note="random addresses, with loop and call; floor: binary search in C, one by one",
            ),
        ),
        open=_finding, rounds=25, quick_rounds=5,
    ),
    Group(
        "mm: many mappings",
        (
            Case(
                "mm/fault_scaling", unit=RATIO, goal=2.5,
                product=("many", "fault"), floor=("few", "fault"),
                note="the handler at random places, allocating: 100 000 mappings divided by 10",
            ),
            Case(
                "mm/unmap_scaling", unit=RATIO, goal=2.5,
                product=("many", "unmap"), floor=("few", "unmap"),
                note="munmap of a backed page at random places: 100 000 mappings divided by 10",
            ),
        ),
        open=_operating, rounds=25, quick_rounds=5,
    ),
)  # fmt: skip
"""Lookups alone, and whole operations."""
