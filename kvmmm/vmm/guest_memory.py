"""A guest kernel's memory as a whole: where there is none, what is mapped at first, its arena."""

from __future__ import annotations

from functools import lru_cache

from kvmmm.arena import Arena
from kvmmm.errors import SyscallError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.vmm.system_area import IMAGE_NAME, MEMORY_NAME

HOLE = AddrRange(0xFEC0_0000, 1 << 32)
"""Never memory: the APIC pages, and on VMX KVM's private slots."""

_FAMILY = 8
"""How many VMs like the first an arena has room for, that of forks included. Costs nothing."""
_ARENA_MAX_BYTES = 16 << 40


def make_arena(area_bytes: int, memory_bytes: int, asked_bytes: int | None) -> Arena:
    """Return an arena that begins with the system area, and with a place for all of guest memory.

    With the size that was asked for, guest memory may find no such place; without one, the arena is
    as large as the host lets it be.
    """
    both_bytes = area_bytes + memory_bytes
    if asked_bytes is not None:
        has_room = asked_bytes >= both_bytes
        return Arena(
            max(asked_bytes, area_bytes), used_bytes=area_bytes,
            reserved_bytes=memory_bytes if has_room else 0,
        )  # fmt: skip
    capacity = max(min(_FAMILY * both_bytes, _ARENA_MAX_BYTES), both_bytes)
    try:
        return Arena(capacity, used_bytes=area_bytes, reserved_bytes=memory_bytes)
    except SyscallError:
        # A limit on the address space (ulimit -v), or on the size of files (ulimit -f).
        return Arena(both_bytes, used_bytes=area_bytes, reserved_bytes=memory_bytes)


@lru_cache(maxsize=16)
def memory_map_of(
    image_ranges: tuple[tuple[int, int, int], ...], memory_bytes: int
) -> tuple[tuple[int, int, int, str], ...]:
    """Return (start, end, perms, name) of all guest memory: the image, and RAM wherever else.

    Page 0 is nobody's, nor is `HOLE`.
    """
    taken = [*image_ranges, (HOLE.start, HOLE.end, 0)]
    found = []
    addr = PAGE_BYTES
    for start, end, perms in sorted(taken):
        if addr < min(start, memory_bytes):
            found.append((addr, min(start, memory_bytes), READ_WRITE, MEMORY_NAME))
        if start != HOLE.start:
            found.append((start, end, perms, IMAGE_NAME))
        addr = max(addr, end)
    if addr < memory_bytes:
        found.append((addr, memory_bytes, READ_WRITE, MEMORY_NAME))
    return tuple(found)
