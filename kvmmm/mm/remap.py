"""mremap: a mapping grows, shrinks or moves, and takes what is in it along."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_BYTES, PAGE_MASK, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import backing
from kvmmm.mm.mapping import create_locked, populate_locked
from kvmmm.mm.placement import alignment_of, find_available_locked
from kvmmm.mm.pma import Removal
from kvmmm.mm.unmap import unmap_locked
from kvmmm.mm.vma import LOCK_EAGER, LOCK_NONE, insert_locked, remove_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma

    Dropped = list[tuple[int, int, Vma]]


def mremap(
    mm: MemoryManager, old_addr: int, old_bytes: int, new_bytes: int, *, may_move: bool = False,
    new_addr: int | None = None,
) -> int:  # fmt: skip
    """Resize or move a mapping, with what it holds: frames move along, nothing is copied.

        old 0       a second mapping of the same; needs may_move or new_addr
        shrinking   in place: the tail goes
        same size   nothing happens
        growing     in place if there is room; else, with may_move, elsewhere
        new_addr    moved there in any case, over whatever is there

    Args:
        mm: The address space.
        old_addr: Guest address, 4 KiB aligned, mapped.
        old_bytes: Rounded up to 4 KiB; growing and moving take one vma.
        new_bytes: Rounded up to 4 KiB, not 0.
        may_move: MREMAP_MAYMOVE.
        new_addr: MREMAP_FIXED: exactly there.

    Returns:
        Guest address where it is now.

    Raises:
        MmError: EINVAL, a malformed range, or old and new overlap; EFAULT, nothing is mapped at
            `old_addr`, or growing or moving meets the end of a vma; ENOMEM, no room, or the limit
            on address space; EAGAIN, the limit on locked memory. Nothing was changed, but with
            `new_addr`: what was there is gone, and so is the old tail when shrinking.
        OSError: The mappable cannot be mapped again; the same.

    Source:
        gVisor mm.MRemap.
    """
    if old_addr & PAGE_MASK or old_addr < 0:
        raise MmError(errno.EINVAL, "mremap", old_addr, "the address is not page aligned")
    if not 0 < page_up(new_bytes) < ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "mremap", old_addr, f"no mapping has {new_bytes:#x} bytes")
    if old_bytes < 0 or page_up(old_bytes) >= ADDRESS_LIMIT - old_addr:
        raise MmError(errno.EINVAL, "mremap", old_addr, f"{old_bytes:#x} bytes wrap")
    old_bytes, new_bytes = page_up(old_bytes), page_up(new_bytes)
    # Held until the lock is not: see unmap_locked.
    dropped: Dropped = []
    with mm.mapping_lock:
        _check_growth_locked(mm, old_addr, old_bytes, new_bytes)
        if new_addr is not None:
            new_ar = _clear_target_locked(mm, old_addr, old_bytes, new_bytes, new_addr, dropped)
            old_bytes = min(old_bytes, new_bytes)
        elif new_bytes <= old_bytes:
            if new_bytes < old_bytes:
                dropped += unmap_locked(mm, old_addr + new_bytes, old_addr + old_bytes)
            return old_addr
        else:
            vma = _one_vma_locked(mm, old_addr, old_addr + old_bytes)
            try:
                return _grow_locked(mm, vma, old_addr, old_bytes, new_bytes)
            except OSError:
                if not may_move:
                    raise
            new_ar = _place_locked(mm, vma, new_bytes)
        return _move_locked(mm, AddrRange.of_length(old_addr, old_bytes), new_ar)


def _check_growth_locked(mm: MemoryManager, old_addr: int, old_bytes: int, new_bytes: int) -> None:
    found = mm.vmas.find(old_addr)
    if found is None:
        raise MmError(errno.EFAULT, "mremap", old_addr, "nothing is mapped there")
    if new_bytes <= old_bytes or found[2].lock_mode == LOCK_NONE or mm.limits.may_lock_all:
        return
    locked = mm.locked_bytes - old_bytes + new_bytes
    if locked > mm.limits.locked_bytes:
        raise MmError(errno.EAGAIN, "mremap", old_addr, f"{locked >> 10} KiB may not be locked")


def _one_vma_locked(mm: MemoryManager, start: int, end: int) -> Vma:
    # The vma that covers all of it.
    found = mm.vmas.find(start)
    if found is None or found[1] < end:
        raise MmError(errno.EFAULT, "mremap", start, f"no one mapping reaches up to {end:#x}")
    return found[2]


def _grow_locked(mm: MemoryManager, vma: Vma, old_addr: int, old_bytes: int, new_bytes: int) -> int:
    # A vma behind the old one that is just like it, and merges.
    old_end = old_addr + old_bytes
    offset = old_end + vma.delta if vma.mappable is not None else 0
    if offset + new_bytes - old_bytes >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "mremap", old_addr, "offset and length wrap")
    ar, _none = create_locked(
        mm, "mremap", new_bytes - old_bytes, vma, offset, addr=old_end, fixed=True
    )
    if vma.lock_mode == LOCK_EAGER:
        populate_locked(mm, ar)
    return old_addr


def _place_locked(mm: MemoryManager, vma: Vma, new_bytes: int) -> AddrRange:
    align = alignment_of(new_bytes, private=vma.private, stack_like=vma.grows_down or vma.is_stack)
    start = find_available_locked(mm, "mremap", new_bytes, align_bytes=align)
    return AddrRange.of_length(start, new_bytes)


def _clear_target_locked(
    mm: MemoryManager, old_addr: int, old_bytes: int, new_bytes: int, new_addr: int,
    dropped: Dropped,
) -> AddrRange:  # fmt: skip
    # Make room at new_addr, and let go of the old tail. Both come before the checks that follow,
    # as in Linux (mremap_to).
    if new_addr & PAGE_MASK or new_addr < 0 or new_addr + new_bytes >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "mremap", new_addr, "the new address is no place for it")
    new_ar = AddrRange.of_length(new_addr, new_bytes)
    # An old range of no bytes still needs its vma.
    if new_ar.overlaps(AddrRange.of_length(old_addr, max(old_bytes, PAGE_BYTES))):
        raise MmError(errno.EINVAL, "mremap", new_addr, f"it overlaps the old one, {old_addr:#x}")
    find_available_locked(mm, "mremap", new_bytes, addr=new_addr, fixed=True, replace=True)
    dropped += unmap_locked(mm, new_ar.start, new_ar.end)
    if new_bytes < old_bytes:
        dropped += unmap_locked(mm, old_addr + new_bytes, old_addr + old_bytes)
    return new_ar


def _move_locked(mm: MemoryManager, old_ar: AddrRange, new_ar: AddrRange) -> int:
    # Move a vma, or with an empty old_ar map the same again.
    vma = _one_vma_locked(mm, old_ar.start, old_ar.end)
    used = mm.usage_bytes - old_ar.length_bytes + new_ar.length_bytes
    if used > mm.limits.address_space_bytes:
        raise MmError(
            errno.ENOMEM, "mremap", old_ar.start, f"{used >> 10} KiB exceed the address space"
        )
    new_vma, offset, mappable = vma, old_ar.start + vma.delta, vma.mappable
    if mappable is not None:
        if offset + new_ar.length_bytes >= ADDRESS_LIMIT:
            raise MmError(errno.EINVAL, "mremap", old_ar.start, "offset and length wrap")
        mappable.copy_mapping(mm, old_ar, new_ar, offset, writable=vma.may_write_back)
        new_vma = vma.replaced(delta=offset - new_ar.start)
    if old_ar:
        remove_locked(mm, old_ar.start, old_ar.end)
    insert_locked(mm, new_ar.start, new_ar.end, new_vma)
    if old_ar:
        with mm.active_lock:
            removal = Removal()
            try:
                backing.move_locked(mm, old_ar.start, old_ar.end, new_ar.start, removal)
            finally:
                removal.run(mm)
        # Not before: an invalidation in between would have missed the pmas.
        if mappable is not None:
            mappable.remove_mapping(mm, old_ar, offset, writable=vma.may_write_back)
    if vma.lock_mode == LOCK_EAGER:
        populate_locked(mm, new_ar)
    return new_ar.start
