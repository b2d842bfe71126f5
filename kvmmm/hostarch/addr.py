"""Address types and page arithmetic for x86-64."""

from __future__ import annotations

from typing import NewType

GuestVirt = NewType("GuestVirt", int)
GuestPhys = NewType("GuestPhys", int)
HostVirt = NewType("HostVirt", int)
FileOffset = NewType("FileOffset", int)

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_BYTES - 1
HUGE_PAGE_BYTES = 1 << 21
"""A page-directory leaf, and the unit in which private memory is allocated (design: windows)."""
GIANT_PAGE_BYTES = 1 << 30
ADDRESS_LIMIT = 1 << 64


def page_down(addr: int) -> int:
    """Return `addr` rounded down to a page boundary."""
    return addr & ~PAGE_MASK


def page_up(addr: int) -> int:
    """Return `addr` rounded up to a page boundary; may be `ADDRESS_LIMIT`."""
    return (addr + PAGE_MASK) & ~PAGE_MASK


def align_down(addr: int, align_bytes: int) -> int:
    """Return `addr` rounded down to a multiple of `align_bytes`, a power of two."""
    return addr & -align_bytes


def align_up(addr: int, align_bytes: int) -> int:
    """Return `addr` rounded up to a multiple of `align_bytes`, a power of two."""
    return (addr + align_bytes - 1) & -align_bytes
