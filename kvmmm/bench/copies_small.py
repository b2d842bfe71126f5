"""`bench copies`: a few bytes, where the call is what costs, beside slices of an mmap."""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import START, GuestMemory, empty_loop, empty_pair_loop
from kvmmm.bench.guest import BenchmarkError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.mm import MemoryManager

SIZES = (8, 64)
WARM_BYTES = 64 << 10
N, REPEATS = 128, 8
"""Addresses, and how often all of them; so few that neither they nor what they name are cold."""
_VECTORS, _RANGES, _RANGE_BYTES = 32, 16, 64

OPERATIONS = ("copy_in", "read", "copy_out")
TIMES = tuple(f"{operation}_{n_bytes}" for operation in OPERATIONS for n_bytes in SIZES)


def ours(mm: MemoryManager, addresses: Sequence[int]) -> Probe:
    """Return a probe of small copies at some addresses: ns a call, without the loop around it."""
    return partial(_measure_ours, mm, addresses)


def _measure_ours(mm: MemoryManager, addresses: Sequence[int]) -> Sample:
    n_calls = len(addresses) * REPEATS
    sample = {}
    for n_bytes in SIZES:
        buffer, data = bytearray(n_bytes), bytes(range(n_bytes))
        loop_ns = empty_loop(addresses, REPEATS)

        start_ns = perf_counter_ns()
        for _ in range(REPEATS):
            for addr in addresses:
                mm.copy_in(addr, buffer)
        sample[f"copy_in_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / n_calls

        start_ns = perf_counter_ns()
        for _ in range(REPEATS):
            for addr in addresses:
                mm.read(addr, n_bytes)
        sample[f"read_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / n_calls

        start_ns = perf_counter_ns()
        for _ in range(REPEATS):
            for addr in addresses:
                mm.copy_out(addr, data)
        sample[f"copy_out_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / n_calls
    return sample


def _measure_slices(view: mmap.mmap, offsets: Sequence[int]) -> Sample:
    n_calls = len(offsets) * REPEATS
    sample = {}
    for n_bytes in SIZES:
        data = bytes(range(n_bytes))
        pairs = [(offset, offset + n_bytes) for offset in offsets]
        loop_ns = empty_pair_loop(pairs, REPEATS)

        start_ns = perf_counter_ns()
        for _ in range(REPEATS):
            for a, b in pairs:
                view[a:b]
        read_ns = (perf_counter_ns() - start_ns - loop_ns) / n_calls
        sample[f"copy_in_{n_bytes}"] = sample[f"read_{n_bytes}"] = read_ns

        start_ns = perf_counter_ns()
        for _ in range(REPEATS):
            for a, b in pairs:
                view[a:b] = data
        sample[f"copy_out_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / n_calls
    return sample


@contextmanager
def _beside_slices() -> Iterator[Mapping[str, Probe]]:
    with GuestMemory(WARM_BYTES) as memory:
        addresses = memory.addresses(N, SIZES[-1])
        fr = memory.frames
        # The same frames, so that both find the same lines in the caches.
        with mmap.mmap(memory.arena.fd, fr.length_bytes, offset=fr.start) as view:
            if view[:] != memory.mm.read(START, WARM_BYTES):
                raise BenchmarkError("the slices are of other memory")
            offsets = [addr - START for addr in addresses]
            yield {
                "ours": ours(memory.mm, addresses),
                "slice": partial(_measure_slices, view, offsets),
            }


def _vectors(memory: GuestMemory) -> list[AddrRangeSeq]:
    return [
        AddrRangeSeq(
            AddrRange(addr, addr + _RANGE_BYTES) for addr in memory.addresses(_RANGES, _RANGE_BYTES)
        )
        for _ in range(_VECTORS)
    ]


def _by_vector(mm: MemoryManager, vectors: Sequence[AddrRangeSeq], n_bytes: int) -> Sample:
    buffer, data, n_calls = bytearray(n_bytes), bytes(n_bytes), len(vectors) * REPEATS
    loop_ns = empty_loop(vectors, REPEATS)
    start_ns = perf_counter_ns()
    for _ in range(REPEATS):
        for ranges in vectors:
            mm.copy_in_vec(ranges, buffer)
    in_ns = perf_counter_ns() - start_ns - loop_ns
    start_ns = perf_counter_ns()
    for _ in range(REPEATS):
        for ranges in vectors:
            mm.copy_out_vec(ranges, data)
    out_ns = perf_counter_ns() - start_ns - loop_ns
    return {"in": in_ns / n_calls, "out": out_ns / n_calls}


def _by_one_range(mm: MemoryManager, addresses: Sequence[int], n_bytes: int) -> Sample:
    buffer, data, n_calls = bytearray(n_bytes), bytes(n_bytes), len(addresses) * REPEATS
    loop_ns = empty_loop(addresses, REPEATS)
    start_ns = perf_counter_ns()
    for _ in range(REPEATS):
        for addr in addresses:
            mm.copy_in(addr, buffer)
    in_ns = perf_counter_ns() - start_ns - loop_ns
    start_ns = perf_counter_ns()
    for _ in range(REPEATS):
        for addr in addresses:
            mm.copy_out(addr, data)
    out_ns = perf_counter_ns() - start_ns - loop_ns
    return {"in": in_ns / n_calls, "out": out_ns / n_calls}


@contextmanager
def _beside_one_range() -> Iterator[Mapping[str, Probe]]:
    n_bytes = _RANGES * _RANGE_BYTES
    with GuestMemory(WARM_BYTES) as memory:
        addresses = memory.addresses(_VECTORS, n_bytes)
        yield {
            "vector": partial(_by_vector, memory.mm, _vectors(memory), n_bytes),
            "one": partial(_by_one_range, memory.mm, addresses, n_bytes),
        }


GROUPS = (
    Group(
        "copies: a few bytes",
        (
            Case(
                "copies/small_slice", unit=RATIO, goal=1.25, each=TIMES,
                product=("ours", EACH), floor=("slice", EACH),
                note="warm; copy_in and read divided by m[a:b], copy_out by m[a:b] = data; worst",
            ),
        ),
        open=_beside_slices, rounds=200, quick_rounds=15, warm_up=3,
    ),
    Group(
        "copies: a vector",
        (
            Case(
                "copies/vec_16x64", unit=RATIO, goal=3, each=("in", "out"),
                product=("vector", EACH), floor=("one", EACH),
                note="warm; a prepared AddrRangeSeq of 16 x 64 bytes; floor: one range of 1 KiB",
            ),
        ),
        open=_beside_one_range, rounds=200, quick_rounds=15, warm_up=3,
    ),
)  # fmt: skip
"""Single ranges, and vectors."""
