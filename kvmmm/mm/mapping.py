"""mmap, munmap, mprotect: the only writers of vmas."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError, RangeError
from kvmmm.hostarch.access import ANY_ACCESS, READ
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import pma as pmas
from kvmmm.mm.vma import Vma

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        mappings: (start, end, perms, name) of each; see `mmap`.

    Raises:
        RangeError: A range is malformed, or overlaps something. Nothing was changed.
    """
    for start, end, perms, _name in mappings:
        _check_range(mm, AddrRange(start, end), perms)
    with mm.mapping_lock:
        new = sorted((start, end) for start, end, _, _ in mappings)
        overlaps = any(a[1] > b[0] for a, b in pairwise(new))
        if overlaps or any(next(mm.vmas.segments(*ar), None) for ar in (new if mm.vmas else ())):
            raise RangeError(new[0][0], new[-1][1], "these mappings overlap, or something is there")
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
            mm.address_space.unmap(ar)
        mm.vmas.mutate(ar.start, ar.end, lambda _s, _e, vma: vma.with_perms(perms))
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
            for start, stop in list(mm.pmas.gaps(addr, end)):
                pmas.insert_locked(mm, start, stop)
            for pma_start, pma_end, pma in list(mm.pmas.segments(addr, end)):
                start = max(pma_start, addr)
                fr = pma.file_range(start, min(pma_end, end))
                mm.address_space.map_file(start, pma.file, fr, found[2].effective_perms)
            addr = end


def _check_range(mm: MemoryManager, ar: AddrRange, perms: int) -> None:
    if not ar or not ar.is_page_aligned:
        raise RangeError(ar.start, ar.end, "a mapping is one or more whole 4 KiB pages")
    if ar.end > mm.max_addr:
        raise RangeError(ar.start, ar.end, f"guest memory ends at {mm.max_addr:#x}")
    if perms & ~ANY_ACCESS:
        raise RangeError(ar.start, ar.end, f"{perms:#x} is no set of access bits")


def _remove_locked(mm: MemoryManager, ar: AddrRange) -> None:
    # Preconditions: mapping_lock is held. Order: translations, then frames, then the vma.
    with mm.active_lock:
        mm.address_space.unmap(ar)
        pmas.remove_locked(mm, ar.start, ar.end)
    mm.vmas.remove(ar.start, ar.end)
