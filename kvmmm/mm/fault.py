"""The straight line: fault → vma → pma → address space."""

# ruff: noqa: PLR1730 - a call of min() costs more than an if, right after an exit
from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError, GuestFaultError
from kvmmm.hostarch.access import EXECUTE, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm import backing, cow
from kvmmm.mm.allocate import allocate_locked
from kvmmm.mm.pma import Removal

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Pma
    from kvmmm.mm.vma import Vma


def handle_user_fault(  # noqa: C901, PLR0912 - one straight line: each call costs 0.5 us here
    mm: MemoryManager, addr: int, access: int
) -> None:
    """Serve a guest's fault: when this returns, `access` to the page of `addr` can succeed.

    A spurious fault (the page is there already) is harmless. It runs right after an exit, with cold
    caches, where every bytecode costs three times what it does in a loop: hence plain ints, no
    calls that are not needed, and nothing said twice.

    Args:
        mm: The address space.
        addr: Guest address of the access.
        access: What the guest wanted (READ, WRITE, EXECUTE bits).

    Raises:
        GuestFaultError: No vma (`.mapped` false), or it forbids the access; the guest's own fault.
        GuestBusError: Its file has no bytes there: the bus-error kind.
        ArenaExhaustedError: No memory is left to back it, or for a table; once some is free, the
            guest may try again.
        OSError: What a mappable says.

    Source:
        gVisor mm.HandleUserFault.
    """
    counters = mm.counters
    with mm.mapping_lock, mm.active_lock:
        if access & WRITE:
            counters.writes += 1
        elif access & EXECUTE:
            counters.executes += 1
        else:
            counters.reads += 1
        counters.vma_lookups += 1
        if mm.fault_log is not None:
            mm.fault_log.note(addr, access)
        segment = mm.vmas.find(addr)
        if segment is None or access & ~segment[2].effective_perms:
            counters.refused += 1
            raise GuestFaultError(addr, access, mapped=segment is not None)
        removal = None
        found = mm.pmas.find(addr)
        if found is not None and not access & ~found[2].effective_perms:
            counters.pma_hits += 1
        else:
            found, removal = _back_locked(mm, addr, access, segment, found)
        start, end, pma = found
        space = mm.address_space
        if unit_bytes := space.map_unit_bytes:
            unit = addr & -unit_bytes
            if start < unit:
                start = unit
            if unit + unit_bytes < end:
                end = unit + unit_bytes
        fo = start + pma.delta
        if removal is not None:
            removal.settle(mm)
        quickly = space.map_quickly
        if quickly is None or not quickly(start, end - start, pma.file, fo, pma.effective_perms):
            if removal is not None:
                removal.run(mm)
            fr = FileRange(fo, fo + end - start)
            space.map_file(start, pma.file, fr, pma.effective_perms)
        elif removal is not None:
            removal.replaced(start, end)
            removal.run(mm)


def _back_locked(
    mm: MemoryManager, addr: int, access: int, segment: tuple[int, int, Vma],
    found: tuple[int, int, Pma] | None,
) -> tuple[tuple[int, int, Pma], Removal | None]:  # fmt: skip
    # The cold branch: frames are allocated, translated, or copied. The removal, if there is one, is
    # to be run once the new frames are mapped: what they replace is shot down by that.
    page = addr & -PAGE_BYTES
    removal = None
    try:
        # The usual cases, without asking for more reasons than one.
        if found is None and segment[2].mappable is None:
            found = allocate_locked(mm, page, page + PAGE_BYTES, segment, exact=False)
        elif found is not None and found[2].need_cow and access & WRITE:
            removal = Removal()
            cow.break_locked(mm, page, page + PAGE_BYTES, segment, access, removal)
            found = _pma_at(mm, page)
        else:
            _, error = backing.get_pmas_locked(mm, page, page + PAGE_BYTES, access)
            if error is not None:
                raise error
            found = _pma_at(mm, page)
    except OSError as error:
        if removal is not None:
            removal.run(mm)
        mm.counters.refused += 1
        if isinstance(error, GuestBusError):
            # The address, as the guest had it, not the page.
            raise GuestBusError(addr, access) from None
        raise
    mm.counters.pma_insertions += 1
    return found, removal


def _pma_at(mm: MemoryManager, page: int) -> tuple[int, int, Pma]:
    found = mm.pmas.find(page)
    if found is None:
        raise AssertionError(f"no pma at {page:#x}")
    return found


def map_resident(mm: MemoryManager) -> None:
    """Map what copies have backed since the last call.

    A guest may have been given page tables that way, and what a CPU walks must not fault.

    Raises:
        ArenaExhaustedError: No page for a table.

    Source:
        gVisor mm.mapASLocked.
    """
    with mm.mapping_lock, mm.active_lock:
        while mm.unmapped:
            for start, end, pma in list(mm.pmas.segments(*mm.unmapped[-1])):
                if pma.effective_perms:
                    fr = pma.file_range(start, end)
                    mm.address_space.map_file(start, pma.file, fr, pma.effective_perms)
            mm.unmapped.pop()
