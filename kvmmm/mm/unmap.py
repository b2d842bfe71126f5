"""munmap, and removing for whoever maps over something or gives something back."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import backing
from kvmmm.mm.pma import Removal
from kvmmm.mm.vma import remove_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma


def munmap(mm: MemoryManager, addr: int, length_bytes: int) -> None:
    """Remove what is mapped in a range, and drop its frames; holes are no error.

    Args:
        mm: The address space.
        addr: Guest address, page aligned.
        length_bytes: Rounded up to 4 KiB.

    Raises:
        MmError: EINVAL, `addr` is unaligned, or the range is empty or wraps. Nothing was changed.

    Source:
        gVisor mm.MUnmap.
    """
    if addr & PAGE_MASK or not 0 <= addr < ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "munmap", addr, "the address is not page aligned")
    end = addr + page_up(length_bytes)
    if length_bytes <= 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "munmap", addr, f"{length_bytes} bytes are none or too many")
    with mm.mapping_lock:
        dropped = unmap_locked(mm, addr, end)
    del dropped


def unmap_locked(mm: MemoryManager, start: int, end: int) -> list[tuple[int, int, Vma]]:
    """Remove what is mapped in [start, end): translations, frames, vmas, in that order.

    Returns:
        The vmas that went. Let go of them after mapping_lock: what a mappable does when nobody
        holds it any more is its own business, and may take locks that come before ours.

    Preconditions:
        - mapping_lock is held, active_lock is not.
    """
    if next(mm.vmas.segments(start, end), None) is None:
        return []
    with mm.active_lock:
        removal = Removal()
        try:
            backing.invalidate_locked(mm, start, min(end, mm.max_addr), removal)
        finally:
            removal.run(mm)
    dropped = remove_locked(mm, start, end)
    for piece_start, piece_end, vma in dropped:
        if vma.mappable is not None:
            vma.mappable.remove_mapping(
                mm, AddrRange(piece_start, piece_end), piece_start + vma.delta,
                writable=vma.may_write_back,
            )  # fmt: skip
    return dropped
