"""Reading every leaf of a range; one address is looked up by C (`kvmmm_pt_lookup`).

All levels count, as for the CPU: W and U hold if every level has them, NX if any level has it. Our
own links are permissive, but a shared table is linked without W.

Source: SDM Vol. 3A 4.6.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.pagetables.pte import (
    LEAF_FLAGS,
    LEVEL_SHIFTS,
    PTE_ADDRESS_MASK,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    ROOT_LEVEL,
    SPAN_NAMES,
    flags_str,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.pagetables.allocator import TableAllocator

_ALL_MUST = PTE_W | PTE_U
_LEAF_ALONE = LEAF_FLAGS & ~(_ALL_MUST | PTE_NX)


class MappedRun:
    """Leaves of one size and one set of flags, contiguous in both address spaces.

    Attributes:
        gva: Guest-virtual address of the first byte.
        length_bytes: A multiple of `leaf_bytes`.
        gpa: Guest-physical address of the first byte.
        leaf_bytes: 4 KiB, 2 MiB or 1 GiB.
        flags: Effective over all levels; the flags that `PageTables.map` was given.
    """

    __slots__ = ("flags", "gpa", "gva", "leaf_bytes", "length_bytes")

    def __init__(self, gva: int, length_bytes: int, gpa: int, leaf_bytes: int, flags: int) -> None:
        self.gva = gva
        self.length_bytes = length_bytes
        self.gpa = gpa
        self.leaf_bytes = leaf_bytes
        self.flags = flags

    def __repr__(self) -> str:
        end = self.gva + self.length_bytes
        size = SPAN_NAMES[self.leaf_bytes]
        return f"{self.gva:#018x}-{end:#018x} -> {self.gpa:#x}  {size} {flags_str(self.flags)}"


class Translation:
    """What one guest-virtual address is mapped to.

    Attributes:
        gva: Guest-virtual start of the page (of the leaf, whatever its size).
        gpa: Guest-physical start of it.
        leaf_bytes: Its size: 4 KiB, 2 MiB or 1 GiB.
        flags: Effective over all levels.
    """

    __slots__ = ("flags", "gpa", "gva", "leaf_bytes")

    def __init__(self, gva: int, gpa: int, leaf_bytes: int, flags: int) -> None:
        self.gva = gva
        self.gpa = gpa
        self.leaf_bytes = leaf_bytes
        self.flags = flags

    def __repr__(self) -> str:
        size = SPAN_NAMES[self.leaf_bytes]
        return f"{self.gva:#018x} -> {self.gpa:#x}  {size} {flags_str(self.flags)}"


def leaves(
    allocator: TableAllocator,
    entries: memoryview,
    start: int,
    end: int,
    above: tuple[int, int, int] = (ROOT_LEVEL, -1, 0),
) -> Iterator[MappedRun]:
    """Yield every present leaf that shares a byte with [start, end), ascending.

    Args:
        allocator: Whose tables they are.
        entries: A table.
        start: Guest-virtual; canonical, and in the same half as `end - 1`.
        end: Guest-virtual, above `start`, within what the table covers.
        above: The table's level; AND and OR of the entries that lead to it.
    """
    level, every, some = above
    shift = LEVEL_SHIFTS[level]
    span_bytes = 1 << shift
    first = (start >> shift) & 511
    gva = start & -span_bytes
    count = ((end - 1) >> shift) - (start >> shift) + 1
    for entry in entries[first : first + count].tolist():
        if entry & PTE_P:
            if level == 1 or entry & PTE_PS:
                flags = entry & _LEAF_ALONE | every & entry & _ALL_MUST | (some | entry) & PTE_NX
                gpa = entry & PTE_ADDRESS_MASK & -span_bytes
                yield MappedRun(gva, span_bytes, gpa, span_bytes, flags)
            else:
                yield from leaves(
                    allocator,
                    allocator.entries(entry & PTE_ADDRESS_MASK),
                    max(start, gva),
                    min(end, gva + span_bytes),
                    (level - 1, every & entry, some | entry),
                )
        gva += span_bytes


def merge_runs(pages: Iterator[MappedRun]) -> Iterator[MappedRun]:
    """Yield `pages` with neighbours joined that continue each other in every respect."""
    run = next(pages, None)
    for page in pages:
        if run is None:
            return
        if (
            page.gva - run.gva == run.length_bytes == page.gpa - run.gpa
            and page.flags == run.flags
            and page.leaf_bytes == run.leaf_bytes
        ):
            run.length_bytes += page.length_bytes
        else:
            yield run
            run = page
    if run is not None:
        yield run
