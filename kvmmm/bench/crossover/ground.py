"""Guest memory to copy from and to, one layout of it: backed, resident, copied before.

It exists twice over the same frames: `warm`, whose mirror holds all of it, and `cold`, whose mirror
is empty. So one state need not be made from the other by unmapping and mapping 256 MiB.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmmm.arena import Arena
from kvmmm.bench.crossover.geometry import SPAN_BYTES, START, geometry_of
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.bench.crossover.space import TableSpace
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.file import Translation
from kvmmm.memmap.mapping_set import Mapped
from kvmmm.mm import IOOpts, MemoryManager
from kvmmm.mm.asio import mirror_of
from kvmmm.mm.policy import Policy
from kvmmm.safemem.ffi import ffi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.bench.crossover.geometry import Geometry
    from kvmmm.bench.crossover.pool import Pool

MIRROR = IOOpts(mechanism="mirror")
_MIRROR_VMAS = 64_000
_VMAS_LEFT = 2_000  # for the rest of the process
_ALL_BYTES = 1 << 31
_ALL_BITS = 15  # of an entry of the frame table: may be read and written, by whomever


class _Segments(Mapped):
    # A mappable with all of its frames from the start, in the order of a layout.
    name = "segments"
    max_shared_perms = ANY_ACCESS

    def __init__(self, arena: Arena, frames: FileRange, geometry: Geometry) -> None:
        super().__init__()
        self._arena, self._frames, self._geometry = arena, frames, geometry

    def translate(
        self, required: FileRange, _optional: FileRange, _access: int
    ) -> tuple[list[Translation], OSError | None]:
        """See `kvmmm.memmap.file.Mappable`."""
        n, order = self._geometry.segment_bytes, self._geometry.order
        found = []
        for index in range(required.start // n, -(-required.end // n)):
            start, end = max(index * n, required.start), min(index * n + n, required.end)
            fo = self._frames.start + order[index] * n + start - index * n
            found.append(Translation(start, end, self._arena, fo, ANY_ACCESS))
        return found, None

    def msync(self, start: int, end: int) -> None:
        """Do nothing."""


class Ground:
    """Guest memory of one layout; its two address spaces are made when they are first needed.

    Args:
        pool: Where the frames are.
        layout: How many segments.
        order: `contiguous` or `scattered`.

    Attributes:
        offsets: Where in the arena each segment begins, for C.
    """

    def __init__(self, pool: Pool, layout: str, order: str) -> None:
        self.pool = pool
        self.geometry = geometry_of(layout, order, pool.page_bytes)
        n, first = self.geometry.segment_bytes, pool.frames.start
        self.offsets = ffi.new("uint64_t[]", [first + at * n for at in self.geometry.order])
        self._warm: MemoryManager | None = None
        self._cold: MemoryManager | None = None

    def warm(self) -> MemoryManager:
        """Return the address space whose mirror holds everything.

        Raises:
            GroundError: The host has not enough VMAs for it.
        """
        if self._warm is None:
            mm = self._new_mm()
            try:
                self._fill(mm)
            except BaseException:
                mm.close()
                raise
            self._warm = mm
        return self._warm

    def cold(self) -> MemoryManager:
        """Return the address space whose mirror is empty, but reserved."""
        if self._cold is None:
            mm = self._new_mm()
            try:
                self._map(mm)
            except BaseException:
                mm.close()
                raise
            self._cold = mm
        return self._cold

    def back(self, mm: MemoryManager) -> None:
        """Give one of the two vmas and pmas, if it has none: for whoever asks them even so.

        Raises:
            GroundError: It has others than there are segments.
        """
        if len(mm.pmas):
            return
        arena, geometry, length_bytes = self.pool.arena, self.geometry, self.geometry.length_bytes
        mm.mmap(
            length_bytes, READ_WRITE, addr=START, fixed=True, private=False,
            mappable=_Segments(arena, self.pool.frames, geometry),
        )  # fmt: skip
        mm.populate(START, length_bytes)
        if len(mm.pmas) != len(geometry.order):
            raise GroundError(f"{len(mm.pmas)} pmas for {len(geometry.order)} segments")

    def pieces(self, addr: int, n_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield where in the arena [addr, addr + n_bytes) lies: offset and length of each piece."""
        n, end = self.geometry.segment_bytes, addr + n_bytes
        while addr < end:
            index, within = divmod(addr - START, n)
            length_bytes = min(n - within, end - addr)
            yield int(self.offsets[index]) + within, length_bytes
            addr += length_bytes

    def close(self) -> None:
        """Close both; the frames stay with the pool."""
        for mm in (self._warm, self._cold):
            if mm is not None:
                mm.close()
        self._warm = self._cold = None

    def _new_mm(self) -> MemoryManager:
        arena, end = self.pool.arena, START + self.geometry.length_bytes
        return MemoryManager(arena, TableSpace(arena, end), policy=_policy())

    def _map(self, mm: MemoryManager) -> None:
        # With vmas and pmas, which are asked when the mirror has nothing.
        self.back(mm)
        for start, end, fo in self._segments():
            mm.fill_frames(start, end, fo, _ALL_BITS)
        mm.read(START, 1, opts=MIRROR)
        assert mm.mirror is not None  # noqa: S101 - the read has made it
        mm.mirror.clear(START, START + self.geometry.length_bytes)

    def _fill(self, mm: MemoryManager) -> None:
        # Frame table, page tables and mirror by hand: what is there already asks for no pma, and
        # 60,000 of them take seconds. By what a miss calls, so it is the same.
        arena, length_bytes = self.pool.arena, self.geometry.length_bytes
        n_needed = len(self.geometry.order)
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        n_used = _count_maps()
        if n_needed + n_used + _VMAS_LEFT > limit:
            raise GroundError(
                f"a mirror of {n_needed} segments needs as many VMAs; the process has {n_used} of "
                f"at most {limit} (vm.max_map_count)"
            )
        with mm.active_lock:
            mirror = mirror_of(mm)
        map_file = mm.address_space.map_file
        for start, end, fo in self._segments():
            mm.fill_frames(start, end, fo, _ALL_BITS)
            map_file(start, arena, FileRange(fo, fo + end - start), READ_WRITE)
            mirror.map(start, end, arena.fd, fo, READ_WRITE)
        mirror.populate(START, START + length_bytes)
        if mirror.n_resident_pages != length_bytes // PAGE_BYTES:
            raise GroundError(f"{mirror.n_resident_pages} pages are in the mirror, not all")
        if _count_maps() - n_used < n_needed - 1:
            raise GroundError(f"the kernel has merged segments: not {n_needed} VMAs more")

    def _segments(self) -> Iterator[tuple[int, int, int]]:
        # Start, end, offset in the arena.
        n, at = self.geometry.segment_bytes, START
        for fo in self.offsets:
            yield at, at + n, fo
            at += n


class Fresh:
    """Guest memory without pmas: anonymous memory, and holes to back it with."""

    def __init__(self) -> None:
        self.arena = Arena(SPAN_BYTES, debug=False)
        space = TableSpace(self.arena, START + SPAN_BYTES)
        self.mm = MemoryManager(self.arena, space, policy=_policy())
        self._tables = space.frames

    def verify(self, low: int, high: int) -> None:
        """Make sure that nothing backs [low, high), and that no frame it may be given has memory.

        Raises:
            GroundError: It does; or has.
        """
        if any(self.mm.pmas.segments(low, high)) or self.mm.frames(low, high):
            raise GroundError("memory that was just mapped is backed")
        fd, tables = self.arena.fd, self._tables
        if 0 <= _next_data(fd, 0) < tables.start or _next_data(fd, tables.end) >= 0:
            raise GroundError("frames that nobody uses have memory")

    def close(self) -> None:
        """Close both."""
        self.mm.close()
        self.arena.close()


def _policy() -> Policy:
    # Vectored copies through the address space always go by way of a buffer: where that ceases to
    # be better is what is asked.
    return Policy(source="bench", mirror_vmas=_MIRROR_VMAS, bounce_max_bytes=_ALL_BYTES)


def _next_data(fd: int, fo: int) -> int:
    # Where a file has memory, from an offset on; -1: nowhere.
    try:
        return os.lseek(fd, fo, os.SEEK_DATA)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return -1


def _count_maps() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")
