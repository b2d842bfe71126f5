"""`bench copies`: what a first copy costs: pages that nobody has touched, and the mirror."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.arena import Arena
from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import FLOOR, START, FixedFrames, GuestMemory, by_memcpy
from kvmmm.bench.guest import BenchmarkError
from kvmmm.bench.no_cpu import NoCpu
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.mm import MemoryManager
from kvmmm.safemem.ffi import IOOpts, address_of, ffi

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

COPIES = 64
_ROOM_BYTES = 64 << 10
_APART_BYTES = 2 * _ROOM_BYTES
"""From one mapping to the next: a pma for each."""
_SIZES = {64: "64", 64 << 10: "64k"}
_SPAN_BYTES = COPIES * _APART_BYTES
_ARENA_BYTES = 4 * _SPAN_BYTES

RUN_PAGES = 256
_RUN_BYTES = RUN_PAGES * PAGE_BYTES
RUNS = 8


class _Cold:
    """Mappings that nobody has touched yet, and holes of the same arena without them."""

    def __init__(self) -> None:
        self.arena = Arena(_ARENA_BYTES)
        self.mm = MemoryManager(self.arena, NoCpu(START + _SPAN_BYTES))
        self._buffers = {n_bytes: bytearray(n_bytes) for n_bytes in _SIZES}

    def close(self) -> None:
        """Release everything."""
        self.mm.close()
        self.arena.close()

    def product(self) -> Sample:
        """Copy where no pma is yet; ns a copy."""
        return {
            f"{direction}_{name}": self._copy_ns(n_bytes, is_out=direction == "out")
            for n_bytes, name in _SIZES.items()
            for direction in ("in", "out")
        }

    def _copy_ns(self, n_bytes: int, *, is_out: bool) -> float:
        mm, buffer = self.mm, self._buffers[n_bytes]
        addresses = range(START, START + _SPAN_BYTES, _APART_BYTES)
        for addr in addresses:
            mm.mmap(_ROOM_BYTES, READ_WRITE, addr=addr, fixed=True)
        start_ns = perf_counter_ns()
        if is_out:
            for addr in addresses:
                mm.copy_out(addr, buffer)
        else:
            for addr in addresses:
                mm.copy_in(addr, buffer)
        taken_ns = perf_counter_ns() - start_ns
        if len(mm.pmas) != COPIES:
            raise BenchmarkError(f"{COPIES} copies made {len(mm.pmas)} pmas")
        mm.munmap(START, _SPAN_BYTES)
        return taken_ns / COPIES

    def floor(self) -> Sample:
        """Copy from and to as many holes, at the same distances; ns a copy."""
        return {
            f"{direction}_{name}": self._floor_ns(n_bytes, is_out=direction == "out")
            for n_bytes, name in _SIZES.items()
            for direction in ("in", "out")
        }

    def _floor_ns(self, n_bytes: int, *, is_out: bool) -> float:
        arena = self.arena
        frames = arena.allocate(_SPAN_BYTES, align_bytes=HUGE_PAGE_BYTES)
        try:
            hvas = range(arena.hva + frames.start, arena.hva + frames.end, _APART_BYTES)
            return by_memcpy(hvas, self._buffers[n_bytes], out=is_out) / COPIES
        finally:
            arena.dec_ref(frames)


@contextmanager
def _holes() -> Iterator[Mapping[str, Probe]]:
    cold = _Cold()
    try:
        yield {"ours": cold.product, "floor": cold.floor}
    finally:
        cold.close()


def _first_uses(memory: GuestMemory, buffer: bytearray) -> Probe:
    opts = IOOpts(mechanism="mirror")
    addresses = range(START, START + RUNS * 2 * _RUN_BYTES, 2 * _RUN_BYTES)

    def first_use(*, is_out: bool) -> float:
        # A new address space, that has a new mirror.
        mm = MemoryManager(memory.arena, NoCpu(addresses.stop))
        mappable = FixedFrames(memory.arena, memory.frames)
        for offset, addr in zip(range(0, memory.length_bytes, _RUN_BYTES), addresses, strict=True):
            mm.mmap(
                _RUN_BYTES, READ_WRITE, addr=addr, fixed=True, private=False, mappable=mappable,
                offset=offset,
            )  # fmt: skip
            mm.populate(addr, _RUN_BYTES)
        # The window itself is there: its first run is not measured.
        mm.copy_in(addresses[0], buffer, opts=opts)
        start_ns = perf_counter_ns()
        if is_out:
            for addr in addresses[1:]:
                mm.copy_out(addr, buffer, opts=opts)
        else:
            for addr in addresses[1:]:
                mm.copy_in(addr, buffer, opts=opts)
        taken_ns = perf_counter_ns() - start_ns
        if mm.mirror is None or mm.mirror.n_resident_pages != RUNS * RUN_PAGES:
            raise BenchmarkError("the copies did not go through the mirror")
        mm.close()
        return taken_ns / (RUNS - 1)

    return lambda: {"in": first_use(is_out=False), "out": first_use(is_out=True)}


def _mapped_by_hand(memory: GuestMemory, buffer: bytearray) -> Probe:
    exported = ffi.from_buffer(buffer)
    fr = memory.frames
    offsets = ffi.new("uint64_t[]", list(range(fr.start + _RUN_BYTES, fr.end, _RUN_BYTES)))

    def by_hand(*, is_out: bool) -> float:
        ns = FLOOR.kvmmm_floor_mirror(
            memory.arena.fd, offsets, len(offsets), address_of(exported), _RUN_BYTES, is_out
        )
        if ns < 0:
            raise BenchmarkError(f"the floor could not map: errno {-ns}")
        return float(ns / len(offsets))

    return lambda: {"in": by_hand(is_out=False), "out": by_hand(is_out=True)}


@contextmanager
def _mirror() -> Iterator[Mapping[str, Probe]]:
    with GuestMemory(RUNS * _RUN_BYTES) as memory:
        # The same for both: how it lies to the pages of the guest decides how quickly it is copied.
        buffer = bytearray(_RUN_BYTES)
        yield {
            "mirror": _first_uses(memory, buffer),
            "by_hand": _mapped_by_hand(memory, buffer),
        }


GROUPS = (
    Group(
        "copies: pages without a pma",
        (
            Case(
                "copies/cold_64k", unit=RATIO, goal=1.15, each=("in_64k", "out_64k"),
                product=("ours", EACH), floor=("floor", EACH),
                note="64 KiB that nobody has touched; floor: memcpy with holes of the same arena",
            ),
            Case(
                "copies/cold_64", unit=RATIO, goal=2.5, each=("in_64", "out_64"),
                product=("ours", EACH), floor=("floor", EACH),
                note="64 bytes that nobody has touched; the same floor",
            ),
        ),
        open=_holes, rounds=60, quick_rounds=8, warm_up=2,
    ),
    Group(
        "copies: the mirror's first use",
        (
            Case(
                "copies/mirror_first_touch", unit=RATIO, goal=1.2, each=("in", "out"),
                product=("mirror", EACH), floor=("by_hand", EACH),
                note="a pma of 256 resident pages, forced to the mirror; floor: one mmap, "
                "MADV_POPULATE_READ, memcpy",
            ),
        ),
        open=_mirror, rounds=60, quick_rounds=8, warm_up=2,
    ),
)  # fmt: skip
"""Holes, and windows."""
