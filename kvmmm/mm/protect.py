"""mprotect: what an access may do from now on."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.access import ANY_ACCESS, effective
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_up
from kvmmm.mm import backing
from kvmmm.mm.pma import Removal
from kvmmm.mm.vma import change_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager


def mprotect(
    mm: MemoryManager, addr: int, length_bytes: int, perms: int, *, grows_down: bool = False
) -> None:
    """Change the permissions of a range, all of which must be mapped.

    What is there stays, also under no permissions at all. Translations go only if one of them loses
    a permission, and come back by faults; what is gained is found by the next fault.

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB; 0 does nothing.
        perms: Access bits.
        grows_down: Begin at the start of the vma there, which must be one that grows down
            (PROT_GROWSDOWN).

    Raises:
        MmError: EINVAL, `addr` is unaligned, `perms` are none, or no vma that grows down is there;
            ENOMEM, the range wraps, or begins unmapped: nothing was changed. EACCES, more than
            `max_perms`; ENOMEM, a hole: what comes before was changed.

    Source:
        gVisor mm.MProtect.
    """
    if addr & PAGE_MASK or addr < 0 or perms & ~ANY_ACCESS:
        raise MmError(errno.EINVAL, "mprotect", addr, "unaligned, or perms are no access bits")
    if length_bytes == 0:
        return
    end = addr + page_up(length_bytes)
    if length_bytes < 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.ENOMEM, "mprotect", addr, f"{length_bytes:#x} bytes are too many")
    with mm.mapping_lock:
        start = _start_locked(mm, addr, end, grows_down=grows_down)
        stop, error = _reach_locked(mm, start, end, perms)
        if start < stop:
            change_locked(mm, start, stop, perms=perms)
            with mm.active_lock:
                removal = Removal()
                try:
                    backing.protect_locked(mm, start, stop, removal)
                finally:
                    removal.run(mm)
    if error is not None:
        raise error


def _start_locked(mm: MemoryManager, addr: int, end: int, *, grows_down: bool) -> int:
    # Where the change begins.
    first = mm.vmas.lower_bound(addr)
    if first is None:
        raise MmError(errno.ENOMEM, "mprotect", addr, "nothing is mapped there")
    if not grows_down:
        if addr < first[0]:
            raise MmError(errno.ENOMEM, "mprotect", addr, "nothing is mapped there")
        return addr
    if not first[2].grows_down:
        raise MmError(errno.EINVAL, "mprotect", addr, "no mapping there grows down")
    if end <= first[0]:
        raise MmError(errno.ENOMEM, "mprotect", addr, "nothing is mapped there")
    return first[0]


def _reach_locked(
    mm: MemoryManager, start: int, end: int, perms: int
) -> tuple[int, MmError | None]:
    # How far the change can go, and what stops it before the end.
    wanted = effective(perms)
    at = start
    for vma_start, vma_end, vma in mm.vmas.segments(start, end):
        if at < vma_start:
            break
        if wanted & ~vma.max_perms:
            return at, MmError(errno.EACCES, "mprotect", at, "more access than it may ever have")
        at = vma_end
    if at < end:
        return at, MmError(errno.ENOMEM, "mprotect", at, "nothing is mapped there")
    return end, None
