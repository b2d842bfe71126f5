"""Fresh frames for private anonymous memory: how many around a fault, and where in the arena."""

# ruff: noqa: FURB136, PLR1730 - a call of min() costs more than an if, right after an exit
from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_down, align_up
from kvmmm.mm.pma import Pma

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma

_SMALLER_WINDOWS = (HUGE_PAGE_BYTES, 64 << 10)


def allocation_direction(mm: MemoryManager, start: int) -> bool:
    """Whether frames for `start` should come from high offsets of the arena, going down.

    Offsets that follow the addresses make one pma out of many. So memory that is touched downwards,
    like a stack, is allocated downwards; what cannot be told goes as mappings go.

    Source:
        gVisor mm.getAllocationDirection.
    """
    last = mm.last_fault
    if not last or last == start:
        return mm.layout.top_down
    return start < last


def allocate_locked(
    mm: MemoryManager, addr: int, end: int, vma_segment: tuple[int, int, Vma], *, exact: bool,
    gap: tuple[int, int] | None = None,
) -> tuple[int, int, Pma]:  # fmt: skip
    """Back `addr`, and what is sensible around it, with fresh zero-filled frames.

    Args:
        mm: The address space.
        addr: Page aligned; no pma is there.
        end: What is wanted is [addr, end), page aligned; may reach beyond the vma.
        vma_segment: (start, end, vma) around `addr`.
        exact: Back nothing but what is wanted, instead of a window.
        gap: `mm.pmas.find_gap(addr)`, if the caller has it.

    Returns:
        The pma at `addr`, with the neighbours that it was merged with.

    Preconditions:
        - mapping_lock and active_lock are held.

    Raises:
        ArenaExhaustedError: Not even the page of `addr` can be had; nothing was changed.

    Source:
        gVisor mm.getPMAsInternalLocked, the allocation of private anonymous memory.
    """
    # Cold, after an exit: hence plain arithmetic, and no calls that can be done without.
    vma_start, vma_end, vma = vma_segment
    pmas = mm.pmas
    free_start, free_end = gap or pmas.find_gap(addr) or (vma_start, vma_end)
    gap_start = free_start if free_start > vma_start else vma_start
    gap_end = free_end if free_end < vma_end else vma_end
    if exact:
        gap_start = addr
        if gap_end > end:
            gap_end = end
    start, stop = gap_start, gap_end
    unit = addr & -HUGE_PAGE_BYTES
    if not exact and (start < unit or stop > unit + HUGE_PAGE_BYTES):
        least_bytes = mm.address_space.min_window_bytes
        start, stop = mm.window.place(addr, (start, stop), vma_end - vma_start, least_bytes)
        if stop < end:
            stop = min(align_up(end, HUGE_PAGE_BYTES), gap_end)
    top_down = not 0 < mm.last_fault < addr and allocation_direction(mm, addr)
    mm.last_fault = addr
    fo = None
    if not top_down and mm.home is None:
        # Where most end up, without a word too many.
        phase = start & HUGE_PAGE_BYTES - 1
        fo = mm.arena.take(stop - start, HUGE_PAGE_BYTES, phase)
    if fo is None:
        start, stop, fo = _place_locked(mm, addr, (start, stop), (gap_start, gap_end), top_down)
    pma = mm.window.fresh
    perms, max_perms = vma.effective_perms, vma.effective_max_perms
    if (
        pma is None
        or pma.delta != fo - start
        or pma.effective_perms != perms
        or pma.max_perms != max_perms
    ):
        pma = mm.window.fresh = Pma(mm.arena, fo - start, perms, max_perms)
    pmas.insert(start, stop, pma)
    mm.counters.allocated_bytes += stop - start
    if mm.max_rss_bytes < (rss_bytes := pmas.span_bytes):
        mm.max_rss_bytes = rss_bytes
    if free_start < start and stop < free_end:
        return start, stop, pma
    # Whole, if it was merged with neighbours.
    return pmas.find(addr) or (start, stop, pma)


def _place_locked(
    mm: MemoryManager, addr: int, wanted: tuple[int, int], gap: tuple[int, int], top_down: bool
) -> tuple[int, int, int]:
    # (start, end, file offset) of as much of `wanted` as can be had; not beyond `gap`.
    start, stop = wanted
    try:
        fr = frames_for(mm, start, stop - start, top_down=top_down)
    except ArenaExhaustedError:
        start, fr = _allocate_less_locked(mm, addr, *gap, top_down=top_down)
    return start, start + fr.length_bytes, fr.start


def _allocate_less_locked(
    mm: MemoryManager, addr: int, gap_start: int, gap_end: int, *, top_down: bool
) -> tuple[int, FileRange]:
    # A small arena shrinks the window, down to the page that is needed.
    for window_bytes in _SMALLER_WINDOWS:
        start = align_down(addr, window_bytes)
        stop = min(start + window_bytes, gap_end)
        start = max(start, gap_start)
        try:
            return start, frames_for(mm, start, stop - start, top_down=top_down)
        except ArenaExhaustedError:
            continue
    # In the end any free page will do: there are no 2 MiB left for which places should agree.
    return addr, mm.arena.allocate(PAGE_BYTES)


def frames_for(
    mm: MemoryManager, start: int, length_bytes: int, *, top_down: bool = False
) -> FileRange:
    """Return fresh frames for a range of addresses; both agree modulo 2 MiB.

    Args:
        mm: The address space; its home comes first.
        start: Guest address, page aligned.
        length_bytes: Whole pages.
        top_down: See `allocation_direction`.

    Preconditions:
        - active_lock is held.

    Raises:
        ArenaExhaustedError: No room for so much in one piece.
    """
    if mm.home is not None:
        fr = mm.home.allocate(start, length_bytes)
        if fr is not None:
            return fr
    return mm.arena.allocate(
        length_bytes,
        align_bytes=HUGE_PAGE_BYTES,
        phase_bytes=start & HUGE_PAGE_BYTES - 1,
        top_down=top_down,
    )
