"""What is timed: one operation by one mechanism, called from C.

Places are drawn anew for every variant of a round; offsets in the page and in the buffer are the
same for all of them. A sample of warm memory is many operations, one after the other; of cold
memory, one at a time, each where its state has just been brought about.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.plan import ABSENT, HOT
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.bench.crossover.record import INTERNAL, INTERNAL_AGAIN
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.mm.policy import DEFAULTS
from kvmmm.safemem.ffi import address_of, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.bench.crossover.ground import Ground
    from kvmmm.bench.crossover.planted import Planted
    from kvmmm.bench.crossover.record import Cell
    from kvmmm.bench.crossover.states import State

_C = cast("Any", lib)

OPERATIONS = {
    "copy_in": 0, "copy_out": 1, "zero_out": 2, "copy_out_from": 3, "copy_in_to": 4, "swap": 5,
    "cas": 6,
}  # fmt: skip
"""enum kvmmm_cross_operation."""
MECHANISMS = {
    INTERNAL: 0, INTERNAL_AGAIN: 0, "walk": 1, "mirror": 2, "process_vm": 3, "file_io": 4,
}  # fmt: skip
"""enum kvmmm_cross_mechanism, by variant."""
VARIANTS = (INTERNAL, INTERNAL_AGAIN, "mirror", "walk")
REFERENCES = ("process_vm", "file_io")
REFERENCED = ("copy_in", "copy_out", "copy_out_from", "copy_in_to")
"""Operations that have references."""
NO_REFERENCES = {
    "zero_out": "no system call of the two kinds clears memory; to write zeros is a copy_out",
    "swap": "no system call changes a word atomically",
    "cas": "no system call changes a word atomically",
    "absent": "there are no frames yet, so nothing that a system call could be told",
}
"""Why the other operations, and a state, have none."""
_PLANTED_VARIANTS = VARIANTS[:3]

SAMPLE_NS = 60_000
N_MOST = 1024
N_COLD = 3
"""Operations in cold memory that make one sample: their median counts."""
_N_TRIES = 3
_HOT_BYTES = 64 << 10
_SCRATCH_FROM_BYTES = 16


def method() -> dict[str, Any]:
    """Return how is measured, for whoever reads results: constants, and what there is none of."""
    return {
        "sample_ns": SAMPLE_NS, "operations_most": N_MOST, "operations_cold": N_COLD,
        "hot_bytes": _HOT_BYTES, "no_references": NO_REFERENCES,
        "gil_released_from_bytes": DEFAULTS["release_bytes"],
    }  # fmt: skip


class Buffers:
    """The host's side, the same for every cell: touched, and never used by anybody else.

    Args:
        most_bytes: The longest operation.
    """

    def __init__(self, most_bytes: int) -> None:
        self.data = bytearray(b"\x5a" * (most_bytes + 2 * PAGE_BYTES))
        self.hva = address_of(ffi.from_buffer(self.data))
        self._scratch = bytearray(b"\xa5" * (most_bytes + PAGE_BYTES))
        self.scratch_hva = address_of(ffi.from_buffer(self._scratch))
        self.n_blocks = most_bytes // PAGE_BYTES + 2
        self._blocks = bytearray(b"\x5a" * (self.n_blocks * _SCRATCH_FROM_BYTES))
        self.blocks_hva = address_of(ffi.from_buffer(self._blocks))
        self.addrs = ffi.new("uint64_t[]", N_MOST)
        self.hosts = ffi.new("uint64_t[]", N_MOST)


def variants_of(cell: Cell) -> list[str]:
    """Return what a round of a cell measures."""
    found = list(VARIANTS)
    if cell.operation in REFERENCED and cell.residency != ABSENT:
        found += REFERENCES
    return found


class Probe:
    """One cell, in C, by any of its variants.

    Args:
        cell: Which.
        ground: The memory.
        state: Its state.
        buffers: The host's side.
        planted: What is added to whom.
    """

    def __init__(
        self, cell: Cell, ground: Ground, state: State, buffers: Buffers,
        planted: Planted | None = None,
    ) -> None:  # fmt: skip
        self.cell = cell
        self.variants = variants_of(cell) if planted is None else list(_PLANTED_VARIANTS)
        self._state = state
        self._planted = planted
        self._n: dict[str, int] = {}
        self._x = x = ffi.new("struct kvmmm_cross *")
        self._addrs = x.addrs = buffers.addrs
        x.hosts = buffers.hosts
        self._keep = buffers, ground.offsets
        x.offsets = ground.offsets
        x.core = id(state.mm)
        x.operation = OPERATIONS[cell.operation]
        x.n_bytes = cell.bytes
        x.start, x.segment_bytes = START, ground.geometry.segment_bytes
        x.n_segments = len(ground.geometry.order)
        x.fd, x.pid = ground.pool.arena.fd, os.getpid()
        x.scratch, x.blocks, x.n_blocks = buffers.scratch_hva, buffers.blocks_hva, buffers.n_blocks
        x.plants = planted is not None
        self._where = w = ffi.new("struct kvmmm_cross_where *")
        w.span_bytes = ground.geometry.length_bytes
        w.buffer = buffers.hva
        w.hot_bytes = _HOT_BYTES if cell.locality == HOT else 0

    def sample(self, variant: str, shared_seed: int, own_seed: int) -> float:
        """Return ns an operation.

        Args:
            variant: One of `variants`.
            shared_seed: The same for all variants of a round.
            own_seed: Another for each.

        Raises:
            GroundError: Memory is not in the state that it should be in, try as one may.
        """
        if self._planted and self._planted.identical and variant in VARIANTS:
            self._x.mechanism = 0
        else:
            self._x.mechanism = MECHANISMS[variant]
        if self._planted:
            self._x.plant_ns = self._planted.ns_of(variant, self.cell.bytes)
        measure = self._cold if self._state.is_cold else self._warm
        return with_tries(lambda turn: measure(variant, shared_seed, own_seed + turn))

    def _place(self, n: int, shared_seed: int, own_seed: int) -> None:
        self._x.n = n
        self._where.shared_seed, self._where.own_seed = shared_seed, own_seed
        _C.kvmmm_cross_places(self._x, self._where)

    def _run(self) -> int:
        taken_ns = int(_C.kvmmm_cross_run(self._x))
        if taken_ns < 0:
            raise GroundError(f"{self.cell.operation}: {os.strerror(-taken_ns)}")
        return taken_ns

    def _warm(self, variant: str, shared_seed: int, own_seed: int) -> float:
        n = self._length(variant, shared_seed, own_seed)
        self._place(n, shared_seed, own_seed)
        self._state.verify(self._addrs[0], self.cell.bytes)
        if self.cell.locality == HOT:
            self._run()
        ns = self._run()
        if self._x.n_maps:
            raise GroundError(f"{self._x.n_maps} segments were not in the mirror")
        if self._x.n_faults:
            self._state.mend()
            raise GroundError(f"{variant} took {self._x.n_faults} page faults in resident memory")
        return max(ns - clock_ns(), 1) / n

    def _length(self, variant: str, shared_seed: int, own_seed: int) -> int:
        # The same for all mechanisms, or a sample of one would have more of the caches than of
        # another. Not for what takes many times as long.
        is_alone = variant in REFERENCES or (self._planted is not None and self._planted.costs)
        key = variant if is_alone else INTERNAL
        n = self._n.get(key)
        if n is None:
            mechanism = self._x.mechanism
            self._x.mechanism = mechanism if is_alone else MECHANISMS[INTERNAL]
            n_first = first_length(self.cell.bytes)
            self._place(n_first, shared_seed, own_seed)
            self._run()
            n = self._n[key] = length_of(self._run() / n_first)
            self._x.mechanism = mechanism
        return n

    def _cold(self, variant: str, shared_seed: int, own_seed: int) -> float:
        found = []
        n_bytes = self.cell.bytes
        for turn in range(N_COLD):
            self._place(1, shared_seed + turn, own_seed + turn)
            addr = self._addrs[0]
            with self._state.prepared(addr, n_bytes):
                ns = self._run()
                self._state.verify_after(variant, addr, n_bytes, self._x.n_faults)
            found.append(max(ns - clock_ns(), 1))
        return statistics.median(found)


spoiled: Counter[str] = Counter()
"""Why `with_tries` has tried again, and how often: for the results' file."""


def with_tries(measure: Callable[[int], float]) -> float:
    """Return what `measure(turn)` does, tried a few times: others can spoil a state.

    Raises:
        GroundError: The last one.
    """
    for turn in range(_N_TRIES - 1):
        try:
            return measure(turn << 32)
        except GroundError as e:
            spoiled[str(e)] += 1
    return measure(_N_TRIES << 32)


def first_length(n_bytes: int) -> int:
    """Return how many operations tell how long one takes."""
    return 4 if n_bytes <= _HOT_BYTES else 1


def length_of(ns: float) -> int:
    """Return how many operations make a sample, of which one takes `ns`."""
    return max(1, min(N_MOST, int(SAMPLE_NS / max(ns, 1.0))))


_clock_ns = -1


def clock_ns() -> int:
    """Return what an empty sample takes: looking at the clock twice."""
    global _clock_ns  # noqa: PLW0603 - a fact of the host
    if _clock_ns < 0:
        x = ffi.new("struct kvmmm_cross *")
        _clock_ns = min(int(_C.kvmmm_cross_run(x)) for _ in range(200))
    return _clock_ns
