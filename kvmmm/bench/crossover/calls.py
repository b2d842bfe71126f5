"""What is timed: one operation by one mechanism, called from Python, as users of kvmmm call it.

Places and states are those of `probes`. What a loop costs in which nothing is done is subtracted.
"""

from __future__ import annotations

import random
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.copies import empty_pair_loop
from kvmmm.bench.crossover.geometry import SPAN_BYTES, START
from kvmmm.bench.crossover.plan import HOT
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.bench.crossover.probes import N_COLD, VARIANTS, first_length, length_of, with_tries
from kvmmm.bench.crossover.record import INTERNAL, INTERNAL_AGAIN
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
_OPTS = {
    name: IOOpts(mechanism=INTERNAL if name == INTERNAL_AGAIN else name) for name in VARIANTS
}  # fmt: skip
_HOT_BYTES = 64 << 10
_WORDS = ("swap", "cas")
_STREAMS: dict[str, Any] = {"copy_out_from": BufferReader, "copy_in_to": BufferWriter}


class _Operation:
    # How one operation is called: pairs of arguments are made beforehand.

    def __init__(self, cell: Cell, mm: MemoryManager, buffers: Buffers) -> None:
        self._name = cell.operation
        self._n_bytes = cell.bytes
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

    def run(self, pairs: Pairs, opts: IOOpts) -> int:
        # ns of all of them.
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
        self.variants = list(VARIANTS)
        self._state = state
        if cell.operation in _STREAMS:
            # A Reader's memory is found by way of the pmas.
            ground.back(state.mm)
        self._operation = _Operation(cell, state.mm, buffers)
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

    def _warm(self, variant: str, shared_seed: int, own_seed: int) -> float:
        opts, operation = _OPTS[variant], self._operation
        n = self._n.get(variant)
        if n is None:
            n_first = first_length(self.cell.bytes)
            places = self._places(n_first, shared_seed, own_seed)
            operation.run(operation.pairs(places), opts)
            first_ns = operation.run(operation.pairs(places), opts)
            n = self._n[variant] = length_of(first_ns / n_first)
        places = self._places(n, shared_seed, own_seed)
        self._state.verify(places[0][0], self.cell.bytes)
        if self.cell.locality == HOT:
            operation.run(operation.pairs(places), opts)
        pairs = operation.pairs(places)
        loop_ns = empty_pair_loop(pairs, 1)
        return max(operation.run(pairs, opts) - loop_ns, 1) / n

    def _cold(self, variant: str, shared_seed: int, own_seed: int) -> float:
        found = []
        for turn in range(N_COLD):
            places = self._places(1, shared_seed + turn, own_seed + turn)
            pairs = self._operation.pairs(places)
            loop_ns = min(empty_pair_loop(pairs, 1) for _ in range(3))
            addr = places[0][0]
            with self._state.prepared(addr, self.cell.bytes):
                ns = self._operation.run(pairs, _OPTS[variant])
                self._state.verify_after(variant, addr, self.cell.bytes, None)
            found.append(max(ns - loop_ns, 1))
        return statistics.median(found)


class FreshCalls:
    """One cell of memory that nobody has touched: no pma, no frame, no entry anywhere."""

    def __init__(self, cell: Cell, fresh: Fresh, buffers: Buffers) -> None:
        self.cell = cell
        self.variants = list(VARIANTS)
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
            loop_ns = min(empty_pair_loop(pairs, 1) for _ in range(3))
            self._mm.mmap(room, READ_WRITE, addr=at, fixed=True)
            try:
                found.append(max(self._touch(variant, addr, pairs) - loop_ns, 1))
            finally:
                self._mm.munmap(at, room)
        return statistics.median(found)

    def _touch(self, variant: str, addr: int, pairs: Pairs) -> int:
        low, high = page_down(addr), page_up(addr + self.cell.bytes)
        if any(self._mm.pmas.segments(low, high)) or self._mm.frames(low, high):
            raise GroundError("memory that was just mapped is backed")
        ns = self._operation.run(pairs, _OPTS[variant])
        pmas = self._mm.pmas.segments(low, high)
        backed = sum(min(end, high) - max(start, low) for start, end, _ in pmas)
        if backed != high - low:
            raise GroundError(f"{variant} backed {backed} of {high - low} bytes")
        return ns
