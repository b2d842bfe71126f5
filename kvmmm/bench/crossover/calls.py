"""What is timed: one operation by one mechanism, called from Python, as users of kvmmm call it.

Places and states are those of `probes`. What a loop costs in which nothing is done is subtracted,
the same for all: found out once, when nobody disturbs it.

    internal    nothing is asked for, the policy is the default
    mirror      nothing is asked for, the policy uses the mirror; where it is cold, or for a Reader
                or Writer, it is asked for: the policy alone would not go there
    walk        it is asked for

All calls have an `opts=`, which costs the same for all. To force a mechanism that could be had
without is slower by a few ns: nobody would do it.
"""

from __future__ import annotations

import functools
import random
import resource
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kvmmm.bench.copies import empty_pair_loop
from kvmmm.bench.crossover.geometry import SPAN_BYTES, START
from kvmmm.bench.crossover.outside import Outside
from kvmmm.bench.crossover.plan import HOT
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.bench.crossover.probes import (
    N_COLD,
    REFERENCES,
    first_length,
    length_of,
    variants_of,
    with_tries,
)  # fmt: skip
from kvmmm.bench.crossover.record import INTERNAL
from kvmmm.bench.crossover.states import MIRROR
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import IOOpts
from kvmmm.safemem.ffi import ffi, lib
from kvmmm.safemem.stream import BufferReader, BufferWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.ground import Fresh, Ground
    from kvmmm.bench.crossover.probes import Buffers
    from kvmmm.bench.crossover.record import Cell
    from kvmmm.bench.crossover.states import State
    from kvmmm.mm import MemoryManager

    Pairs = Sequence[tuple[Any, Any]]

_C = cast("Any", lib)
_HOT_BYTES = 64 << 10
_WORDS = ("swap", "cas")
_STREAMS: dict[str, Any] = {"copy_out_from": BufferReader, "copy_in_to": BufferWriter}
_NEVER = (1 << 32) - 1
_LOOP_TURNS, _LOOP_TIMES = 256, 50
_CALLS_A_FAULT = 16
"""The interpreter's own memory grows now and then: so many calls for a page fault are nothing."""
_AUTO, _WALK, _MIRROR = IOOpts(), IOOpts(mechanism="walk"), IOOpts(mechanism="mirror")


class Way(NamedTuple):
    """How a mechanism is had.

    Attributes:
        opts: Of each call.
        uses_mirror: What the policy says.
    """

    opts: IOOpts
    uses_mirror: bool = False


def way_of(variant: str, operation: str, *, is_mirrored: bool) -> Way:
    """Return how a variant is had.

    Args:
        variant: One of VARIANTS.
        operation: What is called.
        is_mirrored: Whether the mirror holds what it is called for.
    """
    if variant == "walk":
        return Way(_WALK)
    if variant != MIRROR:
        return Way(_AUTO)
    by_policy = is_mirrored and operation not in _STREAMS
    return Way(_AUTO, uses_mirror=True) if by_policy else Way(_MIRROR)


class _Operation:
    # How one operation is called: pairs of arguments are made beforehand.

    def __init__(self, cell: Cell, mm: MemoryManager, buffers: Buffers) -> None:
        self._name = cell.operation
        self._n_bytes = cell.bytes
        self._mm = mm
        self._view = memoryview(buffers.data)
        self._base = buffers.hva
        self._call: Any = getattr(mm, {
            "swap": "swap_uint32", "cas": "compare_and_swap_uint32",
        }.get(cell.operation, cell.operation))  # fmt: skip

    def pairs(self, places: Sequence[tuple[int, int]]) -> Pairs:
        # Of guest address and host address.
        name, n = self._name, self._n_bytes
        if name in _WORDS:
            return [(addr, 0) for addr, _ in places]
        if name == "zero_out":
            return [(addr, n) for addr, _ in places]
        views = [self._view[hva - self._base : hva - self._base + n] for _, hva in places]
        if name in _STREAMS:
            make = _STREAMS[name]
            return [
                (AddrRange(at, at + n), make(v)) for (at, _), v in zip(places, views, strict=True)
            ]
        return [(at, v) for (at, _), v in zip(places, views, strict=True)]

    def run(self, pairs: Pairs, way: Way) -> int:
        # ns of all of them.
        mm, opts = self._mm, way.opts
        mm.apply_policy(mm.policy.release_bytes, way.uses_mirror, _NEVER)
        try:
            return self._run(pairs, opts)
        finally:
            mm.apply_policy(mm.policy.release_bytes, False, _NEVER)

    def _run(self, pairs: Pairs, opts: IOOpts) -> int:
        call = self._call
        if self._name == "cas":
            start_ns = perf_counter_ns()
            for at, new in pairs:
                call(at, 0, new, opts=opts)
            return perf_counter_ns() - start_ns
        start_ns = perf_counter_ns()
        for at, what in pairs:
            call(at, what, opts=opts)
        return perf_counter_ns() - start_ns


class Calls:
    """One cell, in Python, by any of its variants; see `probes.Probe`."""

    def __init__(self, cell: Cell, ground: Ground, state: State, buffers: Buffers) -> None:
        self.cell = cell
        self.variants = variants_of(cell)
        self._state = state
        if cell.operation in _STREAMS:
            # A Reader's memory is found by way of the pmas.
            ground.back(state.mm)
        self._operation = _Operation(cell, state.mm, buffers)
        self._outside = Outside(cell, ground, buffers)
        self._n: dict[str, int] = {}
        self._x = x = ffi.new("struct kvmmm_cross *")
        self._addrs = x.addrs = buffers.addrs
        self._hosts = x.hosts = buffers.hosts
        x.start, x.n_bytes = START, cell.bytes
        self._where = w = ffi.new("struct kvmmm_cross_where *")
        w.span_bytes = ground.geometry.length_bytes
        w.buffer = buffers.hva
        w.hot_bytes = _HOT_BYTES if cell.locality == HOT else 0

    def sample(self, variant: str, shared_seed: int, own_seed: int) -> float:
        """Return ns an operation; as `probes.Probe.sample`."""
        measure = self._cold if self._state.is_cold else self._warm
        return with_tries(lambda turn: measure(variant, shared_seed, own_seed + turn))

    def _places(self, n: int, shared_seed: int, own_seed: int) -> list[tuple[int, int]]:
        self._x.n = n
        self._where.shared_seed, self._where.own_seed = shared_seed, own_seed
        _C.kvmmm_cross_places(self._x, self._where)
        return list(zip(self._addrs[0:n], self._hosts[0:n], strict=True))

    def _timed(self, variant: str, places: Sequence[tuple[int, int]]) -> float:
        # ns of all of them, without the loop.
        if variant in REFERENCES:
            arguments = self._outside.arguments(variant, places)
            return max(self._outside.run(variant, arguments) - loop_ns(len(arguments)), 1)
        way = way_of(variant, self.cell.operation, is_mirrored=not self._state.is_mirror_cold)
        pairs = self._operation.pairs(places)
        return max(self._operation.run(pairs, way) - loop_ns(len(pairs)), 1)

    def _warm(self, variant: str, shared_seed: int, own_seed: int) -> float:
        n = self._length(variant, shared_seed, own_seed)
        places = self._places(n, shared_seed, own_seed)
        self._state.verify(places[0][0], self.cell.bytes)
        if self.cell.locality == HOT:
            self._timed(variant, places)
        n_faults = _count_faults()
        ns = self._timed(variant, places)
        n_faults = _count_faults() - n_faults
        # A Reader's bytes go by way of a buffer that is made for it, and has no entries yet.
        has_buffer = self.cell.operation in _STREAMS and variant in {"walk", MIRROR}
        if n_faults > n // _CALLS_A_FAULT and not has_buffer:
            self._state.mend()
            raise GroundError(f"{variant} took {n_faults} page faults in resident memory")
        return ns / n

    def _length(self, variant: str, shared_seed: int, own_seed: int) -> int:
        # As in `probes`.
        key = variant if variant in REFERENCES else INTERNAL
        n = self._n.get(key)
        if n is None:
            n_first = first_length(self.cell.bytes)
            places = self._places(n_first, shared_seed, own_seed)
            self._timed(key, places)
            n = self._n[key] = length_of(self._timed(key, places) / n_first)
        return n

    def _cold(self, variant: str, shared_seed: int, own_seed: int) -> float:
        found = []
        for turn in range(N_COLD):
            places = self._places(1, shared_seed + turn, own_seed + turn)
            addr = places[0][0]
            with self._state.prepared(addr, self.cell.bytes):
                found.append(self._timed(variant, places))
                self._state.verify_after(variant, addr, self.cell.bytes, None)
        return statistics.median(found)


class FreshCalls:
    """One cell of memory that nobody has touched: no pma, no frame, no entry anywhere."""

    def __init__(self, cell: Cell, fresh: Fresh, buffers: Buffers) -> None:
        self.cell = cell
        self.variants = variants_of(cell)
        self._fresh = fresh
        self._mm = fresh.mm
        self._base = buffers.hva
        self._operation = _Operation(cell, fresh.mm, buffers)

    def sample(self, variant: str, shared_seed: int, own_seed: int) -> float:
        """Return ns an operation; as `probes.Probe.sample`."""
        return with_tries(lambda turn: self._sample(variant, shared_seed, own_seed + turn))

    def _sample(self, variant: str, shared_seed: int, own_seed: int) -> float:
        offsets, pages = random.Random(shared_seed), random.Random(own_seed)
        found = []
        for _ in range(N_COLD):
            room = page_up(self.cell.bytes + PAGE_BYTES)
            at = START + pages.randrange((SPAN_BYTES - room) // PAGE_BYTES) * PAGE_BYTES
            addr = at + offsets.randrange(0, PAGE_BYTES, 8)
            pairs = self._operation.pairs(
                [(addr, self._base + offsets.randrange(0, PAGE_BYTES, 8))]
            )
            self._mm.mmap(room, READ_WRITE, addr=at, fixed=True)
            try:
                found.append(max(self._touch(variant, addr, pairs) - loop_ns(1), 1))
            finally:
                self._mm.munmap(at, room)
        return statistics.median(found)

    def _touch(self, variant: str, addr: int, pairs: Pairs) -> int:
        low, high = page_down(addr), page_up(addr + self.cell.bytes)
        self._fresh.verify(low, high)
        ns = self._operation.run(pairs, way_of(variant, self.cell.operation, is_mirrored=False))
        pmas = self._mm.pmas.segments(low, high)
        backed = sum(min(end, high) - max(start, low) for start, end, _ in pmas)
        if backed != high - low:
            raise GroundError(f"{variant} backed {backed} of {high - low} bytes")
        return ns


@functools.cache
def _loop() -> tuple[float, float]:
    # ns of a turn that is the only one, looking at the clock included; and of each that follows.
    pairs = [(START + at, at) for at in range(_LOOP_TURNS + 1)]
    first = min(empty_pair_loop(pairs[:1], 1) for _ in range(_LOOP_TIMES))
    rest = min(empty_pair_loop(pairs, 1) for _ in range(_LOOP_TIMES)) - first
    return first, rest / _LOOP_TURNS


def loop_ns(n: int) -> float:
    """Return what `n` turns of a loop take in which nothing is done.

    Were it timed beside each sample, whoever is interrupted in between would leave a copy of no
    time, or less.
    """
    first, each = _loop()
    return first + (n - 1) * each


def _count_faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_minflt + usage.ru_majflt
