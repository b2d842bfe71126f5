"""Mapping for whoever starts a program: all of an image at once, its stack, its first pages."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError, RangeError
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_up
from kvmmm.mm import backing
from kvmmm.mm.layout import DEFAULT_STACK_BYTES, MAX_STACK_BYTES
from kvmmm.mm.mapping import create_locked, populate_if_locked
from kvmmm.mm.vma import Vma, insert_locked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.manager import MemoryManager

STACK_NAME = "[stack]"


def mmap_all(mm: MemoryManager, mappings: Sequence[tuple[int, int, int, str]]) -> None:
    """Map private anonymous memory at several places at once, where nothing is mapped yet.

    What a loader uses: it knows all the places, and they are checked first.

    Args:
        mm: The address space.
        mappings: (start, end, perms, name) of each: guest addresses, 4 KiB aligned, ascending.

    Raises:
        RangeError: A range is malformed, or overlaps something. Nothing was changed.
        MmError: ENOMEM, the limit on address space. Nothing was changed.
    """
    last_end = total = 0
    for start, end, perms, _name in mappings:
        if start < last_end:
            raise RangeError(start, end, "mappings must be ascending and disjoint")
        _check_bounds(mm, start, end, perms)
        total += end - start
        last_end = end
    with mm.mapping_lock:
        if mm.usage_bytes + total > mm.limits.address_space_bytes:
            raise MmError(errno.ENOMEM, "mmap", 0, f"{total >> 10} KiB exceed the address space")
        for start, end, _perms, _name in mappings if mm.vmas else ():
            if next(mm.vmas.segments(start, end), None) is not None:
                raise RangeError(start, end, "something is mapped there")
        for start, end, perms, name in mappings:
            insert_locked(mm, start, end, Vma(perms, name))


def _check_bounds(mm: MemoryManager, start: int, end: int, perms: int) -> None:
    if (start | end) & PAGE_MASK or not 0 <= start < end:
        raise RangeError(start, end, "a mapping is one or more whole 4 KiB pages")
    if end > mm.max_addr:
        raise RangeError(start, end, f"guest memory ends at {mm.max_addr:#x}")
    if perms & ~ANY_ACCESS:
        raise RangeError(start, end, f"{perms:#x} is no set of access bits")


def map_stack(mm: MemoryManager) -> AddrRange:
    """Map a stack of the size that the limits say, at the top of the layout if that is free.

    A stack does not grow: all of it is mapped now, and costs nothing until touched.

    Raises:
        MmError: ENOMEM, the limit is 0, or there is no room.

    Source:
        gVisor mm.MapStack.
    """
    length = page_up(mm.limits.stack_bytes)
    if length >= ADDRESS_LIMIT:
        length = DEFAULT_STACK_BYTES
    length = min(length, MAX_STACK_BYTES)
    top = mm.layout.max_addr
    if not 0 < length <= top:
        raise MmError(errno.ENOMEM, "mmap", top, f"no stack of {length >> 10} KiB")
    vma = Vma(READ_WRITE, STACK_NAME, grows_down=True, is_stack=True)
    with mm.mapping_lock:
        ar, _none = create_locked(mm, "mmap", length, vma, addr=top - length)
        populate_if_locked(mm, ar, vma)
    return ar


def populate(mm: MemoryManager, addr: int, length_bytes: int) -> None:
    """Back and map all of a range at once, as if every page had been read (MAP_POPULATE).

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB.

    Raises:
        MmError: EINVAL, the range is malformed. Nothing was done.
        GuestFaultError: Part of it is not mapped, nobody may touch it, or its file ends; what comes
            before is populated.
        ArenaExhaustedError: No memory is left; the same.
    """
    end = addr + page_up(length_bytes)
    if addr & PAGE_MASK or addr < 0 or length_bytes < 0 or end > mm.max_addr:
        raise MmError(errno.EINVAL, "populate", addr, f"{length_bytes:#x} bytes from there")
    with mm.mapping_lock, mm.active_lock:
        backing.populate_locked(mm, addr, end)
