"""The few costs of this host that the policy of copies depends on: for `kvmmm calibrate`.

    fault       a copy that ends in SIGSEGV, and one that Python serves
    mapping     one mmap and its pages, by hand; a run of frames put into the mirror by a copy
    gain        copies of several sizes, hot and spread: frame table beside mirror
    release     what handing over the GIL costs a copy; how fast copies are with and without it
    bounce      vectored copies through a buffer and the address space, beside those without

Two sides are measured in turns, in random order, and compared round by round: what comes from
outside meets both. Both use the same buffers: two that lie otherwise in their pages differ by
more than what is to be found.
"""

from __future__ import annotations

import gc
import mmap
import random
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.copies import FLOOR, START, FixedFrames, GuestMemory, by_memcpy
from kvmmm.bench.no_cpu import NoCpu
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm import MemoryManager
from kvmmm.mm.policy import Policy
from kvmmm.safemem.ffi import IOOpts, address_of, ffi, own_faults, safe_copy
from kvmmm.safemem.stream import BufferWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES = 16 * MIB
"""Beyond the second-level caches, and quick to touch."""
RUN_PAGES = 64
"""Frames side by side: what memory looks like that came by faults of 256 KiB."""
_RUN_BYTES = RUN_PAGES * PAGE_BYTES
_HOT_BYTES = 64 * KIB
_NEVER = (1 << 32) - 1

GAINS = tuple((n, is_hot) for n in (8, 4 * KIB, 64 * KIB) for is_hot in (True, False))
"""(bytes, hot) of the copies that the mirror is judged by."""
_SAMPLE_BYTES = 2 * MIB
_SAMPLE_COPIES = 400
RELEASED_BYTES = 64 * KIB
BOUNCED = (64, 256, 512, 1024, 4096)
"""Bytes of the vectored copies that are compared."""
_BOUNCES = 40
_BOUNCE_RANGES = 4

_MAPPED_RUNS, _MAPPED_TIMES = 8, 4

_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 201


class Pair(NamedTuple):
    """Two sides, measured in turns.

    Attributes:
        a_ns: Median of the first.
        b_ns: Median of the second.
        ratio: Median of second ÷ first, by rounds.
        low: Where its 95 % interval begins.
        high: Where that ends.
        saved_ns: Median of first minus second.
    """

    a_ns: float
    b_ns: float
    ratio: float
    low: float
    high: float
    saved_ns: float


class Costs(NamedTuple):
    """What was measured; times in ns.

    Attributes:
        fault_ns: A copy that ends in SIGSEGV.
        serve_ns: What a copy takes longer that Python has to serve, memory being there.
        mmap_ns: One mmap over a reserved range.
        page_ns: Each page of it, populated.
        run_ns: What it takes a copy longer to put a run of RUN_PAGES into the mirror, and copies
            to touch its pages for the first time.
        gains: By "8 bytes, hot" or "8 bytes, spread": frame table (a) beside warm mirror (b).
        release: Copies of RELEASED_BYTES that keep the GIL (a) beside those that release it (b).
        bounces: By bytes: vectored copies without a buffer (a) beside those through one (b).
    """

    fault_ns: float
    serve_ns: float
    mmap_ns: float
    page_ns: float
    run_ns: float
    gains: dict[str, Pair]
    release: Pair
    bounces: dict[int, Pair]

    def as_dict(self) -> dict[str, object]:
        """Return all of it, ready for JSON."""
        return self._asdict() | {
            "gains": {name: pair._asdict() for name, pair in self.gains.items()},
            "release": self.release._asdict(),
            "bounces": {str(size): pair._asdict() for size, pair in self.bounces.items()},
        }


def compare(a: Callable[[], float], b: Callable[[], float], seconds: float) -> Pair:
    """Measure two sides in turns, for as long as there is time.

    Args:
        a: Returns ns.
        b: Returns ns.
        seconds: When to end; but not before a few rounds.
    """
    end_ns = perf_counter_ns() + int(seconds * 1e9)
    sides = a, b
    samples: tuple[list[float], list[float]] = [], []
    for side in sides:  # what is cold is warm then
        side()
    while len(samples[0]) < _MOST_ROUNDS:
        if len(samples[0]) >= _FEWEST_ROUNDS and perf_counter_ns() > end_ns:
            break
        for number in random.sample((0, 1), 2):
            samples[number].append(sides[number]())
    return pair_of(*samples)


def pair_of(a: list[float], b: list[float]) -> Pair:
    """Return what rounds came to; `a` and `b` have one sample of each."""
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    n = len(ratios)
    # Order statistics: as many rounds lie outside as coins come up one way in 2.5 % of n tosses.
    outside = max(int(n / 2 - 0.98 * n**0.5), 0)
    return Pair(
        statistics.median(a), statistics.median(b), statistics.median(ratios),
        ratios[outside], ratios[n - 1 - outside],
        statistics.median(x - y for x, y in zip(a, b, strict=True)),
    )  # fmt: skip


def measure(seconds: float = 3.0) -> Costs:
    """Measure everything, in this thread.

    Args:
        seconds: About how long it may take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with GuestMemory(MEMORY_BYTES) as memory:
            return _Lab(memory).measure(seconds)
    finally:
        if was_enabled:
            gc.enable()


class _Lab:
    # The same frames behind several mms, in runs that are nobody's neighbours.

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._mms: list[MemoryManager] = []
        n_runs = MEMORY_BYTES // _RUN_BYTES
        # Odd runs before even ones, so that none follows its neighbour.
        self._frames_of_run = [*range(1, n_runs, 2), *range(0, n_runs, 2)]
        order = [run * RUN_PAGES + i for run in self._frames_of_run for i in range(RUN_PAGES)]
        self._mappable = FixedFrames(memory.arena, memory.frames, order)

    def measure(self, seconds: float) -> Costs:
        try:
            fault_ns = _fault_ns()
            internal = self._new_mm(mirror=0, release_bytes=_NEVER)
            mirrored = self._new_mm(
                mirror=1, mirror_reuses=1, mirror_min_run_pages=1, release_bytes=_NEVER
            )
            mmap_ns, page_ns = self._mapping_ns()
            # That fills the mirror; what follows has it warm.
            run_ns = self._run_ns(internal, mirrored)
            return Costs(
                fault_ns, self._serve_ns(internal), mmap_ns, page_ns, run_ns,
                self._gains(internal, mirrored, seconds * 0.5),
                self._release(internal, seconds * 0.1),
                self._bounces(mirrored, seconds * 0.2),
            )  # fmt: skip
        finally:
            for mm in self._mms:
                mm.close()

    def _new_mm(self, **numbers: int) -> MemoryManager:
        # Resident in its frame table, and nothing of it in its mirror.
        policy = Policy(source="costs", **{**numbers, "mirror": 0})
        mm = MemoryManager(self.memory.arena, NoCpu(START + MEMORY_BYTES), policy=policy)
        self._mms.append(mm)
        mm.mmap(
            MEMORY_BYTES, READ_WRITE, addr=START, fixed=True, private=False, mappable=self._mappable
        )
        mm.populate(START, MEMORY_BYTES)
        mm.read(START, MEMORY_BYTES)
        mm.policy = policy = Policy(source="costs", **numbers)
        mm.apply_policy(policy.release_bytes, policy.mirror, policy.mirror_reuses)
        return mm

    def _serve_ns(self, mm: MemoryManager) -> float:
        served: list[int] = []
        quick: list[int] = []
        buffer = bytearray(8)
        for addr in range(START, START + MEMORY_BYTES, _RUN_BYTES):
            mm.forget(addr, addr + _RUN_BYTES)
            for times in (served, quick):
                start_ns = perf_counter_ns()
                mm.copy_in(addr, buffer)
                times.append(perf_counter_ns() - start_ns)
        return max(float(statistics.median(served) - statistics.median(quick)), 0.0)

    def _mapping_ns(self) -> tuple[float, float]:
        # A mapping of one page beside one of a run, in C; without the bytes that are copied.
        memory = self.memory
        buffer = bytearray(_RUN_BYTES)
        hva = address_of(ffi.from_buffer(buffer))
        fr = memory.frames
        every = range(fr.start, fr.end, _RUN_BYTES)
        taken = []
        for n_bytes in (PAGE_BYTES, _RUN_BYTES):
            each = bytearray(n_bytes)
            # The quickest of many short ones: nothing but interruptions makes it slower.
            best_ns = best_copied_ns = float("inf")
            for first in [*range(0, len(every), _MAPPED_RUNS)] * _MAPPED_TIMES:
                places = every[first : first + _MAPPED_RUNS]
                offsets = ffi.new("uint64_t[]", list(places))
                n = len(places)
                ns = FLOOR.kvmmm_floor_mirror(memory.arena.fd, offsets, n, hva, n_bytes, False)
                if ns < 0:
                    raise OSError(-ns, "mmap")
                copied_ns = by_memcpy([memory.arena.hva + at for at in places], each, out=False)
                best_ns = min(best_ns, ns / n)
                best_copied_ns = min(best_copied_ns, copied_ns / n)
            taken.append(best_ns - best_copied_ns)
        page_ns = max((taken[1] - taken[0]) / (RUN_PAGES - 1), 0.0)
        return max(taken[0] - page_ns, 0.0), page_ns

    def _run_ns(self, internal: MemoryManager, mirrored: MemoryManager) -> float:
        # Each page once; the first of a run puts all of it into the mirror, the others fault.
        buffer = bytearray(8)

        def pass_ns(mm: MemoryManager, run: int) -> int:
            start_ns = perf_counter_ns()
            for addr in range(run, run + _RUN_BYTES, PAGE_BYTES):
                mm.copy_in(addr, buffer)
            return perf_counter_ns() - start_ns

        taken = []
        for run in range(START, START + MEMORY_BYTES, _RUN_BYTES):
            pass_ns(internal, run)  # the frames are the same: who came first would find them cold
            taken.append(pass_ns(mirrored, run) - pass_ns(internal, run))
        return max(statistics.median(taken), 0.0)

    def _gains(
        self, internal: MemoryManager, mirrored: MemoryManager, seconds: float
    ) -> dict[str, Pair]:
        gains = {}
        for n_bytes, is_hot in GAINS:
            addresses = _Addresses(n_bytes, _HOT_BYTES if is_hot else MEMORY_BYTES)
            gains[f"{n_bytes} bytes, {'hot' if is_hot else 'spread'}"] = compare(
                addresses.copier(internal), addresses.copier(mirrored), seconds / len(GAINS)
            )
        return gains

    def _release(self, keeping: MemoryManager, seconds: float) -> Pair:
        releasing = self._new_mm(mirror=0, release_bytes=0)
        addresses = _Addresses(RELEASED_BYTES, 2 * RELEASED_BYTES)
        return compare(addresses.copier(keeping), addresses.copier(releasing), seconds)

    def _bounces(self, mirrored: MemoryManager, seconds: float) -> dict[int, Pair]:
        opts = IOOpts(mechanism="mirror")
        never, always = Policy(bounce_max_bytes=0), Policy(bounce_max_bytes=_NEVER)

        def copier(
            policy: Policy, vectors: Sequence[AddrRangeSeq], buffer: bytearray
        ) -> Callable[[], float]:
            def copy() -> float:
                mirrored.policy = policy
                start_ns = perf_counter_ns()
                for ranges in vectors:
                    # A Writer: where a buffer is given there is nothing to choose.
                    mirrored.copy_in_to(ranges, BufferWriter(buffer), opts=opts)
                return (perf_counter_ns() - start_ns) / len(vectors)

            return copy

        found = {}
        for n_bytes in BOUNCED:
            same = [_vector(n_bytes) for _ in range(_BOUNCES)], bytearray(n_bytes)
            found[n_bytes] = compare(
                copier(never, *same), copier(always, *same), seconds / len(BOUNCED)
            )
        return found


class _Addresses:
    # Where copies of one size go: drawn anew for each sample, and then used once. And where they
    # come to, the same for the same sample of each side: how a buffer lies in its page can matter
    # as much as all that is compared.

    def __init__(self, n_bytes: int, span_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._places = range(START, START + span_bytes - n_bytes + 1, 8)
        self._n = min(max(_SAMPLE_BYTES // n_bytes, 1), _SAMPLE_COPIES)
        self._memory = memoryview(bytearray(n_bytes + PAGE_BYTES))
        self._offsets = random.choices(range(0, PAGE_BYTES, 8), k=_MOST_ROUNDS + 1)

    def copier(self, mm: MemoryManager) -> Callable[[], float]:
        offsets = iter(self._offsets)

        def copy() -> float:
            addresses = random.choices(self._places, k=self._n)
            offset = next(offsets)
            with self._memory[offset : offset + self._n_bytes] as buffer:
                start_ns = perf_counter_ns()
                for addr in addresses:
                    mm.copy_in(addr, buffer)
                return (perf_counter_ns() - start_ns) / self._n

        return copy


def _vector(n_bytes: int) -> AddrRangeSeq:
    each = n_bytes // _BOUNCE_RANGES
    starts = random.choices(range(START, START + MEMORY_BYTES - each, 8), k=_BOUNCE_RANGES)
    return AddrRangeSeq(AddrRange(start, start + each) for start in starts)


def _fault_ns() -> float:
    # The kernel's way to the handler and back: 8 bytes that may not be read, and 8 that may.
    own_faults()
    buffer = bytearray(8)
    hva = address_of(ffi.from_buffer(buffer))
    with mmap.mmap(-1, PAGE_BYTES, prot=0) as nothing:
        absent = ffi.from_buffer(nothing)
        times = []
        for src_hva in (address_of(absent), hva):
            samples = []
            for _ in range(200):
                start_ns = perf_counter_ns()
                safe_copy(hva, src_hva, 8)
                samples.append(perf_counter_ns() - start_ns)
            times.append(statistics.median(samples))
        ffi.release(absent)
    return max(times[0] - times[1], 0.0)
