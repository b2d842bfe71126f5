"""prctl(PR_SET_VMA_ANON_NAME): names for anonymous memory, to be seen in maps."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_up
from kvmmm.mm.vma import change_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma

MAX_NAME_BYTES = 79
"""Longest name (Linux's ANON_VMA_NAME_MAX_LEN, less the terminator)."""

_FORBIDDEN = frozenset("\\`$[]")


def set_anon_name(mm: MemoryManager, addr: int, length_bytes: int, name: str | None) -> None:
    r"""Name anonymous memory: `[anon:NAME]` in maps, `[anon_shmem:NAME]` if it is shared.

    Neighbours of different names stay different vmas. The name takes the place of one that it was
    mapped with, such as `[heap]`.

    Args:
        mm: The address space.
        addr: Guest address, 4 KiB aligned.
        length_bytes: Rounded up to 4 KiB; 0 does nothing.
        name: Printable ASCII without any of \ ` $ [ ]; None takes a name given here away.

    Raises:
        MmError: EINVAL, the name or the range is malformed: nothing was changed. EBADF, a mapping
            of a file: what comes before is named. ENOMEM, a hole: the rest is named.

    Source:
        gVisor mm.SetVMAAnonName; Linux mm/madvise.c, madvise_set_anon_name.
    """
    if name is not None and not _is_name(name):
        raise MmError(errno.EINVAL, "prctl", addr, f"{name!r} is no name for memory")
    end = addr + page_up(length_bytes)
    if addr & PAGE_MASK or addr < 0 or length_bytes < 0 or end >= ADDRESS_LIMIT:
        raise MmError(errno.EINVAL, "prctl", addr, f"{length_bytes:#x} bytes from there")
    with mm.mapping_lock:
        at, hole = addr, None
        for start, stop, vma in list(mm.vmas.segments(addr, end)):
            if at < start and hole is None:
                hole = at
            at = max(addr, start)
            change_locked(mm, at, min(end, stop), name=_full_name(vma, at, name))
            at = stop
        if at < end and hole is None:
            hole = at
    if hole is not None:
        raise MmError(errno.ENOMEM, "prctl", hole, "nothing is mapped there")


def _is_name(name: str) -> bool:
    return len(name) <= MAX_NAME_BYTES and all(
        "\x1f" < char < "\x7f" and char not in _FORBIDDEN for char in name
    )


def _full_name(vma: Vma, addr: int, name: str | None) -> str:
    kind = "anon"
    if vma.mappable is not None:
        from kvmmm.memmap.shared_memory import SharedMemory

        if not isinstance(vma.mappable, SharedMemory):
            raise MmError(errno.EBADF, "prctl", addr, "it is a mapping of a file")
        kind = "anon_shmem"
    if name is not None:
        return f"[{kind}:{name}]"
    if vma.name.startswith(f"[{kind}:"):
        return vma.mappable.name if vma.mappable is not None else ""
    return vma.name
