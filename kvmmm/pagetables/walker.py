"""One walk of a range of guest-virtual addresses through the levels, top down.

`Walker` knows how a range falls apart into entries; what happens to them is said by its subclasses
(`edit`), which hear of four things only:

    visit   a run of entries of one table, each wholly inside the range, none a link to a table
    part    one entry that is no link, and that cannot be dealt with as a whole
    walk    (the walker's own) a link: go down one level
    left    that level is done, back at the link

                      range |-----------------------------------|
    level 2   ..|    absent   |  leaf   |  leaf   |  link   |   leaf   |..
                      part        visit (one run)   walk+left   part
    level 1                                       |visit, 512 |

Runs are what makes it quick: a run is compared, filled and cleared by one slice operation each,
with no loop in Python. A run of leaves is an arithmetic progression; the last ones are remembered,
since every VM of a process begins with the same.
"""

from __future__ import annotations

from array import array
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from kvmmm.pagetables.pte import (
    LEVEL_SHIFTS,
    PTE_ADDRESS_MASK,
    PTE_P,
    PTE_PS,
    TABLE_BYTES,
)

if TYPE_CHECKING:
    from kvmmm.pagetables.allocator import TableAllocator

_LINK_BITS = PTE_P | PTE_PS
# An entry above level 1 links to a table if of these it has P alone.
_UPPER_LEVELS = ((4, 39), (3, 30), (2, 21))
_ZERO_BYTES = bytes(TABLE_BYTES)

# Bounds the memory: at most 2 MiB, were they all of 512 entries.
_MAX_REMEMBERED = 512


@lru_cache(maxsize=_MAX_REMEMBERED)
def leaf_run(first_entry: int, span_bytes: int, count: int) -> memoryview:
    """Return `count` leaves, each `span_bytes` after the one before: a read-only memoryview "Q".

    Args:
        first_entry: Address and flags of the first leaf.
        span_bytes: What one of them covers.
        count: 1 to 512.
    """
    # All entries at once, as 64-bit lanes of one long integer: no lane overflows into the next.
    # 512 entries in 9 us; one by one they take 50, for an entry with NX is a long integer itself.
    ones, steps = _lanes(count)
    run = ones * first_entry + steps * span_bytes
    return memoryview(run.to_bytes(count * 8, "little")).cast("Q")


@cache
def _lanes(count: int) -> tuple[int, int]:
    # `count` lanes that hold 1 each, and as many that hold 0, 1, 2 and so on.
    ones = array("Q", [1]) * count
    steps = array("Q", range(count))
    return int.from_bytes(ones.tobytes(), "little"), int.from_bytes(steps.tobytes(), "little")


def is_clear(entries: memoryview) -> bool:
    """Return whether all of `entries`, a table or a part of one, are absent.

    As bytes: one copy and one memcmp, 20 times faster than a look at every item.
    """
    return _ZERO_BYTES.startswith(entries.tobytes())


def nearest_table(
    allocator: TableAllocator, root: memoryview, start: int, end: int
) -> tuple[memoryview, int]:
    """Return the lowest existing table that covers all of [start, end), and its level.

    Most ranges lie below one link on the upper levels. A walk that takes no table out may as well
    begin there.
    """
    entries = root
    differing = start ^ (end - 1)
    for level, shift in _UPPER_LEVELS:
        if differing >> shift:
            return entries, level
        entry = entries[(start >> shift) & 511]
        if entry & _LINK_BITS != PTE_P:
            return entries, level
        entries = allocator.entries(entry & PTE_ADDRESS_MASK)
    return entries, 1


class Walker:
    """Takes a range apart. Subclasses say what to do; one object a walk.

    Attributes:
        top_run_level: Highest level at which `visit` is called; above it there is only `part`.
    """

    __slots__ = ("allocator", "top_run_level")

    def __init__(self, allocator: TableAllocator, top_run_level: int = 4) -> None:
        self.allocator = allocator
        self.top_run_level = top_run_level

    def walk(self, entries: memoryview, level: int, start: int, end: int) -> None:
        """Walk the part [start, end) of what one table covers.

        Args:
            entries: The table.
            level: Its level, 1 to 4.
            start: Guest-virtual, page-aligned.
            end: Guest-virtual, page-aligned, above `start`, within what the table covers.
        """
        shift = LEVEL_SHIFTS[level]
        if level == 1:
            self.visit(entries, 1, (start >> shift) & 511, (end - start) >> shift, start)
            return
        span_bytes = 1 << shift
        while start < end:
            index = (start >> shift) & 511
            stop = (start | (span_bytes - 1)) + 1
            if stop > end:  # noqa: PLR1730, min() costs a call
                stop = end
            entry = entries[index]
            if entry & _LINK_BITS == PTE_P:
                gpa = entry & PTE_ADDRESS_MASK
                child = self.allocator.entries(gpa)
                self.walk(child, level - 1, start, stop)
                self.left(entries, index, gpa, child)
            elif stop - start == span_bytes and level <= self.top_run_level:
                count = _run_length(entries, index, (end - start) >> shift)
                self.visit(entries, level, index, count, start)
                stop = start + count * span_bytes
            else:
                self.part(entries, level, index, start, stop)
            start = stop

    def visit(self, entries: memoryview, level: int, first: int, count: int, gva: int) -> None:
        """Deal with `entries[first:first + count]`: absent or leaves, wholly in the range.

        Args:
            entries: Their table.
            level: The table's level.
            first: Index of the first entry.
            count: At least 1.
            gva: Guest-virtual address that the first entry covers first.
        """
        raise NotImplementedError

    def part(self, entries: memoryview, level: int, index: int, start: int, stop: int) -> None:
        """Deal with `entries[index]`, absent or a leaf, of which only [start, stop) counts.

        Also called for the whole of it above `top_run_level`.
        """
        raise NotImplementedError

    def left(self, entries: memoryview, index: int, gpa: int, child: memoryview) -> None:
        """Hear that the table `child` at `gpa`, linked from `entries[index]`, is done."""


def _run_length(entries: memoryview, index: int, count: int) -> int:
    # How many of `count` entries, from `index` on, come before the next link. The first is none.
    if count == 1:
        return 1
    run = entries[index : index + count]
    if is_clear(run):
        return count
    for i, entry in enumerate(run.tolist()):
        if entry & _LINK_BITS == PTE_P:
            return i
    return count
