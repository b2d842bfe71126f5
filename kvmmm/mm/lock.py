"""mlock and its family: which vmas must stay resident, and how many bytes that may be.

The mode is kept per vma, and counted. The host's memory is not locked: frames are the arena's, and
resident means that they are allocated and mapped.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_down, page_up
from kvmmm.mm import backing
from kvmmm.mm.vma import LOCK_EAGER, LOCK_NONE, change_locked, locked_span_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager


def mlock(mm: MemoryManager, addr: int, length_bytes: int, mode: int = LOCK_EAGER) -> None:
    """Lock a range, or with LOCK_NONE unlock it.

    Args:
        mm: The address space.
        addr: Guest address; the range is widened to whole pages.
        length_bytes: 0 at an aligned address does nothing, once the limit has been asked.
        mode: LOCK_EAGER makes all of it resident now, LOCK_LAZY what is touched (MLOCK_ONFAULT).

    Raises:
        MmError: EINVAL, the range wraps; EPERM, nothing may be locked; ENOMEM, the limit: nothing
            was changed. ENOMEM, a hole: what comes before is locked, and not made resident.
            ENOMEM, LOCK_EAGER, and part of it nobody may touch, or its file has no bytes there;
            EAGAIN, no memory is left: all of it is locked, what comes before is resident.

    Source:
        gVisor mm.MLock.
    """
    start, end = page_down(addr), page_down(addr) + page_up(length_bytes + (addr & PAGE_MASK))
    if addr < 0 or length_bytes < 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "mlock", addr, f"{length_bytes:#x} bytes are too many")
    with mm.mapping_lock:
        if mode != LOCK_NONE:
            more = end - start - locked_span_locked(mm, start, end)
            _check_limit_locked(mm, start, mm.locked_bytes + more)
        if start == end:
            return
        gap = next(mm.vmas.gaps(start, end), None)
        stop = gap[0] if gap is not None else end
        if start < stop:
            change_locked(mm, start, stop, lock_mode=mode)
        if stop < end:
            raise MmError(errno.ENOMEM, "mlock", stop, "nothing is mapped there")
        if mode == LOCK_EAGER:
            _make_resident_locked(mm, start, end)


def munlock(mm: MemoryManager, addr: int, length_bytes: int) -> None:
    """Unlock a range; arguments and errors as in `mlock`."""
    mlock(mm, addr, length_bytes, LOCK_NONE)


def mlockall(
    mm: MemoryManager, *, current: bool = False, future: bool = False, mode: int = LOCK_EAGER
) -> None:
    """Lock all that is mapped, or all that will be, or both; LOCK_NONE unlocks.

    Args:
        mm: The address space.
        current: What is mapped now (MCL_CURRENT). What cannot be made resident is left.
        future: What will be mapped (MCL_FUTURE).
        mode: As in `mlock`.

    Raises:
        MmError: EINVAL, neither; EPERM, nothing may be locked; ENOMEM, the limit. Nothing was
            changed.

    Source:
        gVisor mm.MLockAll.
    """
    if not current and not future:
        raise MmError(errno.EINVAL, "mlockall", 0, "neither what is mapped nor what will be")
    with mm.mapping_lock:
        if current:
            if mode != LOCK_NONE:
                _check_limit_locked(mm, 0, mm.usage_bytes)
            change_locked(mm, 0, mm.max_addr, lock_mode=mode)
        if future:
            mm.lock_mode = mode
        if current and mode == LOCK_EAGER:
            with mm.active_lock:
                for start, end, _vma in list(mm.vmas):
                    backing.populate_locked(mm, start, end, ignore_errors=True)


def munlockall(mm: MemoryManager) -> None:
    """Unlock everything, and what will be mapped as well."""
    mlockall(mm, current=True, future=True, mode=LOCK_NONE)


def _check_limit_locked(mm: MemoryManager, addr: int, locked_bytes: int) -> None:
    limits = mm.limits
    if limits.may_lock_all:
        return
    if limits.locked_bytes == 0:
        raise MmError(errno.EPERM, "mlock", addr, "nothing may be locked")
    if locked_bytes > limits.locked_bytes:
        raise MmError(errno.ENOMEM, "mlock", addr, f"{locked_bytes >> 10} KiB may not be locked")


def _make_resident_locked(mm: MemoryManager, start: int, end: int) -> None:
    # Errors are those of mlock(2): what nobody may touch cannot be resident.
    try:
        with mm.active_lock:
            backing.populate_locked(mm, start, end)
    except GuestFaultError as e:
        why = "nobody may touch it, or its file has no bytes there"
        raise MmError(errno.ENOMEM, "mlock", e.addr, why) from e
    except ArenaExhaustedError as e:
        raise MmError(errno.EAGAIN, "mlock", start, "no memory is left") from e
