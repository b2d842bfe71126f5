"""Where a mapping goes: the address that was asked for, or the best free place.

A free place is a gap between vmas, less the guard below a stack. Searching starts at one end of
the layout and turns to the other when nothing is found.

Source: gVisor mm.findAvailableLocked and its neighbours.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.mm.layout import LOWEST_PLACED

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.manager import MemoryManager

GUARD_BYTES = 256 * PAGE_BYTES
"""What is kept free below a vma that grows down, unless an address is insisted on."""

LOW_32BIT_START, LOW_32BIT_END = 0x4000_0000, 0x8000_0000
"""Where MAP_32BIT searches."""


def alignment_of(length_bytes: int, *, private: bool, stack_like: bool) -> int:
    """Return how a mapping of that kind is aligned where its place is free to choose.

    Whole superpages of private memory go where superpages can map them.
    """
    if private and not stack_like and length_bytes % HUGE_PAGE_BYTES == 0:
        return HUGE_PAGE_BYTES
    return PAGE_BYTES


def find_available_locked(
    mm: MemoryManager, operation: str, length_bytes: int, *, addr: int = 0, fixed: bool = False,
    replace: bool = False, no_replace: bool = False, low_32bit: bool = False,
    align_bytes: int = PAGE_BYTES,
) -> int:  # fmt: skip
    """Return where a mapping of `length_bytes` can go.

    Args:
        mm: The address space.
        operation: Who asks, for errors.
        length_bytes: A multiple of 4 KiB, not 0.
        addr: Guest address, page aligned: a hint, or with `fixed` an order; 0 without it is none.
        fixed: Only `addr` will do.
        replace: What is mapped there will go.
        no_replace: Nothing may be mapped there; a stack's guard may.
        low_32bit: Search [1 GiB, 2 GiB) only; without effect on `fixed`.
        align_bytes: Alignment where the search decides, a power of two.

    Preconditions:
        - mapping_lock is held.

    Raises:
        MmError: ENOMEM, there is no such place; EEXIST, `no_replace` and something is there.
    """
    layout = mm.layout
    low, high = layout.min_addr, layout.max_addr
    if low_32bit and not fixed:
        low, high = max(low, LOW_32BIT_START), min(high, LOW_32BIT_END)
    end = addr + length_bytes
    hole = layout.hole_in(addr, end)
    if (addr or fixed) and low <= addr and end <= high and hole is None:
        if replace or _free_end_locked(mm, addr) >= end:
            return addr
        if no_replace:
            if next(mm.vmas.segments(addr, end), None) is not None:
                raise MmError(errno.EEXIST, operation, addr, "something is mapped there")
            return addr
    if fixed:
        raise MmError(errno.ENOMEM, operation, addr, _why_not(addr, end, low, high, hole))
    if low_32bit:
        found = _search_locked(mm, low, high, length_bytes, align_bytes, top_down=False)
    else:
        found = _search_both_ways_locked(mm, length_bytes, align_bytes)
    if found is None:
        raise MmError(errno.ENOMEM, operation, addr, f"no room for {length_bytes >> 10} KiB")
    return found


def _why_not(addr: int, end: int, low: int, high: int, hole: AddrRange | None) -> str:
    if not (low <= addr and end <= high):
        return f"[{addr:#x}, {end:#x}) is not within [{low:#x}, {high:#x})"
    if hole is not None:
        return f"{hole} can never be memory"
    return "something is mapped there, or too close below a stack"


def _free_end_locked(mm: MemoryManager, addr: int) -> int:
    # Where the free place that contains addr ends; addr itself or less if it is none.
    following = mm.vmas.lower_bound(addr)
    if following is None:
        return mm.layout.max_addr
    if following[0] <= addr:
        return addr
    return following[0] - GUARD_BYTES if following[2].grows_down else following[0]


def _search_both_ways_locked(mm: MemoryManager, length_bytes: int, align_bytes: int) -> int | None:
    layout = mm.layout
    lowest = max(layout.min_addr, LOWEST_PLACED)
    ways = [(layout.bottom_up_base, layout.max_addr, False), (lowest, layout.top_down_base, True)]
    if layout.top_down:
        ways.reverse()
    for start, end, top_down in ways:
        found = _search_locked(mm, start, end, length_bytes, align_bytes, top_down=top_down)
        if found is not None:
            return found
    return None


def _search_locked(
    mm: MemoryManager, start: int, end: int, length_bytes: int, align_bytes: int, *, top_down: bool
) -> int | None:
    while start < end:
        found = mm.vmas.find_large_gap(
            start, end, length_bytes, align_bytes=align_bytes, top_down=top_down
        )
        if found is None:
            return None
        hole = mm.layout.hole_in(found, found + length_bytes)
        if hole is not None:
            start, end = (start, hole.start) if top_down else (hole.end, end)
            continue
        following = mm.vmas.lower_bound(found)
        if following is None or not following[2].grows_down:
            return found
        # The gap ends earlier than the set of vmas knows, perhaps before it begins.
        gap_end = following[0] - GUARD_BYTES
        if found + length_bytes <= gap_end:
            return found
        if top_down:
            gap = mm.vmas.find_gap(found)
            end = max(gap_end, gap[0]) if gap is not None else gap_end
        else:
            start = following[1]
    return None
