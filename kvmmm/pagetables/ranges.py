"""Which guest-virtual addresses there are, and what is wrong with a range of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK
from kvmmm.pagetables.pte import GPA_LIMIT, LEAF_FLAGS, LEVEL_SHIFTS, ROOT_LEVEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LOWER_HALF_END = 0x0000_8000_0000_0000
UPPER_HALF_START = 0xFFFF_8000_0000_0000
"""Between these two lies the hole: no canonical addresses. Source: SDM Vol. 1 3.3.7.1."""

_SLOT_SHIFT = LEVEL_SHIFTS[ROOT_LEVEL]
_UPPER_SLOT = 256


def canonical_spans(without_slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of all addresses outside some slots of the PML4, ascending."""
    low = 0
    for slot in sorted(without_slots):
        at = slot << _SLOT_SHIFT
        if slot >= _UPPER_SLOT:
            at += UPPER_HALF_START - LOWER_HALF_END
        yield from _canonical(low, at)
        low = at + (1 << _SLOT_SHIFT)
    yield from _canonical(low, ADDRESS_LIMIT)


def _canonical(start: int, end: int) -> Iterator[tuple[int, int]]:
    for low, high in ((0, LOWER_HALF_END), (UPPER_HALF_START, ADDRESS_LIMIT)):
        if max(start, low) < min(end, high):
            yield max(start, low), min(end, high)


def check_range(gva: int, length_bytes: int, fixed_slots: Iterable[int]) -> None:
    """Complain about a range that cannot be mapped.

    Raises:
        RangeError: Unaligned, empty, not canonical, or in a fixed slot of the PML4.
    """
    end = gva + length_bytes
    if (gva | length_bytes) & PAGE_MASK:
        raise RangeError(gva, end, "page tables map whole 4 KiB pages: align both ends")
    if length_bytes <= 0:
        raise RangeError(gva, end, "the range is empty")
    if not (0 <= gva < end <= LOWER_HALF_END or UPPER_HALF_START <= gva < end <= ADDRESS_LIMIT):
        raise RangeError(
            gva,
            end,
            f"not canonical: stay in [0x0, {LOWER_HALF_END:#x}) "
            f"or in [{UPPER_HALF_START:#x}, {ADDRESS_LIMIT:#x})",
        )
    for slot in fixed_slots:
        if gva >> _SLOT_SHIFT & 511 <= slot <= (end - 1) >> _SLOT_SHIFT & 511:
            raise RangeError(gva, end, f"entry {slot} of the PML4 is fixed")


def check_leaf(gpa: int, length_bytes: int, flags: int) -> None:
    """Complain about frames that cannot be mapped, or flags that are none.

    Raises:
        RangeError: `gpa` is unaligned or out of bounds.
        ValueError: About `flags`.
    """
    if gpa & PAGE_MASK or not 0 <= gpa <= GPA_LIMIT - length_bytes:
        raise RangeError(gpa, gpa + length_bytes, "no page-aligned guest-physical range")
    if flags & ~LEAF_FLAGS:
        raise ValueError(f"flags {flags:#x} hold bits that are no flags of a leaf")
