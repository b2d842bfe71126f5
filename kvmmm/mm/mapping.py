"""mmap, munmap, mprotect: the only writers of vmas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError, RangeError
from kvmmm.hostarch.access import ANY_ACCESS, READ, effective
from kvmmm.hostarch.addr import PAGE_MASK
from kvmmm.mm import backing
from kvmmm.mm.pma import Removal
from kvmmm.mm.vma import Vma

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.manager import MemoryManager


def mmap(mm: MemoryManager, ar: AddrRange, perms: int, name: str = "") -> None:
    """Map private anonymous memory at exactly `ar`; replaces what was there (MAP_FIXED).

    Nothing is allocated: the first access does that.

    Args:
        mm: The address space.
        ar: Guest addresses, page aligned, not empty, below `max_addr`.
        perms: Access bits; 0 makes a range that nobody may touch.
        name: Shown in maps.

    Raises:
        RangeError: `ar` is unaligned, empty, or ends above `max_addr`. Nothing was changed.
        StateError: Something mapped there must go, and a CPU is running.
    """
    _check_range(mm, ar, perms)
    with mm.mapping_lock:
        _remove_locked(mm, ar)
        mm.vmas.insert(ar.start, ar.end, Vma(perms, name))
        mm.generation += 1


def mmap_all(mm: MemoryManager, mappings: Sequence[tuple[int, int, int, str]]) -> None:
    """Map private anonymous memory at several places at once, where nothing is mapped yet.

    Args:
        mm: The address space.
        mappings: (start, end, perms, name) of each, ascending; see `mmap`.

    Raises:
        RangeError: A range is malformed, or overlaps something. Nothing was changed.
    """
    last_end = 0
    for start, end, perms, _name in mappings:
        if start < last_end:
            raise RangeError(start, end, "mappings must be ascending and disjoint")
        _check_bounds(mm, start, end, perms)
        last_end = end
    with mm.mapping_lock:
        for start, end, _perms, _name in mappings if mm.vmas else ():
            if next(mm.vmas.segments(start, end), None) is not None:
                raise RangeError(start, end, "something is mapped there")
        for start, end, perms, name in mappings:
            mm.vmas.insert(start, end, Vma(perms, name))
        mm.generation += 1


def munmap(mm: MemoryManager, ar: AddrRange) -> None:
    """Remove what is mapped in `ar`, and free its frames; holes are no error.

    Raises:
        RangeError: `ar` is unaligned, empty, or ends above `max_addr`.
        StateError: Something is mapped there, and a CPU is running.
    """
    _check_range(mm, ar, 0)
    with mm.mapping_lock:
        _remove_locked(mm, ar)
        mm.generation += 1


def mprotect(mm: MemoryManager, ar: AddrRange, perms: int) -> None:
    """Change the permissions of `ar`, all of which must be mapped.

    Frames stay; translations are dropped and come back, with the new permissions, by faults.

    Raises:
        RangeError: `ar` is unaligned, empty, or ends above `max_addr`.
        GuestFaultError: Part of it is not mapped (`.addr`). Nothing was changed.
        StateError: Something is mapped there, and a CPU is running.
    """
    _check_range(mm, ar, perms)
    with mm.mapping_lock:
        for start, _end in mm.vmas.gaps(ar.start, ar.end):
            raise GuestFaultError(start, perms, mapped=False)
        with mm.active_lock:
            mm.address_space.unmap([ar])
            mm.pmas.mutate(
                ar.start, ar.end,
                lambda _s, _e, pma: pma.allowing(
                    effective(perms), pma.max_perms, need_cow=pma.need_cow
                ),
            )  # fmt: skip
        mm.vmas.mutate(ar.start, ar.end, lambda _s, _e, vma: vma.replaced(perms=perms))
        mm.generation += 1


def populate(mm: MemoryManager, ar: AddrRange) -> None:
    """Allocate and map all of `ar` at once, as if every page had been read (MAP_POPULATE).

    Raises:
        GuestFaultError: Part of it is not mapped, or not readable; what comes before is populated.
        ArenaExhaustedError: No room; the same.
    """
    _check_range(mm, ar, 0)
    with mm.mapping_lock, mm.active_lock:
        addr = ar.start
        while addr < ar.end:
            found = mm.vmas.find(addr)
            if found is None or not found[2].effective_perms & READ:
                raise GuestFaultError(addr, READ, mapped=found is not None, done=addr - ar.start)
            end = min(found[1], ar.end)
            backed = mm.pmas.find(addr)
            if backed is not None:
                stop, pma = min(backed[1], end), backed[2]
            else:
                gap = mm.pmas.find_gap(addr)
                stop = min(gap[1], end) if gap is not None else end
                pma = backing.insert_locked(mm, addr, stop, found[2])[2]
            fr = pma.file_range(addr, stop)
            mm.address_space.map_file(addr, pma.file, fr, found[2].effective_perms)
            addr = stop


def _check_range(mm: MemoryManager, ar: AddrRange, perms: int) -> None:
    _check_bounds(mm, ar.start, ar.end, perms)


def _check_bounds(mm: MemoryManager, start: int, end: int, perms: int) -> None:
    if (start | end) & PAGE_MASK or not 0 <= start < end:
        raise RangeError(start, end, "a mapping is one or more whole 4 KiB pages")
    if end > mm.max_addr:
        raise RangeError(start, end, f"guest memory ends at {mm.max_addr:#x}")
    if perms & ~ANY_ACCESS:
        raise RangeError(start, end, f"{perms:#x} is no set of access bits")


def _remove_locked(mm: MemoryManager, ar: AddrRange) -> None:
    # Preconditions: mapping_lock is held. Order: translations, then frames, then the vma.
    with mm.active_lock:
        removal = Removal()
        backing.invalidate_locked(mm, ar.start, ar.end, removal)
        removal.run(mm)
    mm.vmas.remove(ar.start, ar.end)
