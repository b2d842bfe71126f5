"""What backs addresses: made where it is missing, taken away, moved, brought under other rules.

A pma that is missing is allocated (anonymous memory) or translated (a mappable's). One that is
there and not good enough is translated again, or copied on write.

    get_pmas_locked ──► allocate | translate | cow ──► arena, mappable
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestBusError, GuestFaultError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm import cow
from kvmmm.mm.allocate import allocate_locked
from kvmmm.mm.pma import Removal
from kvmmm.mm.translate import translate_again_locked, translate_locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Pma
    from kvmmm.mm.vma import Vma


def get_pmas_locked(
    mm: MemoryManager, start: int, end: int, access: int, *, ignore_permissions: bool = False,
    break_cow: bool = False, exact: bool = False,
) -> tuple[int, OSError | None]:  # fmt: skip
    """Have pmas over [start, end) that are good for `access`.

    Nothing that needs a copy on write is copied for reading. What was unmapped on the way is
    unmapped, once, and dropped after that, when this returns.

    Args:
        mm: The address space.
        start: Page aligned.
        end: Page aligned.
        access: What is wanted of every address; more may be granted.
        ignore_permissions: It is a debugger's: `max_perms` count.
        break_cow: Whoever asks keeps the frames: copy even for reading.
        exact: Allocate and translate nothing around [start, end).

    Returns:
        How far the pmas are good, from `start` on; and what ends them, None at `end`. The error is
        a `GuestBusError` where a file has no bytes, an `ArenaExhaustedError`, or what the mappable
        said.

    Preconditions:
        - mapping_lock and active_lock are held.
        - The vmas of all of [start, end) allow `access` (`vma.usable_end_locked`).

    Source:
        gVisor mm.getPMAsLocked.
    """
    removal = Removal()
    addr = start
    try:
        while addr < end:
            found = mm.pmas.find(addr)
            if found is None:
                _insert_locked(mm, addr, end, access, exact=exact)
            elif break_cow and found[2].need_cow:
                cow.break_locked(mm, addr, end, _vma_at(mm, addr), access, removal)
            elif access & ~(found[2].max_perms if ignore_permissions else found[2].effective_perms):
                _allow_locked(mm, addr, end, found[2], access, removal)
            else:
                addr = found[1]
    except OSError as error:
        # Tracebacks would keep this frame, and so all callers', until the collector comes.
        error.__context__ = None
        return addr, error.with_traceback(None)
    finally:
        removal.run(mm)
    return end, None


def _vma_at(mm: MemoryManager, addr: int) -> tuple[int, int, Vma]:
    found = mm.vmas.find(addr)
    if found is None:
        raise AssertionError(f"no vma at {addr:#x}: the caller has verified that there is one")
    return found


def _insert_locked(mm: MemoryManager, addr: int, end: int, access: int, *, exact: bool) -> None:
    segment = _vma_at(mm, addr)
    if segment[2].mappable is None:
        allocate_locked(mm, addr, end, segment, exact=exact)
    else:
        translate_locked(mm, addr, end, segment, access, exact=exact)
    if mm.pmas.find(addr) is None:
        raise AssertionError(f"a translation without what was asked for, {addr:#x}")


def _allow_locked(
    mm: MemoryManager, addr: int, end: int, pma: Pma, access: int, removal: Removal
) -> None:
    # A pma whose vma allows `access` and that does not: in each case for one reason less.
    segment = _vma_at(mm, addr)
    wanted = access & ~WRITE if pma.need_cow else access
    if not pma.private and wanted & ~pma.translate_perms:
        translate_again_locked(mm, addr, end, segment, access, removal)
        again = mm.pmas.find(addr)
        if again is not None and not wanted & ~again[2].translate_perms:
            return
    elif access & WRITE and pma.need_cow:
        cow.break_locked(mm, addr, end, segment, access, removal)
        return
    raise GuestFaultError(addr, access, mapped=True)


def invalidate_locked(
    mm: MemoryManager, start: int, end: int, removal: Removal, *, private: bool = True
) -> None:
    """Take the pmas out of [start, end); `removal` unmaps what they covered and drops them.

    Args:
        mm: The address space.
        start: Page aligned.
        end: Page aligned.
        removal: To be run before active_lock is released.
        private: Also those that hold this mm's own bytes; otherwise only frames of files.

    Preconditions:
        - active_lock is held.

    Source:
        gVisor mm.invalidateLocked.
    """
    if private:
        gone = mm.pmas.remove(start, end)
    else:
        gone = []
        for pma_start, pma_end, pma in list(mm.pmas.segments(start, end)):
            if not pma.private:
                gone += mm.pmas.remove(max(start, pma_start), min(end, pma_end))
    if not gone:
        # What has no pma has no translation.
        return
    removal.unmap(gone[0][0], gone[-1][1])
    for pma_start, pma_end, pma in gone:
        removal.drop(pma_start, pma_end, pma)


def move_locked(
    mm: MemoryManager, old_start: int, old_end: int, new_start: int, removal: Removal
) -> None:
    """Move the pmas of [old_start, old_end) to `new_start`; `removal` unmaps where they were.

    References and bytes go with them.

    Preconditions:
        - active_lock is held; all are page aligned; nothing of the new range has a pma.

    Source:
        gVisor mm.movePMAsLocked.
    """
    moved = mm.pmas.remove(old_start, old_end)
    if not moved:
        return
    removal.unmap(moved[0][0], moved[-1][1])
    by = new_start - old_start
    for start, end, pma in moved:
        mm.pmas.insert(start + by, end + by, pma.moved(by))


def protect_locked(mm: MemoryManager, start: int, end: int, removal: Removal) -> None:
    """Bring the pmas of [start, end) under the rules that their vmas have now.

    Only what loses a permission is unmapped; what gains one is mapped by the next fault.

    Preconditions:
        - mapping_lock and active_lock are held; the vmas have been changed.

    Source:
        gVisor mm.MProtect, the part about pmas.
    """
    for vma_start, vma_end, vma in list(mm.vmas.segments(max(start, 0), end)):
        mm.pmas.mutate(max(start, vma_start), min(end, vma_end), _under_rules_of(vma, removal))
    # Where vmas differ no longer, pmas may not either.
    mm.pmas.merge_range(start, end)


def _under_rules_of(vma: Vma, removal: Removal) -> Callable[[int, int, Pma], Pma]:
    perms, max_perms = vma.effective_perms, vma.effective_max_perms

    def change(start: int, end: int, pma: Pma) -> Pma:
        new = pma.allowing(perms, max_perms, need_cow=pma.need_cow)
        if pma.effective_perms & ~new.effective_perms:
            removal.unmap(start, end)
        return new

    return change


def populate_locked(
    mm: MemoryManager, start: int, end: int, *, ignore_errors: bool = False
) -> None:
    """Back and map [start, end) at once, as if every page had been read (MAP_POPULATE, mlock).

    Nothing around it is backed.

    Args:
        mm: The address space.
        start: Page aligned.
        end: Page aligned.
        ignore_errors: Do what can be done; what cannot, the guest will find out if it matters.

    Preconditions:
        - mapping_lock and active_lock are held.

    Raises:
        GuestFaultError: Part of it is not mapped, or forbids every access; what comes before is
            populated. `GuestBusError`: or its file ends.
        ArenaExhaustedError: No room; the same.
        OSError: What a mappable says.

    Source:
        gVisor mm.populateVMA; Linux mm/gup.c, populate_vma_page_range.
    """
    addr = start
    while addr < end:
        found = mm.vmas.lower_bound(addr)
        hole_end = end if found is None else min(found[0], end)
        if addr < hole_end:
            if not ignore_errors:
                raise GuestFaultError(addr, READ, mapped=False, done=addr - start)
            addr = hole_end
            continue
        assert found is not None  # noqa: S101 - for mypy: the hole would reach the end
        stop = min(found[1], end)
        if found[2].effective_perms:
            usable, error = get_pmas_locked(mm, addr, stop, READ, exact=True)
            try:
                map_pmas_locked(mm, addr, usable)
            except ArenaExhaustedError as e:
                error = e
            if error is not None and not ignore_errors:
                raise _after(error, usable - start)
        elif not ignore_errors:
            raise GuestFaultError(addr, READ, mapped=True, done=addr - start)
        addr = stop


def _after(error: OSError, done: int) -> OSError:
    if isinstance(error, GuestBusError):
        return GuestBusError(error.addr, error.access, done=done)
    return error


def map_pmas_locked(mm: MemoryManager, start: int, end: int) -> None:
    """Map what pmas back of [start, end).

    Preconditions:
        - active_lock is held; [start, end) is page aligned.

    Raises:
        ArenaExhaustedError: No page for a table; some of it may be mapped.

    Source:
        gVisor mm.mapASLocked.
    """
    for pma_start, pma_end, pma in list(mm.pmas.segments(start, end)):
        # Never without permissions: that is no mapping.
        if pma.effective_perms:
            at = max(start, pma_start)
            fr = FileRange(at + pma.delta, min(end, pma_end) + pma.delta)
            mm.address_space.map_file(at, pma.file, fr, pma.effective_perms)
