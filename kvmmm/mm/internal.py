"""Internal mappings: guest memory as blocks of host memory, for one call of a function.

    ranges ──► pmas: all there, all allowed? ──────────────────────────► blocks ──► f
                 │ no                                                      ▲
                 └► vmas: how far? ──► pmas: made, copied on write ────────┘

The function runs without any lock, inside the read section: whoever takes memory away waits for it.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError, GuestFaultError
from kvmmm.hostarch.access import WRITE
from kvmmm.hostarch.addr import page_down, page_up
from kvmmm.hostarch.ranges_seq import AddrRangeSeq, truncated_addr_range_seq
from kvmmm.mm import backing, io
from kvmmm.mm.vma import usable_end_locked
from kvmmm.safemem.block import Block, BlockFaultError, BlockSeq
from kvmmm.safemem.loan import Loan
from kvmmm.safemem.stream import checked_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.manager import MemoryManager

    Move = Callable[[BlockSeq], int]


def with_internal_mappings(
    mm: MemoryManager, ar: AddrRange, access: int, f: Move, *, ignore_permissions: bool = False
) -> int:
    """Call `f` once with the host memory behind `ar`, or behind as much of it as can be accessed.

    Args:
        mm: The address space.
        ar: Guest addresses.
        access: What `f` does; writing breaks a copy on write first.
        f: Moves bytes, from the beginning on, and returns how many. It may block, but must not call
            operations of `mm`, nor keep what it is given.
        ignore_permissions: Access whatever could ever be allowed (`max_perms`), as a debugger does.

    Returns:
        What `f` did: all of `ar`, or fewer bytes because it wanted no more.

    Raises:
        GuestFaultError: `.addr` cannot be accessed; `f` has moved the `.done` bytes before it, and
            was not called where that is 0. `GuestBusError`: because its file ends, or was cut short
            while `f` ran.
        ArenaExhaustedError: No memory is left to back it.
        OSError: What a mappable says.
        StateError: `f` has kept a view of the memory; or this was called from inside an `f`.
        TypeError, ValueError: `f` returned what cannot be.
        Exception: Whatever else `f` raises.

    Source:
        gVisor mm.withInternalMappings. Departure: where `f` ends early without an error, so does
        this, although what comes after could not have been accessed.
    """
    return with_vec_internal_mappings(
        mm, AddrRangeSeq((ar,)), access, f, ignore_permissions=ignore_permissions
    )


def with_vec_internal_mappings(
    mm: MemoryManager, ars: AddrRangeSeq, access: int, f: Move, *, ignore_permissions: bool = False
) -> int:
    """Call `f` once with the host memory behind `ars`, one range after the other.

    Everything as in `with_internal_mappings`. Ranges without bytes may lie anywhere. Without bytes
    at all `f` is not called.

    Source: gVisor mm.withVecInternalMappings.
    """
    if not ars.n_bytes:
        return 0
    usable, error, token = ars, None, None
    try:
        with mm.active_lock:
            blocks = _blocks_locked(mm, ars, access, ignore_permissions=ignore_permissions)
            if blocks is not None:
                token = mm.enter_copy()
        if blocks is None:
            with mm.mapping_lock:
                usable, error = _allowed_locked(
                    mm, ars, access, ignore_permissions=ignore_permissions
                )
                with mm.active_lock:
                    usable, cause = _back_locked(
                        mm, usable, access, ignore_permissions=ignore_permissions
                    )
                    error = cause or error
                    if not usable.n_bytes and error is not None:
                        raise error
                    blocks = _blocks_locked(
                        mm, usable, access, ignore_permissions=ignore_permissions
                    )
                    if blocks is None:
                        raise AssertionError(f"{usable} is not backed although it has been")
                    token = mm.enter_copy()
        done = _call(f, blocks, usable, access)
    finally:
        if token is not None:
            mm.leave_copy(token)
    if error is not None and done == usable.n_bytes:
        raise error
    return done


def _call(f: Move, blocks: list[Block], ars: AddrRangeSeq, access: int) -> int:
    loan = Loan(writable=bool(access & WRITE))
    try:
        done = checked_count(f(BlockSeq(blocks, loan)), ars.n_bytes, f)
    except BlockFaultError as error:
        loan.end(quietly=True)
        if error.loan is not loan:
            raise
        raise _at(error, ars, access) from error
    except BaseException:
        loan.end(quietly=True)
        raise
    loan.end()
    return done


def _at(error: BlockFaultError, ars: AddrRangeSeq, access: int) -> GuestFaultError:
    done = error.position
    rest = ars.drop_first(done)
    while not rest.head:
        rest = rest.tail
    addr = rest.head.start
    if error.signal == signal.SIGBUS:
        return GuestBusError(addr, access, done=done)
    return GuestFaultError(addr, access, mapped=True, done=done)


def _blocks_locked(
    mm: MemoryManager, ars: AddrRangeSeq, access: int, *, ignore_permissions: bool
) -> list[Block] | None:
    # Where the bytes are, if pmas are there for all of them, and allow it. gVisor
    # existingVecPMAsLocked. active_lock is held.
    find = mm.pmas.find
    blocks = []
    for ar in ars:
        addr, end = ar.start, ar.end
        while addr < end:
            found = find(addr)
            if found is None:
                return None
            _, stop, pma = found
            if access & ~(pma.max_perms if ignore_permissions else pma.effective_perms):
                return None
            stop = min(stop, end)
            file = pma.file
            hva = file.hva + addr + pma.delta
            blocks.append(Block(hva, stop - addr, may_fault=file.may_fault))
            addr = stop
    return blocks


def _allowed_locked(
    mm: MemoryManager, ars: AddrRangeSeq, access: int, *, ignore_permissions: bool
) -> tuple[AddrRangeSeq, OSError | None]:
    # How far the vmas allow it, and what ends that. gVisor getVecVMAsLocked. mapping_lock is held.
    rest = ars
    while not rest.is_empty:
        ar = rest.head
        if ar:
            end, refusal = usable_end_locked(
                mm, ar.start, ar.end, access, ignore_permissions=ignore_permissions
            )
            if refusal is not None:
                usable = truncated_addr_range_seq(ars, rest, end)
                return usable, GuestFaultError(
                    end, access, mapped=refusal.mapped, done=usable.n_bytes
                )
        rest = rest.tail
    return ars, None


def _back_locked(
    mm: MemoryManager, ars: AddrRangeSeq, access: int, *, ignore_permissions: bool
) -> tuple[AddrRangeSeq, OSError | None]:
    # How far pmas are there, once those that can be made are, and what ends that. gVisor
    # getVecPMAsLocked. Both locks are held; the vmas allow all of it.
    rest = ars
    while not rest.is_empty:
        ar = rest.head
        if ar:
            start = page_down(ar.start)
            stop, cause = backing.get_pmas_locked(
                mm, start, page_up(ar.end), access, ignore_permissions=ignore_permissions
            )
            if start < stop:
                io.note_unmapped_locked(mm, start, stop)
            if cause is not None and stop < ar.end:
                end = max(stop, ar.start)
                usable = truncated_addr_range_seq(ars, rest, end)
                return usable, _of_pmas(cause, end, access, usable.n_bytes)
        rest = rest.tail
    return ars, None


def _of_pmas(error: OSError, addr: int, access: int, done: int) -> OSError:
    # As the caller asked: not the page, the address, and what was done before it.
    if isinstance(error, GuestBusError):
        return GuestBusError(addr, access, done=done)
    if isinstance(error, GuestFaultError):
        return GuestFaultError(addr, access, mapped=error.mapped, done=done)
    error.add_note(f"at guest address {addr:#x}, after {done} bytes")
    return error
