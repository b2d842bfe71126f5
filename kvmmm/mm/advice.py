"""madvise and mincore."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_BYTES, PAGE_MASK, page_up
from kvmmm.mm import backing
from kvmmm.mm.pma import Removal
from kvmmm.mm.vma import LOCK_NONE, change_locked, span_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_FREE = 8
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MADV_WIPEONFORK = 18
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_HWPOISON = 100

_WITHOUT_EFFECT = {
    MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_MERGEABLE, MADV_UNMERGEABLE,
    MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP,
}  # fmt: skip


def madvise(mm: MemoryManager, addr: int, length_bytes: int, advice: int) -> None:
    """Say how a range will be used.

    MADV_DONTNEED forgets what is there: the next access finds zeros in private anonymous memory,
    and what the file holds in a mapping of one. MADV_DONTFORK and MADV_DOFORK say whether a child
    gets it. Hints that cost nothing to ignore are ignored; of the rest only an error is said,
    because whoever gives them relies on the effect.

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB; 0 does nothing.
        advice: One of the MADV_ constants of `kvmmm.mm.advice`, which are Linux's.

    Raises:
        MmError: EINVAL, the range is malformed or the advice unknown; ENOSYS and EPERM for
            MADV_REMOVE and MADV_HWPOISON: nothing was changed. EINVAL, MADV_DONTNEED of locked
            memory: what comes before was forgotten. ENOMEM, a hole: the rest was done.

    Source:
        gVisor mm.Decommit, mm.SetDontFork; madvise in syscalls/linux/sys_mmap.go.
    """
    if addr & PAGE_MASK or addr < 0:
        raise MmError(errno.EINVAL, "madvise", addr, "the address is not page aligned")
    if length_bytes == 0:
        return
    end = addr + page_up(length_bytes)
    if length_bytes < 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "madvise", addr, f"{length_bytes:#x} bytes are too many")
    if advice == MADV_DONTNEED:
        _forget(mm, addr, end)
    elif advice in {MADV_DONTFORK, MADV_DOFORK}:
        with mm.mapping_lock:
            change_locked(mm, addr, end, dontfork=advice == MADV_DONTFORK)
            _require_no_hole_locked(mm, "madvise", addr, end)
    elif advice == MADV_REMOVE:
        raise MmError(errno.ENOSYS, "madvise", addr, "no holes are made in files")
    elif advice == MADV_HWPOISON:
        raise MmError(errno.EPERM, "madvise", addr, "no page is poisoned")
    elif advice not in _WITHOUT_EFFECT:
        raise MmError(errno.EINVAL, "madvise", addr, f"{advice} is no advice that is known")


def _forget(mm: MemoryManager, start: int, end: int) -> None:
    with mm.mapping_lock:
        with mm.active_lock:
            removal = Removal()
            try:
                for vma_start, vma_end, vma in mm.vmas.segments(start, end):
                    if vma.lock_mode != LOCK_NONE:
                        raise MmError(errno.EINVAL, "madvise", vma_start, "it is locked")
                    backing.invalidate_locked(mm, max(start, vma_start), min(end, vma_end), removal)
            finally:
                removal.run(mm)
        _require_no_hole_locked(mm, "madvise", start, end)


def _require_no_hole_locked(mm: MemoryManager, operation: str, start: int, end: int) -> None:
    if span_locked(mm, start, end) != end - start:
        raise MmError(errno.ENOMEM, operation, start, "part of it is not mapped")


def mincore(mm: MemoryManager, addr: int, length_bytes: int) -> bytes:
    """Return a byte for each page of a range: 1, it is resident.

    Every mapped page counts as resident: whether the host has it in memory is nobody's business.

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB.

    Raises:
        MmError: EINVAL, `addr` is unaligned; ENOMEM, the range wraps, or part is not mapped.

    Source:
        gVisor syscalls/linux Mincore.
    """
    if addr & PAGE_MASK or addr < 0:
        raise MmError(errno.EINVAL, "mincore", addr, "the address is not page aligned")
    length = page_up(length_bytes)
    if length_bytes < 0 or addr + length >= ADDRESS_LIMIT:
        raise MmError(errno.ENOMEM, "mincore", addr, f"{length_bytes:#x} bytes are too many")
    with mm.mapping_lock:
        _require_no_hole_locked(mm, "mincore", addr, addr + length)
    return b"\1" * (length // PAGE_BYTES)
