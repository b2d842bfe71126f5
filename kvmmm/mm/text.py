"""Strings that end with a NUL, as C keeps them in guest memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from kvmmm.errors import GuestFaultError, StringTooLongError
from kvmmm.hostarch.access import READ
from kvmmm.hostarch.addr import PAGE_BYTES, PAGE_MASK

if TYPE_CHECKING:
    from typing import Unpack

    from kvmmm.mm.copy_options import CopyOptions
    from kvmmm.mm.manager import MemoryManager

# Most strings are short: the first look is at no more than this.
_FIRST_BYTES = 256


@overload
def read_string(
    mm: MemoryManager, addr: int, max_bytes: int = ..., *, encoding: None = None,
    **options: Unpack[CopyOptions],
) -> bytes: ...  # fmt: skip
@overload
def read_string(
    mm: MemoryManager, addr: int, max_bytes: int = ..., *, encoding: str,
    **options: Unpack[CopyOptions],
) -> str: ...  # fmt: skip


def read_string(
    mm: MemoryManager, addr: int, max_bytes: int = 4096, *, encoding: str | None = None,
    **options: Unpack[CopyOptions],
) -> bytes | str:  # fmt: skip
    """Return the bytes from `addr` to the first NUL, without it (guest -> host).

    No page behind the NUL's is touched: a string may end right before memory that is not mapped.

    Args:
        mm: The address space.
        addr: Guest address of the first byte.
        max_bytes: Within how many bytes the NUL must come.
        encoding: Decode it; otherwise bytes come out.
        options: `opts`, `ignore_permissions`, as for `copy_in`.

    Raises:
        StringTooLongError: There is no NUL: `.prefix` has these `max_bytes` bytes.
        GuestFaultError: A byte before any NUL cannot be read: `.addr` is its address, `.done` how
            many bytes come before it, and `.prefix` these.
        UnicodeDecodeError: The bytes are not of that encoding.
        ValueError: `max_bytes` is below zero.
        OSError: As `copy_in`.

    Source: gVisor usermem.CopyStringIn; strncpy_from_user in the Linux kernel.
    """
    if max_bytes < 0:
        raise ValueError(f"a string has no {max_bytes} bytes")
    found = b""
    step = _FIRST_BYTES
    while len(found) < max_bytes:
        at = addr + len(found)
        n_bytes = min(step, PAGE_BYTES - (at & PAGE_MASK), max_bytes - len(found))
        step = PAGE_BYTES
        try:
            part = mm.read(at, n_bytes, **options)
        except GuestFaultError:
            found, part = b"", _read_again(mm, addr, len(found) + n_bytes, options)
        end = part.find(0)
        if end >= 0:
            found += part[:end]
            return found if encoding is None else found.decode(encoding)
        found += part
    raise StringTooLongError(addr, found)


def _read_again(mm: MemoryManager, addr: int, n_bytes: int, options: CopyOptions) -> bytes:
    # All of it in one, so that the error counts from where the string begins. What has been read
    # may be another by now: there may be a NUL, or no error.
    found = bytearray(min(n_bytes, max(mm.max_addr - addr, 0)))
    error: GuestFaultError | None = None
    try:
        mm.copy_in(addr, found, **options)
        if len(found) < n_bytes:
            error = GuestFaultError(mm.max_addr, READ, mapped=False, done=len(found))
    except GuestFaultError as e:
        del found[e.done :]
        error = e
    if error is not None and 0 not in found:
        error.prefix = bytes(found)
        raise error
    return bytes(found)
