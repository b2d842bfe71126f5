"""Copies through the address space (ASIO): what happens where it has no translation.

    walk     the guest's own page tables say where a page is; nothing of the host is needed
    mirror   a host window in which guest memory lies as in the guest; the host's MMU translates

Both are caches of the pmas, as the address space is. So a miss is served as a guest's fault is, for
all that remains of the copy at once.

Source: gVisor pkg/sentry/mm/io.go, handleASIOFault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import AddressSpaceIOUnavailableError, GuestBusError, GuestFaultError
from kvmmm.hostarch.addr import page_down, page_up
from kvmmm.mm import backing
from kvmmm.mm.vma import usable_end_locked

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.platform.mirror import Mirror


def handle_asio_fault(
    mm: MemoryManager, addr: int, ioar: AddrRange, access: int, *, mirrored: bool = False
) -> None:
    """Have the address space translate `addr`, and what it can of the rest of `ioar`.

    Inability to map the first page is an error; for a later one nothing is said: the copy will come
    that far and ask again.

    Args:
        mm: The address space.
        addr: Guest address that has no translation, inside `ioar`.
        ioar: What is copied.
        access: What for.
        mirrored: In the mirror; otherwise in the guest's page tables.

    Raises:
        GuestFaultError: No access to `addr` (`.addr`); `GuestBusError`: its file ends.
        AddressSpaceIOUnavailableError: There is memory, but the address space cannot be given it,
            or a copy could not reach it there.
        ArenaExhaustedError: No memory is left to back it, or for a table.
        OSError: What a mappable says.
    """
    start, stop = page_down(addr), page_up(ioar.end)
    with mm.mapping_lock:
        end, refusal = usable_end_locked(mm, addr, stop, access)
        if end <= addr:
            mapped = refusal is not None and refusal.mapped
            raise GuestFaultError(addr, access, mapped=mapped)
        with mm.active_lock:
            usable, error = backing.get_pmas_locked(mm, start, page_up(end), access)
            if usable <= addr:
                try:
                    raise error_at(error, addr, access)
                finally:
                    del error  # or it would keep all callers' frames until the collector comes
            if mirrored:
                _mirror_locked(mm, start, usable)
            else:
                _map_locked(mm, start, usable)


def mirror_resident(mm: MemoryManager, at: int, end: int, access: int) -> bool:
    """Put the one pma that a copy needs into the mirror: the usual miss, in few steps.

    It comes after a copy, which has had the caches for itself: every line costs several times what
    it does in a loop.

    Args:
        mm: The address space.
        at: Guest address that is not resident.
        end: Where the copy ends.
        access: What it is for.

    Returns:
        False: it takes more than one pma that is there and allows it. Nothing was done.

    Raises:
        AddressSpaceIOUnavailableError: As for `handle_asio_fault`.
    """
    with mm.active_lock:
        mirror, found = mm.mirror, mm.pmas.find(at)
        if mirror is None or found is None or found[1] < end:
            return False
        start, stop, pma = found
        arena, perms = mm.arena, pma.effective_perms
        if pma.file is not arena or access & ~perms:
            return False
        mirror.map_run(start, stop, arena.fd, start + pma.delta, perms & 3, (at, end))
        return True


def error_at(error: OSError | None, addr: int, access: int) -> OSError:
    """Return what refused a page as the caller asked: not the page, the address.

    Args:
        error: What ended `backing.get_pmas_locked` or `usable_end_locked`; None counts as a hole.
        addr: Guest address, in the page that was refused.
        access: What it was for.
    """
    if isinstance(error, GuestBusError):
        return GuestBusError(addr, access)
    if error is None or isinstance(error, GuestFaultError):
        return GuestFaultError(addr, access, mapped=error is not None and error.mapped)
    error.add_note(f"at guest address {addr:#x}")
    return error


def _map_locked(mm: MemoryManager, start: int, end: int) -> None:
    found = mm.pmas.find(start)
    if found is None or found[2].file is not mm.arena:
        # A walk leads to frames of the arena only: others may be cut short.
        raise AddressSpaceIOUnavailableError
    # As a fault would: the aligned units around, or whole pmas, as far as these reach.
    last = mm.pmas.find(end - 1)
    low, high = found[0], end if last is None else last[1]
    if unit_bytes := mm.address_space.map_unit_bytes:
        low = max(low, start & -unit_bytes)
        high = min(high, end + unit_bytes - 1 & -unit_bytes)
    backing.map_pmas_locked(mm, low, high)


def _mirror_locked(mm: MemoryManager, start: int, end: int) -> None:
    # Whole runs: a mapping costs the same for one page and for a thousand.
    mirror = mirror_of(mm)
    first: tuple[int, int, int, int, int, tuple[int, int]] | None = None
    for pma_start, pma_end, pma in list(mm.pmas.segments(start, end)):
        perms = pma.effective_perms & 3
        if pma.file is not mm.arena or not perms:
            break
        wanted = max(start, pma_start), min(end, pma_end)
        run = pma_start, pma_end, mm.arena.fd, pma_start + pma.delta, perms, wanted
        try:
            mirror.map_run(*run)
            if first is None:
                first = run
            elif mirror.find(start, 1, first[4]) is None:
                # Room was made for it by what the copy is waiting for: that comes first.
                mirror.map_run(*first)
                break
        except AddressSpaceIOUnavailableError:
            break
    if first is None or mirror.find(start, 1, first[4]) is None:
        raise AddressSpaceIOUnavailableError


def mirror_of(mm: MemoryManager) -> Mirror:
    """Return the mirror of an mm, reserved at first use.

    Preconditions:
        - active_lock is held.
    """
    mirror: Mirror | None = mm.mirror
    if mirror is None:
        from kvmmm.platform.mirror import Mirror

        mirror = mm.mirror = Mirror(mm.max_addr, mm.drain, budget_vmas=mm.policy.mirror_vmas)
    return mirror


def promote(mm: MemoryManager, addr: int, n_bytes: int, access: int) -> None:
    """Put what is copied often into the mirror, if it is worth a mapping there.

    Called by CopyCore after a copy, when the policy uses the mirror. The copy is done: so nothing
    is waited for, and a Reader, which cannot have the lock, is not told.
    """
    least_bytes = mm.policy.mirror_min_run_pages << 12
    if not mm.active_lock.acquire(False):
        return
    try:
        found = mm.pmas.find(addr)
        if found is None or found[1] - found[0] < least_bytes or access & ~found[2].effective_perms:
            return
        _mirror_locked(mm, page_down(addr), min(page_up(addr + n_bytes), found[1]))
    except AddressSpaceIOUnavailableError:
        return
    finally:
        mm.active_lock.release()
