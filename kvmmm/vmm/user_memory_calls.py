"""mmap, munmap, mprotect, mremap, brk, madvise: from Linux's arguments to the mm's, and no further.

Each takes a process and six unsigned 64-bit arguments, and returns the call's answer; an OSError's
errno becomes -errno above us. Arguments are checked in Linux's order as far as the mm does not do
that itself, so that a call with two mistakes fails with the same errno.

Source: Linux mm/mmap.c, mm/mprotect.c, mm/mremap.c, mm/madvise.c; arch/x86/kernel/sys_x86_64.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, page_down, page_up
from kvmmm.mm.vma import LOCK_EAGER

if TYPE_CHECKING:
    from kvmmm.memmap.file import Mappable
    from kvmmm.vmm.user_process import Process

    Args = tuple[int, int, int, int, int, int]

PROT_ACCESS = 0x7  # PROT_READ, PROT_WRITE, PROT_EXEC: our access bits have the same values
PROT_SEM = 0x8
PROT_GROWSDOWN, PROT_GROWSUP = 0x0100_0000, 0x0200_0000

MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 0x1, 0x2, 0x3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_32BIT = 0x10, 0x20, 0x40
MAP_GROWSDOWN, MAP_LOCKED, MAP_POPULATE, MAP_STACK = 0x100, 0x2000, 0x8000, 0x20000
MAP_HUGETLB, MAP_FIXED_NOREPLACE = 0x40000, 0x10_0000
# MAP_DENYWRITE, MAP_EXECUTABLE, MAP_NORESERVE, MAP_NONBLOCK: taken, without effect, as on Linux.
_LEGACY_MAP = (
    MAP_TYPE | MAP_FIXED | MAP_ANONYMOUS | MAP_32BIT | MAP_GROWSDOWN | 0x800 | 0x1000 | MAP_LOCKED
    | 0x4000 | MAP_POPULATE | 0x10000 | MAP_STACK | MAP_HUGETLB
)  # fmt: skip
"""LEGACY_MAP_MASK of <linux/mman.h>, and what mmap_flags adds: what MAP_SHARED_VALIDATE knows."""

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


def mmap(process: Process, args: Args) -> int:
    """Arguments: addr, length, prot, flags, fd, offset."""
    addr, length, prot, flags, fd, offset = args
    if offset & PAGE_MASK:
        raise MmError(errno.EINVAL, "mmap", addr, f"the offset {offset:#x} is not page aligned")
    mappable = None if flags & MAP_ANONYMOUS else _file(process, fd)
    fixed = bool(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE))
    kind = flags & MAP_TYPE
    if length and page_up(length) < ADDRESS_LIMIT:
        # With a length that is none, that is what mmap says first.
        _check_kind(addr, kind, flags, mappable)
        if flags & MAP_HUGETLB:
            raise MmError(errno.ENOMEM, "mmap", addr, "there are no huge pages")
    if not fixed:
        addr = page_down(addr)
        if 0 < addr < process.mm.layout.min_addr:
            addr = process.mm.layout.min_addr
    return process.mm.mmap(
        length, prot & PROT_ACCESS, addr=addr, fixed=fixed,
        replace=fixed and not flags & MAP_FIXED_NOREPLACE,
        no_replace=bool(flags & MAP_FIXED_NOREPLACE),
        private=kind == MAP_PRIVATE, mappable=mappable, offset=offset,
        grows_down=bool(flags & MAP_GROWSDOWN), stack=bool(flags & MAP_STACK),
        low_32bit=bool(flags & MAP_32BIT), populate=bool(flags & MAP_POPULATE),
        lock_mode=LOCK_EAGER if flags & MAP_LOCKED else None,
    ).start  # fmt: skip


def _file(process: Process, fd: int) -> Mappable:
    number = fd & 0xFFFF_FFFF
    mappable = process.files.get(number)
    if mappable is not None:
        return mappable
    if number in process.streams:
        raise MmError(errno.ENODEV, "mmap", 0, f"descriptor {number} is the console")
    raise MmError(errno.EBADF, "mmap", 0, f"there is no descriptor {number}")


def _check_kind(addr: int, kind: int, flags: int, mappable: Mappable | None) -> None:
    if kind not in (MAP_SHARED, MAP_PRIVATE) and (mappable is None or kind != MAP_SHARED_VALIDATE):
        raise MmError(errno.EINVAL, "mmap", addr, "neither MAP_SHARED nor MAP_PRIVATE")
    if kind == MAP_SHARED_VALIDATE and flags & ~_LEGACY_MAP:
        raise MmError(errno.EOPNOTSUPP, "mmap", addr, f"flags {flags:#x} has an unknown bit")
    if flags & MAP_GROWSDOWN and kind != MAP_PRIVATE:
        raise MmError(errno.EINVAL, "mmap", addr, "what is shared cannot grow down")


def munmap(process: Process, args: Args) -> int:
    """Arguments: addr, length."""
    addr, length = args[:2]
    max_addr = process.mm.max_addr
    if addr > max_addr or length > max_addr - addr:
        raise MmError(errno.EINVAL, "munmap", addr, f"a program's addresses end at {max_addr:#x}")
    process.mm.munmap(addr, length)
    return 0


def mprotect(process: Process, args: Args) -> int:
    """Arguments: addr, length, prot."""
    addr, length, prot = args[:3]
    grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP)
    if addr & PAGE_MASK or grows == PROT_GROWSDOWN | PROT_GROWSUP:
        raise MmError(errno.EINVAL, "mprotect", addr, "not page aligned, or growing both ways")
    if not length:
        return 0
    if addr + page_up(length) >= ADDRESS_LIMIT:
        raise MmError(errno.ENOMEM, "mprotect", addr, "the range wraps around")
    if prot & ~(PROT_ACCESS | PROT_SEM | grows) or grows & PROT_GROWSUP:
        raise MmError(errno.EINVAL, "mprotect", addr, f"prot {prot:#x} has an unknown bit")
    process.mm.mprotect(addr, length, prot & PROT_ACCESS, grows_down=bool(grows))
    return 0


def mremap(process: Process, args: Args) -> int:
    """Arguments: old_addr, old_size, new_size, flags, new_addr."""
    old_addr, old_bytes, new_bytes, flags, new_addr = args[:5]
    if flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED) or flags & 3 == MREMAP_FIXED:
        raise MmError(errno.EINVAL, "mremap", old_addr, f"flags {flags:#x} cannot be served")
    return process.mm.mremap(
        old_addr, old_bytes, new_bytes, may_move=bool(flags & MREMAP_MAYMOVE),
        new_addr=new_addr if flags & MREMAP_FIXED else None,
    )  # fmt: skip


def brk(process: Process, args: Args) -> int:
    """Arguments: addr. Answers with the end of the heap as it is then, whatever came of it."""
    return process.mm.brk(args[0])


def madvise(process: Process, args: Args) -> int:
    """Arguments: addr, length, advice."""
    process.mm.madvise(args[0], args[1], args[2] & 0xFFFF_FFFF)
    return 0


NUMBERS = {9: mmap, 10: mprotect, 11: munmap, 12: brk, 25: mremap, 28: madvise}
"""Who serves which number. Source: arch/x86/entry/syscalls/syscall_64.tbl."""
