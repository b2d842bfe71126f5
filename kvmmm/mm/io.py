"""Copies between host and guest memory, by internal mappings: address → pma → the arena's mapping.

`copy_in` is guest → host, `copy_out` is host → guest: the host kernel's view, as in copy_from_user.
Bytes are moved in ascending order; on failure exactly those before the first byte that cannot be
accessed have been moved, and the error says which address and how many.

A block is looked up and copied under active_lock, so that nobody can take its frames away in
between: that is the simple way. Copies in C, in a read section that removals wait for, will take
its place.

Source: gVisor pkg/sentry/mm/io.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError, GuestFaultError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, page_down, page_up
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm import backing
from kvmmm.mm.vma import usable_end_locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.memmap.file import File
    from kvmmm.mm.manager import MemoryManager

    # (file, offset, where in the host's buffer, bytes) -> bytes moved before the file's end.
    Move = Callable[[File, int, int, int], int]

_BLOCK_MAX_BYTES = 4 << 20
"""No more under one hold of the lock: a guest's fault waits for it."""
_ZEROS = bytes(64 << 10)
_UNMAPPED_MAX = 64


def copy_in(
    mm: MemoryManager, addr: int, dst: bytearray | memoryview, *, ignore_permissions: bool = False
) -> int:
    """Copy guest memory at `addr` into `dst` (guest -> host). Nothing is copied on write for it.

    Args:
        mm: The address space.
        addr: Guest address of the first byte.
        dst: Writable contiguous buffer; its length says how much.
        ignore_permissions: Access whatever could ever be allowed (`max_perms`), as a debugger does.

    Returns:
        Bytes copied, always all.

    Raises:
        GuestFaultError: A byte cannot be read: `.addr` is the first, `.done` the bytes before it.
            `GuestBusError`: because its file ends.
        ArenaExhaustedError: No memory is left to back an untouched page.
        OSError: What a mappable says.
    """
    with memoryview(dst) as view, view.cast("B") as out:
        if out.readonly:
            raise TypeError("the destination is read-only")

        def move(file: File, fo: int, at: int, n_bytes: int) -> int:
            with out[at : at + n_bytes] as part:
                if file.may_fault:
                    return file.read_into(fo, part)
                with file.view_of(FileRange(fo, fo + n_bytes)) as block:
                    part[:] = block
            return n_bytes

        return _copy(mm, addr, len(out), READ, move, ignore_permissions=ignore_permissions)


def copy_out(
    mm: MemoryManager, addr: int, src: bytes | bytearray | memoryview, *,
    ignore_permissions: bool = False,
) -> int:  # fmt: skip
    """Copy `src` to guest memory at `addr` (host -> guest). Shared pages are copied on write first.

    Args and errors as in `copy_in`, for writing.

    Returns:
        Bytes copied, always all.
    """
    with memoryview(src) as view, view.cast("B") as data:

        def move(file: File, fo: int, at: int, n_bytes: int) -> int:
            with data[at : at + n_bytes] as part:
                return _store(file, fo, part)

        return _copy(mm, addr, len(data), WRITE, move, ignore_permissions=ignore_permissions)


def zero_out(
    mm: MemoryManager, addr: int, length_bytes: int, *, ignore_permissions: bool = False
) -> int:
    """Zero guest memory (host -> guest); args and errors as in `copy_out`."""

    def move(file: File, fo: int, _at: int, n_bytes: int) -> int:
        done = 0
        while done < n_bytes:
            with memoryview(_ZEROS)[: n_bytes - done] as part:
                stored = _store(file, fo + done, part)
                done += stored
                if stored < len(part):
                    break
        return done

    return _copy(mm, addr, length_bytes, WRITE, move, ignore_permissions=ignore_permissions)


def read(
    mm: MemoryManager, addr: int, length_bytes: int, *, ignore_permissions: bool = False
) -> bytes:
    """Return `length_bytes` of guest memory at `addr`; errors as in `copy_in`."""
    dst = bytearray(length_bytes)
    copy_in(mm, addr, dst, ignore_permissions=ignore_permissions)
    return bytes(dst)


def write(mm: MemoryManager, addr: int, data: bytes | bytearray | memoryview) -> int:
    """Write `data` to guest memory at `addr`; the short name of `copy_out`."""
    return copy_out(mm, addr, data)


def _store(file: File, fo: int, part: memoryview) -> int:
    if file.may_fault:
        return file.write_from(fo, part)
    with file.view_of(FileRange(fo, fo + len(part))) as block:
        block[:] = part
    return len(part)


def _copy(
    mm: MemoryManager, addr: int, length_bytes: int, access: int, move: Move, *,
    ignore_permissions: bool,
) -> int:  # fmt: skip
    # What pmas allow already needs active_lock alone; anything else goes through the vmas.
    done = 0
    if not 0 <= addr < ADDRESS_LIMIT and length_bytes > 0:
        raise GuestFaultError(addr, access, mapped=False)
    while done < length_bytes:
        at = addr + done
        with mm.active_lock:
            found = mm.pmas.find(at)
            if found is not None:
                _, end, pma = found
                if not access & ~(pma.max_perms if ignore_permissions else pma.effective_perms):
                    wanted = min(end - at, length_bytes - done, _BLOCK_MAX_BYTES)
                    moved = move(pma.file, at + pma.delta, done, wanted)
                    done += moved
                    if moved < wanted:
                        raise GuestBusError(addr + done, access, done=done)
                    continue
        _make_usable(mm, addr, done, length_bytes, access, ignore_permissions=ignore_permissions)
    return done


def _make_usable(
    mm: MemoryManager, addr: int, done: int, length_bytes: int, access: int, *,
    ignore_permissions: bool,
) -> None:  # fmt: skip
    # Have pmas for what is left of a copy, or for its beginning; raise when not even for one byte.
    at = addr + done
    with mm.mapping_lock:
        end, refusal = usable_end_locked(
            mm, at, addr + length_bytes, access, ignore_permissions=ignore_permissions
        )
        if end <= at:
            mapped = refusal is not None and refusal.mapped
            raise GuestFaultError(at, access, mapped=mapped, done=done)
        with mm.active_lock:
            start = page_down(at)
            usable, error = backing.get_pmas_locked(
                mm, start, page_up(end), access, ignore_permissions=ignore_permissions
            )
            if start < usable:
                _note_unmapped_locked(mm, start, usable)
    if usable > at or error is None:
        return
    if isinstance(error, GuestBusError):
        raise GuestBusError(at, access, done=done)
    if not isinstance(error, GuestFaultError):
        error.add_note(f"at guest address {at:#x}, after {done} bytes")
    raise error


def _note_unmapped_locked(mm: MemoryManager, start: int, end: int) -> None:
    # For map_resident. Where a CPU walks frames none may be forgotten; elsewhere a fault serves
    # what is, and the list stays short.
    unmapped = mm.unmapped
    if unmapped and unmapped[-1][1] == start:
        start = unmapped.pop()[0]
    if mm.address_space.walks_frames or len(unmapped) < _UNMAPPED_MAX:
        unmapped.append((start, end))
