"""Copies between host and guest memory: what Python does when C cannot go on.

`copy_in` is guest → host, `copy_out` is host → guest: the host kernel's view, as in copy_from_user.
Bytes are moved in ascending order; on failure exactly those before the first byte that cannot be
accessed have been moved, and the error says which address and how many.

    mm.copy_in ──► CopyCore (C): frame table | walk | mirror ──► bytes
                      └─ not found ──► serve_copy ──► vma ──► pma ──► fill the frame table
                                                                └─► a foreign file: moved here

A copy of memory that was copied before is one call of C. The frame table says where each page of
the arena lies and what may be done with it: a cache of the pmas, filled here, and cleared before
anything that it says ceases to be true (`kvmmm.mm.pma.Removal`).

Source: gVisor pkg/sentry/mm/io.go.
"""

# ruff: noqa: FURB136, PLR1730 - a call of min() costs more than an if, on the way of a first touch
from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import (
    AddressSpaceIOUnavailableError,
    ArenaExhaustedError,
    GuestAlignmentError,
    GuestBusError,
    GuestFaultError,
    HostBufferError,
    NoProgressError,
)
from kvmmm.hostarch.access import WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import asio, backing
from kvmmm.mm.allocate import allocate_locked
from kvmmm.mm.vma import usable_end_locked

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Pma

IGNORE_PERMISSIONS = 1
ATOMIC = 4
MECHANISM_SHIFT = 4
WALK = 2

_BLOCK_MAX_BYTES = 4 << 20
"""No more of a foreign file under one hold of the lock: a guest's fault waits for it."""
_FILL_BYTES = 16 << 20
"""How much around a miss the frame table learns, as far as one pma reaches."""
_UNMAPPED_MAX = 64
_FRAME_BITS = tuple(
    tuple((effective & 3) | (max_perms & 3) << 2 for max_perms in range(8))
    for effective in range(8)
)


# ---- ranges ----


def check_io_range(mm: MemoryManager, addr: int, length_bytes: int) -> AddrRange:
    """Return [addr, addr + length_bytes), if a copy may have it at all.

    Nothing is said about what is mapped there. The end is checked for an empty range as well, as
    access_ok does in Linux.

    Args:
        mm: The address space.
        addr: Guest address.
        length_bytes: At least 0.

    Raises:
        GuestFaultError: It wraps, or ends beyond `max_addr`: `.addr` is the first address beyond,
            `.done` 0.

    Source:
        gVisor mm.CheckIORange.
    """
    if not (addr >= 0 and length_bytes >= 0 and addr + length_bytes <= mm.max_addr):
        raise GuestFaultError(max(addr, mm.max_addr), 0, mapped=False)
    return AddrRange(addr, addr + length_bytes)


def ensure_pmas_exist(
    mm: MemoryManager, addr: int, length_bytes: int, *, ignore_permissions: bool = False
) -> int:
    """Back [addr, addr + length_bytes) for writing, copies on write included; move nothing.

    For whoever must not fault later: a later copy, up to what this returned, asks nobody, unless
    memory is unmapped meanwhile.

    Returns:
        `length_bytes`.

    Raises:
        GuestFaultError: `.done` bytes can be written, `.addr` cannot. As for `copy_out`.

    Source:
        gVisor mm.EnsurePMAsExist; unlike it, 0 bytes are no error.
    """
    ar = check_io_range(mm, addr, length_bytes)
    done = 0
    while done < length_bytes:
        done += make_usable(mm, ar, done, WRITE, ignore_permissions=ignore_permissions)
    return done


# ---- what C calls ----


def serve_copy(
    mm: MemoryManager, addr: int, done: int, n_bytes: int, access: int, flags: int, host: int,
    before: int,
) -> int:  # fmt: skip
    """Make the byte at addr + done of a copy accessible, or move what C cannot.

    Called by CopyCore, outside of the read section.

    Args:
        mm: The address space.
        addr: Where the copy (one range of it) begins.
        done: Bytes of it that are done.
        n_bytes: Its length.
        access: READ, WRITE or both.
        flags: `PY_COPY_*` of _native/py_copy.h.
        host: Host address of the buffer's byte for addr + done; 0 for zeros.
        before: Bytes done by earlier ranges of the same operation, for errors.

    Returns:
        Bytes moved here; 0, look again; -1, the address space cannot serve it, internal mappings
        will.
    """
    at = addr + done
    if not flags and mm.pmas.find(at) is None:
        # Without a lock, so a hint only.
        moved = _move_fresh(mm, at, addr + n_bytes, access, host)
        if moved is not None:
            return moved
    ignores = bool(flags & IGNORE_PERMISSIONS)
    if (flags >> MECHANISM_SHIFT) & 3 >= WALK:
        mirrored = (flags >> MECHANISM_SHIFT) & 3 > WALK
        try:
            if mirrored and asio.mirror_resident(mm, at, addr + n_bytes, access):
                return 0
            ar = AddrRange(at, addr + n_bytes)
            asio.handle_asio_fault(mm, at, ar, access, mirrored=mirrored)
        except AddressSpaceIOUnavailableError:
            return -1
        except GuestFaultError as error:
            raise _after(error, before + done) from None
        return 0
    with mm.active_lock:
        found = mm.pmas.find(at)
        if found is not None:
            pma = found[2]
            if not access & ~(pma.max_perms if ignores else pma.effective_perms):
                return _reach_locked(mm, found, addr, done, n_bytes, access, flags, host, before)
    make_usable(
        mm, AddrRange(addr, addr + n_bytes), done, access, ignore_permissions=ignores, before=before
    )
    return 0


def _move_fresh(mm: MemoryManager, at: int, end: int, access: int, host: int) -> int | None:
    # The first touch of anonymous memory, the usual miss, without asking for more reasons than one,
    # and without a call that can be done without: bytes moved, or None where it is another case, or
    # there is no memory.
    with mm.mapping_lock, mm.active_lock:
        segment = mm.vmas.find(at)
        if segment is None or segment[2].mappable is not None:
            return None
        gap = mm.pmas.find_gap(at)
        if gap is None or access & ~segment[2].effective_perms:
            return None
        page = at & -PAGE_BYTES
        end_page = end + PAGE_BYTES - 1 & -PAGE_BYTES
        try:
            found = allocate_locked(mm, page, end_page, segment, exact=False, gap=gap)
        except ArenaExhaustedError:
            return None
        start, stop, pma = found
        if stop < end_page:
            end_page = stop
        if segment[1] < end_page:
            end_page = segment[1]
        if len(mm.unmapped) < _UNMAPPED_MAX or mm.address_space.walks_frames:
            note_unmapped_locked(mm, page, end_page)
        if stop - start > _FILL_BYTES:
            _fill_locked(mm, found, at, end)
        else:
            bits = _FRAME_BITS[pma.effective_perms][pma.max_perms]
            mm.fill_frames(start, stop, start + pma.delta, bits)
        # What it was merged with is not fresh.
        if gap[1] < end_page:
            end_page = gap[1]
        n_bytes = (end if end < end_page else end_page) - at
        return mm._move_fresh(mm.arena.fd, at + pma.delta, host, n_bytes, access)  # noqa: SLF001


def _reach_locked(
    mm: MemoryManager, found: tuple[int, int, Pma], addr: int, done: int, n_bytes: int,
    access: int, flags: int, host: int, before: int,
) -> int:  # fmt: skip
    _, end, pma = found
    if pma.file is mm.arena:
        _fill_locked(mm, found, addr + done, addr + n_bytes)
        return 0
    # Somebody else's file: under the lock, so that its mapping stays; and it may be cut short.
    at = addr + done
    hva = pma.file.hva + at + pma.delta
    if flags & ATOMIC:
        if not mm._atomic(hva, host):  # noqa: SLF001 - our own half
            raise GuestBusError(at, access)
        return n_bytes
    wanted = min(end - at, n_bytes - done, _BLOCK_MAX_BYTES)
    moved, is_host = mm._move(hva, host, wanted, access)  # noqa: SLF001
    if moved == wanted:
        return moved
    done += moved
    if is_host:
        raise HostBufferError(before + done, before + done)
    raise GuestBusError(addr + done, access, done=before + done)


def _fill_locked(mm: MemoryManager, found: tuple[int, int, Pma], at: int, end: int) -> None:
    # Have copies find what lies around [at, end) of one pma.
    start, stop, pma = found
    start = max(start, at & -_FILL_BYTES)
    stop = min(stop, max(page_up(end), (at | _FILL_BYTES - 1) + 1))
    bits = _FRAME_BITS[pma.effective_perms][pma.max_perms]
    mm.fill_frames(start, stop, start + pma.delta, bits)


def copy_failed(
    mm: MemoryManager, why: str, addr: int, done: int, n_bytes: int, access: int, before: int
) -> None:
    """Raise the error for a copy that C gave up; arguments as for `serve_copy`."""
    at, total = addr + done, before + done
    if why == "range":
        raise GuestFaultError(max(addr, mm.max_addr), access, mapped=False, done=total)
    if why == "alignment":
        raise GuestAlignmentError(addr, access)
    if why == "buffer":
        raise HostBufferError(total, total)
    if why == "stuck":
        raise NoProgressError(at, access, 100, done=total)
    error = GuestBusError(at, access, done=total)
    error.strerror = (
        f"cannot access guest address {at:#x}: the host has no memory for it "
        f"({total} of {before + n_bytes} bytes done)"
    )
    try:
        raise error
    finally:
        del error  # or it would keep all callers' frames until the collector comes


# ---- the slow path ----


def make_usable(
    mm: MemoryManager, ar: AddrRange, done: int, access: int, *, ignore_permissions: bool,
    before: int = 0,
) -> int:  # fmt: skip
    """Have pmas for what is left of a copy, or for its beginning.

    Args:
        mm: The address space.
        ar: What is copied.
        done: Bytes of it that are done.
        access: What it is copied for.
        ignore_permissions: See `IOOpts`.
        before: Bytes done before `ar`, for errors.

    Returns:
        How many more bytes can be accessed, at least one.

    Raises:
        GuestFaultError: Not even one. `GuestBusError`: its file ends.
        ArenaExhaustedError: No memory is left to back an untouched page.
        OSError: What a mappable says.

    Source:
        gVisor mm.withInternalMappings, the slow path.
    """
    at = ar.start + done
    with mm.mapping_lock:
        end, refusal = usable_end_locked(
            mm, at, ar.end, access, ignore_permissions=ignore_permissions
        )
        if end <= at:
            mapped = refusal is not None and refusal.mapped
            raise GuestFaultError(at, access, mapped=mapped, done=before + done)
        with mm.active_lock:
            start = page_down(at)
            usable, error = backing.get_pmas_locked(
                mm, start, page_up(end), access, ignore_permissions=ignore_permissions
            )
            if start < usable:
                note_unmapped_locked(mm, start, usable)
                found = mm.pmas.find(at)
                if found is not None and found[2].file is mm.arena:
                    _fill_locked(mm, found, at, min(end, usable))
    if usable > at:
        return min(end, usable) - at
    assert error is not None  # noqa: S101 - for mypy: it says what ended the range
    if isinstance(error, GuestFaultError):
        raise _after(type(error)(at, access, **_mapped(error)), before + done)
    error.add_note(f"at guest address {at:#x}, after {before + done} bytes")
    try:
        raise error
    finally:
        del error


def _mapped(error: GuestFaultError) -> dict[str, bool]:
    return {} if isinstance(error, GuestBusError) else {"mapped": error.mapped}


def _after(error: GuestFaultError, done: int) -> GuestFaultError:
    # The same refusal, of a copy that has come so far.
    if isinstance(error, GuestBusError):
        return GuestBusError(error.addr, error.access, done=done)
    return GuestFaultError(error.addr, error.access, mapped=error.mapped, done=done)


def note_unmapped_locked(mm: MemoryManager, start: int, end: int) -> None:
    """Note what a copy has backed, for `map_resident`.

    Where a CPU walks frames none may be forgotten; elsewhere a fault serves what is, and the list
    stays short.
    """
    unmapped = mm.unmapped
    if unmapped and unmapped[-1][1] == start:
        start = unmapped.pop()[0]
    if mm.address_space.walks_frames or len(unmapped) < _UNMAPPED_MAX:
        unmapped.append((start, end))
