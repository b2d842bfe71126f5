"""msync: what was written through shared mappings goes back to where it is kept."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_up
from kvmmm.mm.vma import LOCK_NONE

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma


def msync(
    mm: MemoryManager, addr: int, length_bytes: int, *, sync: bool = False, async_: bool = False,
    invalidate: bool = False,
) -> None:  # fmt: skip
    """Write shared mappings of files back.

    The lock is not held while a file is written: mappings may change meanwhile, and what is there
    then is what is looked at.

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB; 0 does nothing.
        sync: Wait until it is done (MS_SYNC). Without it only the range is checked.
        async_: It may be done at some time (MS_ASYNC): it will be anyway.
        invalidate: Refuse locked memory (MS_INVALIDATE); there are no other copies to invalidate.

    Raises:
        MmError: EINVAL, `sync` with `async_`, or `addr` unaligned; ENOMEM, the range wraps;
            EBUSY, `invalidate` of locked memory: what comes before was written. ENOMEM, a hole: the
            rest was written.
        OSError: The file could not be written.

    Source:
        gVisor mm.MSync.
    """
    if sync and async_:
        raise MmError(errno.EINVAL, "msync", addr, "sync and async exclude each other")
    if addr & PAGE_MASK or addr < 0:
        raise MmError(errno.EINVAL, "msync", addr, "the address is not page aligned")
    if length_bytes == 0:
        return
    end = addr + page_up(length_bytes)
    if length_bytes < 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.ENOMEM, "msync", addr, f"{length_bytes:#x} bytes are too many")
    hole: int | None = None
    at = addr
    while at < end:
        with mm.mapping_lock:
            found = _next_locked(mm, at, end, invalidate=invalidate)
        if found is None or at < found[0]:
            hole = at if hole is None else hole
        if found is None:
            break
        start, stop, vma = max(at, found[0]), min(end, found[1]), found[2]
        if sync and vma.mappable is not None and not vma.private:
            vma.mappable.msync(start + vma.delta, stop + vma.delta)
        at = stop
    if hole is not None:
        raise MmError(errno.ENOMEM, "msync", hole, "nothing is mapped there")


def _next_locked(
    mm: MemoryManager, addr: int, end: int, *, invalidate: bool
) -> tuple[int, int, Vma] | None:
    # The first vma of [addr, end).
    found = mm.vmas.lower_bound(addr)
    if found is None or found[0] >= end:
        return None
    if invalidate and found[2].lock_mode != LOCK_NONE:
        raise MmError(errno.EBUSY, "msync", max(addr, found[0]), "it is locked")
    return found
