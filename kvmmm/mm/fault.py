"""The straight line: fault → vma → pma → address space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import EXECUTE, WRITE
from kvmmm.mm import backing
from kvmmm.mm.vma import check_access_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager


def handle_user_fault(mm: MemoryManager, addr: int, access: int) -> None:
    """Serve a guest's fault: when this returns, `access` to the page of `addr` can succeed.

    A spurious fault (the page is there already) is harmless.

    Args:
        mm: The address space.
        addr: Guest address of the access.
        access: What the guest wanted (READ, WRITE, EXECUTE bits).

    Raises:
        GuestFaultError: No vma (`.mapped` false), or it forbids the access; the guest's own fault.
        ArenaExhaustedError: No memory is left to back it.

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
        try:
            vma_start, vma_end, vma = check_access_locked(mm, addr, access)
            found = mm.pmas.find(addr)
            if found is None:
                start, end, pma = backing.allocate_locked(mm, addr, vma_start, vma_end, vma)
                counters.pma_insertions += 1
            else:
                # A pma may reach over vmas of different permissions: map this vma's part.
                start, end, pma = max(found[0], vma_start), min(found[1], vma_end), found[2]
                counters.pma_hits += 1
        except (GuestFaultError, ArenaExhaustedError):
            counters.refused += 1
            raise
        mm.address_space.map_file(start, pma.file, pma.file_range(start, end), vma.effective_perms)


def map_resident(mm: MemoryManager) -> None:
    """Map what copies have backed since the last call.

    A guest may have been given page tables that way, and what a CPU walks must not fault.

    Source:
        gVisor mm.mapASLocked.
    """
    with mm.mapping_lock, mm.active_lock:
        while mm.unmapped:
            copied_start, copied_end = mm.unmapped.pop()
            for vma_start, vma_end, vma in list(mm.vmas.segments(copied_start, copied_end)):
                if not vma.effective_perms:
                    continue
                for pma_start, pma_end, pma in list(mm.pmas.segments(vma_start, vma_end)):
                    start, end = max(pma_start, vma_start), min(pma_end, vma_end)
                    fr = pma.file_range(start, end)
                    mm.address_space.map_file(start, pma.file, fr, vma.effective_perms)
