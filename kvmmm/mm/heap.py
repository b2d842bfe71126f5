"""brk: the heap, one growing mapping."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, page_up
from kvmmm.mm.mapping import create_locked, populate_if_locked
from kvmmm.mm.unmap import unmap_locked
from kvmmm.mm.vma import Vma

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager

HEAP_NAME = "[heap]"
_HEAP = Vma(READ_WRITE, HEAP_NAME)


def set_brk(mm: MemoryManager, start: int) -> None:
    """Have the heap begin, and end, at `start`: behind the program. An old heap goes.

    Args:
        mm: The address space.
        start: Guest address; need not be aligned, the heap is whole pages above it.

    Raises:
        MmError: EINVAL, it is no address of this space. Nothing was changed.

    Source:
        gVisor mm.BrkSetup.
    """
    if not mm.layout.min_addr <= start <= mm.layout.max_addr:
        raise MmError(errno.EINVAL, "brk", start, "it is outside the address space")
    with mm.mapping_lock:
        dropped = unmap_locked(mm, page_up(mm.brk_start), page_up(mm.brk_end))
        mm.brk_start = mm.brk_end = start
    del dropped


def brk(mm: MemoryManager, addr: int) -> int:
    """Move the heap's end to `addr`, and return where it is now; it moves, or stays.

    As the system call this one never fails: whoever asks for the impossible, such as 0, is told
    the current end. `move_brk` says why.
    """
    try:
        return move_brk(mm, addr)
    except MmError:
        return mm.brk_end


def move_brk(mm: MemoryManager, addr: int) -> int:
    """Move the heap's end to `addr`, and return it.

    Raises:
        MmError: EINVAL, `addr` is below the heap; ENOMEM, the limits on data or address space,
            something is mapped there, or there is no heap; EFAULT, it wraps; EAGAIN or EPERM, the
            limit on locked memory. Nothing was changed.

    Source:
        gVisor mm.Brk.
    """
    with mm.mapping_lock:
        if addr < mm.brk_start:
            raise MmError(errno.EINVAL, "brk", addr, f"the heap begins at {mm.brk_start:#x}")
        if addr - mm.brk_start > mm.limits.data_bytes:
            raise MmError(errno.ENOMEM, "brk", addr, "more than the limit on data")
        old_end, new_end = page_up(mm.brk_end), page_up(addr)
        if new_end >= ADDRESS_LIMIT:
            raise MmError(errno.EFAULT, "brk", addr, "it wraps")
        dropped: list[tuple[int, int, Vma]] = []
        if old_end < new_end:
            if mm.brk_start == 0:
                raise MmError(errno.ENOMEM, "brk", addr, "there is no heap: set_brk says where")
            ar, dropped = create_locked(
                mm, "brk", new_end - old_end, _HEAP, addr=old_end, fixed=True
            )
            populate_if_locked(mm, ar, _HEAP)
        elif new_end < old_end:
            dropped = unmap_locked(mm, new_end, old_end)
        mm.brk_end = addr
    del dropped
    return addr
