"""Copies between host and guest memory, by internal mappings: address → pma → the arena's mapping.

`copy_in` is guest → host, `copy_out` is host → guest: the host kernel's view, as in copy_from_user.
Bytes are moved in ascending order; on failure exactly those before the first page that cannot be
accessed have been moved, and the error says which address and how many.

Source: gVisor pkg/sentry/mm/io.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.mm import backing
from kvmmm.mm.vma import check_access_locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.mm.manager import MemoryManager


def copy_in(
    mm: MemoryManager, addr: int, dst: bytearray | memoryview, *, ignore_permissions: bool = False
) -> int:
    """Copy guest memory at `addr` into `dst` (guest -> host).

    Args:
        mm: The address space.
        addr: Guest address of the first byte.
        dst: Writable contiguous buffer; its length says how much.
        ignore_permissions: Access whatever is mapped, as a debugger does.

    Returns:
        Bytes copied, always all.

    Raises:
        GuestFaultError: A byte cannot be read: `.addr` is the first, `.done` the bytes before it.
        ArenaExhaustedError: No memory is left to back an untouched page.
    """
    with memoryview(dst) as view, view.cast("B") as out:
        done = 0
        for block in _blocks(mm, addr, len(out), 0 if ignore_permissions else READ):
            with block:
                out[done : done + len(block)] = block
                done += len(block)
    return done


def copy_out(
    mm: MemoryManager, addr: int, src: bytes | bytearray | memoryview, *,
    ignore_permissions: bool = False,
) -> int:  # fmt: skip
    """Copy `src` to guest memory at `addr` (host -> guest).

    Args and errors as in `copy_in`, for writing.

    Returns:
        Bytes copied, always all.
    """
    with memoryview(src) as view, view.cast("B") as data:
        done = 0
        for block in _blocks(mm, addr, len(data), 0 if ignore_permissions else WRITE):
            with block:
                block[:] = data[done : done + len(block)]
                done += len(block)
    return done


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


def zero_out(mm: MemoryManager, addr: int, length_bytes: int) -> int:
    """Zero guest memory (host -> guest); errors as in `copy_out`."""
    done = 0
    for block in _blocks(mm, addr, length_bytes, WRITE):
        with block:
            block[:] = bytes(len(block))
            done += len(block)
    return done


def _blocks(mm: MemoryManager, addr: int, length_bytes: int, access: int) -> Iterator[memoryview]:
    """Yield the host's view of a range, one block a pma, backing what is not yet."""
    done = 0
    while done < length_bytes:
        at = addr + done
        # Taken anew for each block: a block is a window or more, and the caller copies without
        # locks.
        with mm.mapping_lock, mm.active_lock:
            try:
                vma_start, vma_end, vma = check_access_locked(mm, at, access)
                found = mm.pmas.find(at)
                if found is None:
                    found = backing.allocate_locked(mm, at, vma_start, vma_end, vma)
                    mm.unmapped.append(found[:2])
            except GuestFaultError as e:
                raise GuestFaultError(at, access, mapped=e.mapped, done=done) from None
            except ArenaExhaustedError as e:
                e.add_note(f"at guest address {at:#x}, after {done} bytes")
                raise
            end = min(found[1], vma_end, addr + length_bytes)
            yield_view = found[2].file.view_of(found[2].file_range(at, end))
        yield yield_view
        done = end - addr
