"""pmas: which frames back an address, and how new ones are found.

A fault does not allocate a page but a window around it: 2 MiB at first, doubling while faults go
upwards through a vma, so that touching 64 MiB in order takes a handful of faults. Frames are
reserved file range, not memory: nothing is committed until the guest touches it.

gpa and file offset agree modulo 2 MiB, so that the host may back the guest with huge pages. Where
the arena has room, an mm's frames lie at one fixed distance from their addresses (its *home*), so
that neighbouring windows are one pma and could be one memslot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_down, page_down
from kvmmm.hostarch.ranges import FileRange
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.arena import Arena, Reservation
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.platform.base import File

MAX_WINDOW_BYTES = 16 << 20
"""Where doubling ends, in a vma below 1 GiB; 1/64 of a larger one."""


_SMALLER_WINDOWS = (HUGE_PAGE_BYTES, 64 << 10)


class Pma:
    """Frames behind a range of addresses. Immutable, so that halves of a split pma share it.

    Attributes:
        file: What backs it.
        delta: File offset minus address, the same all over the pma.
    """

    __slots__ = ("delta", "file")

    def __init__(self, file: File, delta: int) -> None:
        self.file = file
        self.delta = delta

    def file_range(self, start: int, end: int) -> FileRange:
        """Return the frames behind [start, end)."""
        return FileRange(start + self.delta, end + self.delta)


def _merge(_start: int, _end: int, left: Pma, right: Pma) -> Pma | None:
    return left if left.file is right.file and left.delta == right.delta else None


def new_pma_set() -> SegmentSet[Pma]:
    """Return an empty set of pmas, by guest address."""
    return SegmentSet(merge=_merge)


class Home:
    """Arena offsets reserved for one mm: address + delta, as long as nobody sits there.

    Nothing is committed by it. It makes windows that touch in the guest touch in the arena.
    """

    __slots__ = ("arena", "delta", "reservation")

    def __init__(self, arena: Arena, reservation: Reservation, start: int) -> None:
        self.arena = arena
        self.reservation = reservation
        self.delta = reservation.start - start

    def allocate(self, start: int, length_bytes: int) -> FileRange | None:
        """Return the frames at home for such a range of addresses, or None if they are taken."""
        try:
            return self.arena.allocate(
                length_bytes, at=start + self.delta, reservation=self.reservation
            )
        except ArenaExhaustedError:
            return None


class Window:
    """How much the next fault should allocate; remembers where the last one ended.

    Guarded by active_lock.
    """

    __slots__ = ("length_bytes", "next_start")

    def __init__(self) -> None:
        self.length_bytes = 0
        self.next_start = -1

    def place(
        self, addr: int, gap: tuple[int, int], vma_bytes: int, least_bytes: int
    ) -> tuple[int, int]:
        """Return the window for a fault at `addr`, inside the unbacked range `gap` of one vma.

        Args:
            addr: Faulting address.
            gap: [start, end) around it, page aligned, without pmas, within the vma.
            vma_bytes: Length of the vma.
            least_bytes: The least that a fault should map, a power of two of at least 2 MiB.
        """
        start = align_down(addr, HUGE_PAGE_BYTES)
        length = least_bytes
        if start == self.next_start:
            length = min(self.length_bytes * 2, max(MAX_WINDOW_BYTES, vma_bytes >> 6))
            length = max(align_down(length, HUGE_PAGE_BYTES), least_bytes)
        elif least_bytes > HUGE_PAGE_BYTES:
            start = align_down(addr, least_bytes)
        end = start + length
        self.next_start = end
        self.length_bytes = length
        return max(start, gap[0]), min(end, gap[1])


def allocate_locked(
    mm: MemoryManager, addr: int, vma_start: int, vma_end: int
) -> tuple[int, int, Pma]:
    """Back a window around `addr` with fresh zero-filled frames; returns the pma inserted.

    Preconditions:
        - mapping_lock and active_lock are held.
        - [vma_start, vma_end) is a vma that contains `addr`; no pma does.

    Raises:
        ArenaExhaustedError: Not even the page of `addr` can be had.

    Source:
        gVisor mm.getPMAsInternalLocked, the allocation of private anonymous memory.
    """
    gap = mm.pmas.find_gap(addr) or (vma_start, vma_end)
    gap_start, gap_end = max(gap[0], vma_start), min(gap[1], vma_end)
    wanted = mm.window.place(
        addr, (gap_start, gap_end), vma_end - vma_start, mm.address_space.min_window_bytes
    )
    try:
        return insert_locked(mm, *wanted)
    except ArenaExhaustedError:
        return _allocate_less_locked(mm, addr, gap_start, gap_end)


def _allocate_less_locked(
    mm: MemoryManager, addr: int, gap_start: int, gap_end: int
) -> tuple[int, int, Pma]:
    # A small arena shrinks the window, down to the page that is needed.
    for length in _SMALLER_WINDOWS:
        start = align_down(addr, length)
        try:
            return insert_locked(mm, max(start, gap_start), min(start + length, gap_end))
        except ArenaExhaustedError:
            continue
    # In the end any free page will do: there are no 2 MiB left for which places should agree.
    page = page_down(addr)
    return _insert_at_locked(mm, page, page + PAGE_BYTES, mm.arena.allocate(PAGE_BYTES))


def insert_locked(mm: MemoryManager, start: int, end: int) -> tuple[int, int, Pma]:
    """Back exactly [start, end), at the mm's home where that is free.

    Preconditions:
        - active_lock is held; [start, end) is page aligned and has no pma.

    Raises:
        ArenaExhaustedError: No room; nothing was changed.
    """
    length = end - start
    fr = None
    if mm.home is not None:
        fr = mm.home.allocate(start, length)
    if fr is None:
        fr = mm.arena.allocate(
            length, align_bytes=HUGE_PAGE_BYTES, phase_bytes=start % HUGE_PAGE_BYTES
        )
    return _insert_at_locked(mm, start, end, fr)


def _insert_at_locked(
    mm: MemoryManager, start: int, end: int, fr: FileRange
) -> tuple[int, int, Pma]:
    pma = Pma(mm.arena, fr.start - start)
    mm.pmas.insert(start, end, pma)
    mm.counters.allocated_bytes += end - start
    return start, end, pma


def remove_locked(mm: MemoryManager, start: int, end: int) -> None:
    """Drop the pmas in [start, end) and their references.

    Preconditions:
        - active_lock is held, and the range is unmapped from the address space (order: a frame must
          not be reachable by a CPU after its last reference is gone).
    """
    for pma_start, pma_end, pma in mm.pmas.remove(start, end):
        pma.file.dec_ref(pma.file_range(pma_start, pma_end))
