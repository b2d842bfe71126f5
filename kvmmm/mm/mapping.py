"""mmap: how vmas come to be.

A mapping goes through three steps: its arguments (`_check_arguments`), its place and the limits
(`create_locked`), and what is to be there at once (`populate_locked`).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE, effective
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_down, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import backing
from kvmmm.mm.placement import alignment_of, find_available_locked
from kvmmm.mm.unmap import unmap_locked
from kvmmm.mm.vma import (
    LOCK_EAGER,
    LOCK_NONE,
    Vma,
    insert_locked,
    locked_span_locked,
    span_locked,
)

if TYPE_CHECKING:
    from kvmmm.memmap.file import Mappable
    from kvmmm.mm.manager import MemoryManager


def mmap(
    mm: MemoryManager, length_bytes: int, perms: int = READ_WRITE, *, addr: int = 0,
    fixed: bool = False, replace: bool = False, no_replace: bool = False, low_32bit: bool = False,
    private: bool = True, mappable: Mappable | None = None, offset: int = 0,
    max_perms: int = ANY_ACCESS, grows_down: bool = False, stack: bool = False,
    populate: bool = False, require_populate: bool = False, lock_mode: int | None = None,
    pure_data: bool = False, name: str = "",
) -> AddrRange:  # fmt: skip
    """Map memory: private or shared, anonymous or of a mappable.

    Nothing is allocated: the first access does that, but for `populate`, `lock_mode`, and what
    `mm.eager_bytes` says.

    Args:
        mm: The address space.
        length_bytes: Rounded up to 4 KiB.
        perms: Access bits; 0 makes a range that nobody may touch.
        addr: Guest address: a hint, rounded down; with `fixed` the place, 4 KiB aligned.
        fixed: There or nowhere (MAP_FIXED, if with `replace`).
        replace: What is mapped there goes; needs `fixed`.
        no_replace: Refuse if anything is mapped there (MAP_FIXED_NOREPLACE); needs `fixed`.
        low_32bit: Between 1 and 2 GiB, unless fixed (MAP_32BIT).
        private: Writes stay in this address space (MAP_PRIVATE), or reach whoever maps it as well.
        mappable: What lies behind; None is anonymous memory, zero-filled.
        offset: Where in `mappable` it begins, 4 KiB aligned.
        max_perms: What mprotect may ever give; less, if the mappable permits less.
        grows_down: Keep a guard of 1 MiB free below it (MAP_GROWSDOWN). It does not grow.
        stack: It is somebody's stack (MAP_STACK): no superpages for it.
        populate: Back and map all of it at once (MAP_POPULATE); what cannot be had comes by faults.
        require_populate: The same, but it must be had: if not, nothing is mapped there.
        lock_mode: LOCK_NONE, LOCK_EAGER or LOCK_LAZY (MAP_LOCKED); None is as `mlockall` said.
        pure_data: No CPU walks or pushes to it (see `Vma.pure_data`).
        name: Shown in maps; empty is the mappable's.

    Returns:
        What was mapped.

    Raises:
        MmError: EINVAL, a malformed argument; EOVERFLOW, offset and length; EACCES, `perms` exceed
            `max_perms`; ENOMEM, no room, or the limit on address space; EEXIST, `no_replace`;
            EPERM or EAGAIN, the limit on locked memory. Nothing was changed.
        OSError: The mappable cannot be mapped so; what was to be replaced is gone.
        ArenaExhaustedError: `require_populate`, and no memory is left.

    Source:
        gVisor mm.MMap.
    """
    length, addr = _check_arguments(
        length_bytes, addr, offset, perms, max_perms, is_anonymous=mappable is None, fixed=fixed
    )
    max_perms = effective(max_perms)
    if mappable is not None and not private:
        max_perms &= mappable.max_shared_perms
    if perms & ~max_perms:
        raise MmError(errno.EACCES, "mmap", addr, "more access than it may ever have")
    if replace and not fixed:
        raise MmError(errno.EINVAL, "mmap", addr, "replacing takes a fixed address")
    if no_replace and (replace or not fixed):
        raise MmError(errno.EINVAL, "mmap", addr, "no_replace takes a fixed address, no replace")
    if grows_down and (mappable is not None or not private):
        raise MmError(errno.EINVAL, "mmap", addr, "only private anonymous memory grows down")
    if not private and mappable is None:
        from kvmmm.memmap.shared_memory import SharedMemory

        mappable, offset = SharedMemory(mm.arena, length), 0
    if not name and mappable is not None:
        name = mappable.name
    vma = Vma(
        perms, name, max_perms=max_perms, private=private, mappable=mappable,
        grows_down=grows_down, is_stack=stack, lock_mode=lock_mode or LOCK_NONE,
        pure_data=pure_data,
    )  # fmt: skip
    with mm.mapping_lock:
        ar, dropped = create_locked(
            mm, "mmap", length, vma, offset, addr=addr, fixed=fixed, replace=replace,
            no_replace=no_replace, low_32bit=low_32bit,
        )  # fmt: skip
        if require_populate:
            _populate_or_unmap_locked(mm, ar)
        elif populate or (mappable is None and length <= mm.eager_bytes):
            populate_locked(mm, ar)
        else:
            populate_if_locked(mm, ar, vma)
    del dropped
    return ar


def _check_arguments(
    length_bytes: int, addr: int, offset: int, perms: int, max_perms: int, *, is_anonymous: bool,
    fixed: bool,
) -> tuple[int, int]:  # fmt: skip
    # Returns length and address, rounded to pages.
    if length_bytes <= 0 or (perms | max_perms) & ~ANY_ACCESS:
        raise MmError(errno.EINVAL, "mmap", addr, "the length is 0, or perms are no access bits")
    length = page_up(length_bytes)
    if length >= ADDRESS_LIMIT:
        raise MmError(errno.ENOMEM, "mmap", addr, f"{length_bytes:#x} bytes are too many")
    if not is_anonymous:
        if offset & PAGE_MASK or offset < 0:
            raise MmError(errno.EINVAL, "mmap", addr, f"offset {offset:#x} is not page aligned")
        if offset + length >= ADDRESS_LIMIT:
            raise MmError(errno.EOVERFLOW, "mmap", addr, f"{length:#x} bytes at offset {offset:#x}")
    if addr & PAGE_MASK:
        if fixed:
            raise MmError(errno.EINVAL, "mmap", addr, "the fixed address is not page aligned")
        addr = page_down(addr)
    return length, addr


def create_locked(
    mm: MemoryManager, operation: str, length: int, vma: Vma, offset: int = 0, *, addr: int = 0,
    fixed: bool = False, replace: bool = False, no_replace: bool = False, low_32bit: bool = False,
) -> tuple[AddrRange, list[tuple[int, int, Vma]]]:  # fmt: skip
    """Find a place for a vma, check the limits, and insert it.

    Args:
        mm: The address space.
        operation: Who asks, for errors.
        length: Bytes, a multiple of 4 KiB.
        vma: What to insert; its delta and lock mode are completed here.
        offset: Where in the vma's mappable it begins.
        addr: Guest address; this and the rest as in `find_available_locked`.
        fixed: See there.
        replace: See there.
        no_replace: See there.
        low_32bit: See there.

    Returns:
        Where it is; and the vmas that it replaced, to be let go of after mapping_lock.

    Preconditions:
        - mapping_lock is held.

    Raises:
        MmError: ENOMEM, EEXIST: there is no place; ENOMEM, EPERM, EAGAIN: the limits.

    Source:
        gVisor mm.createVMALocked.
    """
    align = alignment_of(length, private=vma.private, stack_like=vma.is_stack or vma.grows_down)
    start = find_available_locked(
        mm, operation, length, addr=addr, fixed=fixed, replace=replace, no_replace=no_replace,
        low_32bit=low_32bit, align_bytes=align,
    )  # fmt: skip
    end = start + length
    lock_mode = max(vma.lock_mode, mm.lock_mode)
    _check_limits_locked(mm, operation, start, end, lock_mode, replace=replace)
    dropped = unmap_locked(mm, start, end) if replace else []
    mappable = vma.mappable
    if mappable is not None:
        mappable.add_mapping(mm, AddrRange(start, end), offset, writable=vma.may_write_back)
        vma = vma.replaced(delta=offset - start, lock_mode=lock_mode)
    elif lock_mode != vma.lock_mode:
        vma = vma.replaced(lock_mode=lock_mode)
    insert_locked(mm, start, end, vma)
    return AddrRange(start, end), dropped


def _check_limits_locked(
    mm: MemoryManager, operation: str, start: int, end: int, lock_mode: int, *, replace: bool
) -> None:
    limits = mm.limits
    used = mm.usage_bytes + end - start - (span_locked(mm, start, end) if replace else 0)
    if used > limits.address_space_bytes:
        raise MmError(errno.ENOMEM, operation, start, f"{used >> 10} KiB exceed the address space")
    if lock_mode == LOCK_NONE or limits.may_lock_all:
        return
    if limits.locked_bytes == 0:
        raise MmError(errno.EPERM, operation, start, "nothing may be locked")
    locked = mm.locked_bytes + end - start
    if replace:
        locked -= locked_span_locked(mm, start, end)
    if locked > limits.locked_bytes:
        raise MmError(errno.EAGAIN, operation, start, f"{locked >> 10} KiB may not be locked")


def populate_locked(mm: MemoryManager, ar: AddrRange) -> None:
    """Back and map what can be had of `ar`; what cannot, the guest will find out if it matters.

    Preconditions:
        - mapping_lock is held, active_lock is not.
    """
    with mm.active_lock:
        backing.populate_locked(mm, ar.start, ar.end, ignore_errors=True)


def populate_if_locked(mm: MemoryManager, ar: AddrRange, vma: Vma) -> None:
    """Do that if such a vma, just created, is to be resident at once; the same precondition."""
    if max(vma.lock_mode, mm.lock_mode) == LOCK_EAGER:
        populate_locked(mm, ar)


def _populate_or_unmap_locked(mm: MemoryManager, ar: AddrRange) -> None:
    try:
        with mm.active_lock:
            backing.populate_locked(mm, ar.start, ar.end)
    except BaseException:
        unmap_locked(mm, ar.start, ar.end)
        raise
