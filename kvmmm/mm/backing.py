"""Finding frames for addresses: what is there already, what is allocated, what is translated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_down, page_down
from kvmmm.mm.pma import Pma, Removal

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma

_SMALLER_WINDOWS = (HUGE_PAGE_BYTES, 64 << 10)


def allocate_locked(
    mm: MemoryManager, addr: int, vma_start: int, vma_end: int, vma: Vma
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
        return insert_locked(mm, *wanted, vma)
    except ArenaExhaustedError:
        return _allocate_less_locked(mm, addr, gap_start, gap_end, vma)


def _allocate_less_locked(
    mm: MemoryManager, addr: int, gap_start: int, gap_end: int, vma: Vma
) -> tuple[int, int, Pma]:
    # A small arena shrinks the window, down to the page that is needed.
    for length in _SMALLER_WINDOWS:
        start = align_down(addr, length)
        try:
            return insert_locked(mm, max(start, gap_start), min(start + length, gap_end), vma)
        except ArenaExhaustedError:
            continue
    # In the end any free page will do: there are no 2 MiB left for which places should agree.
    page = page_down(addr)
    return _insert_at_locked(mm, page, page + PAGE_BYTES, mm.arena.allocate(PAGE_BYTES), vma)


def insert_locked(mm: MemoryManager, start: int, end: int, vma: Vma) -> tuple[int, int, Pma]:
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
    return _insert_at_locked(mm, start, end, fr, vma)


def _insert_at_locked(
    mm: MemoryManager, start: int, end: int, fr: FileRange, vma: Vma
) -> tuple[int, int, Pma]:
    pma = Pma(mm.arena, fr.start - start, vma.effective_perms, vma.max_perms)
    mm.pmas.insert(start, end, pma)
    mm.counters.allocated_bytes += end - start
    return start, end, pma


def invalidate_locked(mm: MemoryManager, start: int, end: int, removal: Removal) -> None:
    """Take the pmas out of [start, end); `removal` unmaps it and drops their references.

    Preconditions:
        - active_lock is held.
    """
    removal.unmap(start, end)
    for pma_start, pma_end, pma in mm.pmas.remove(start, end):
        removal.drop(pma_start, pma_end, pma)
