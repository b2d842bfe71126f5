"""`SharedMemory`: what a shared anonymous mapping maps; it survives fork, and is freed at the end.

    space 1 ──┐
              ├── offsets ──► SharedMemory ──► frames of the arena, allocated when first asked for
    space 2 ──┘

An offset's frame never changes while anybody maps any of it: everybody who translates it is given
the same bytes.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, RangeError, StateError, SyscallError
from kvmmm.hostarch.access import ANY_ACCESS
from kvmmm.hostarch.addr import (
    ADDRESS_LIMIT,
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    align_down,
    align_up,
    page_down,
    page_up,
)
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.file import Translation
from kvmmm.memmap.mapping_set import Mapped
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.arena import Arena
    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.memmap.file import MappingSpace

_HUGE_MASK = HUGE_PAGE_BYTES - 1
# What is tried around a page when all of the window does not fit.
_SMALLER_BYTES = (HUGE_PAGE_BYTES, 64 << 10)


class SharedMemory(Mapped):
    """Shared anonymous memory: a `Mappable` whose bytes are zero at first. Thread-safe.

    It holds one reference on each of its frames and drops them all when its last mapping goes, as
    an unlinked file would; what is mapped afterwards is zero again.

    Args:
        arena: Where its frames come from.
        length_bytes: Its length, rounded up to pages; touching it behind that is a bus error.
        name: Shown in maps.

    Attributes (read-only):
        arena: See there.
        length_bytes: Its length.
        name: See there.

    Raises:
        RangeError: A length of zero or below.

    Source: mmap(2), MAP_SHARED | MAP_ANONYMOUS; gVisor mm.SharedAnonMappable.
    """

    max_shared_perms = ANY_ACCESS
    """What a shared mapping of it may be given."""

    def __init__(self, arena: Arena, length_bytes: int, name: str = "/dev/zero (deleted)") -> None:
        if not 0 < length_bytes < ADDRESS_LIMIT:
            raise RangeError(0, max(length_bytes, 0), "shared memory has a length above zero")
        super().__init__()
        self.arena = arena
        self.length_bytes = page_up(length_bytes)
        self.name = name
        # offset -> file offset minus offset. Its lock is taken under an mm's active_lock.
        self._frames: SegmentSet[int] = SegmentSet(SegmentSet.merge_equal)
        self._frames_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<SharedMemory {self.length_bytes:#x} bytes, {self.resident_bytes:#x} allocated>"

    @property
    def resident_bytes(self) -> int:
        """What of it has frames."""
        return self._frames.span_bytes

    def remove_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """See `kvmmm.memmap.file.Mappable`; the last one takes the frames with it.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap.
        """
        with self._mappings_lock:
            self._mappings.remove_mapping(space, ar, offset, writable=writable)
            if not self._mappings:
                self._drop_frames()

    def translate(
        self, required: FileRange, optional: FileRange, access: int
    ) -> tuple[list[Translation], OSError | None]:
        """See `kvmmm.memmap.file.Mappable`. Every access is permitted.

        Frames are allocated for the 2 MiB-aligned windows around what is required, so far as they
        are optional; offsets and frames agree modulo 2 MiB. Where the arena is too full for that it
        is fewer pages, in the end any single one.

        Returns:
            As there; the error is `ArenaExhaustedError` (ENOMEM), or EIO behind the end.
        """
        del access
        limit = min(optional.end, self.length_bytes)
        end = min(required.end, limit)
        found: list[Translation] = []
        error: OSError | None = None
        with self._frames_lock:
            try:
                self._populate_locked(required.start, end, optional.start, limit)
            except ArenaExhaustedError as e:
                error = e
            fo = required.start
            for start, stop, delta in self._frames.segments(fo, end):
                if start > fo:
                    break  # there was no frame for fo
                start, fo = max(start, optional.start), min(stop, limit)  # noqa: PLW2901
                found.append(Translation(start, fo, self.arena, start + delta, ANY_ACCESS))
        if error is None and fo < required.end:
            error = SyscallError(
                errno.EIO, f"{self.name} ends at {self.length_bytes:#x}, before {required.end:#x}"
            )
        return found, error

    def msync(self, start: int, end: int) -> None:
        """Do nothing: it is kept nowhere else."""

    def close(self) -> None:
        """Drop its frames, should there be any. Idempotent; it can be used again.

        Raises:
            StateError: It is mapped.
        """
        with self._mappings_lock:
            if self._mappings:
                raise StateError(f"{self.name} is still mapped")
            self._drop_frames()

    # Pieces.

    def _drop_frames(self) -> None:
        # Nobody maps it, so nobody translates it.
        with self._frames_lock:
            for start, end, delta in list(self._frames):
                self.arena.dec_ref(FileRange(start + delta, end + delta))
            self._frames.clear()

    def _populate_locked(self, fo: int, end: int, lowest: int, highest: int) -> None:
        # Back all of [fo, end), and what lies in [lowest, highest) of the 2 MiB around it.
        lowest = max(lowest, align_down(fo, HUGE_PAGE_BYTES))
        highest = min(highest, align_up(end, HUGE_PAGE_BYTES))
        while fo < end:
            segment = self._frames.find(fo)
            if segment is not None:
                fo = segment[1]
                continue
            gap = self._frames.find_gap(fo) or (fo, end)
            fo = self._allocate_locked(fo, max(lowest, gap[0]), min(highest, gap[1]))

    def _allocate_locked(self, fo: int, start: int, end: int) -> int:
        # Back fo and as much of [start, end) around it, which has no frames, as can be had in one
        # piece; return where that ends.
        fr = self._place_locked(start, end)
        for unit in _SMALLER_BYTES:
            if fr is not None:
                break
            piece = max(start, align_down(fo, unit)), min(end, align_down(fo, unit) + unit)
            if piece != (start, end):
                start, end = piece
                fr = self._place_locked(start, end)
        if fr is None:
            # There are no frames left that agree with their offsets. In the end any one will do.
            try:
                fr = self.arena.allocate(end - start)
            except ArenaExhaustedError:
                start = page_down(fo)
                end = start + PAGE_BYTES
                fr = self.arena.allocate(PAGE_BYTES)
        self._frames.insert(start, end, fr.start - start)
        return end

    def _place_locked(self, start: int, end: int) -> FileRange | None:
        # Frames for exactly [start, end): beside those of a neighbour if they are free, so that
        # both are one piece wherever they are mapped, or else anywhere in the right phase.
        places: list[int | None] = [None]
        for offset in (end, start - 1):
            segment = self._frames.find(offset) if offset >= 0 else None
            if segment is not None and not segment[2] & _HUGE_MASK and start + segment[2] >= 0:
                places.append(start + segment[2])
        while places:
            try:
                return self.arena.allocate(
                    end - start,
                    align_bytes=HUGE_PAGE_BYTES,
                    phase_bytes=start & _HUGE_MASK,
                    at=places.pop(),
                )
            except (ArenaExhaustedError, RangeError):
                continue  # RangeError: beside the neighbour is outside the arena
        return None
