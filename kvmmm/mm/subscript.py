"""`mm[addr]` and `mm[start:end]`: guest memory as bytes, for the prompt and for tests.

Addresses are what they are: they do not count from an end, and a range has both its ends.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, overload

from kvmmm.errors import RangeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvmmm.mm.manager import MemoryManager


@overload
def getitem(mm: MemoryManager, where: int) -> int: ...
@overload
def getitem(mm: MemoryManager, where: slice) -> bytes: ...


def getitem(mm: MemoryManager, where: int | slice) -> int | bytes:
    """Return the byte at an address, or the bytes of a range: a copy (guest -> host).

    Args:
        mm: The address space.
        where: Guest address, or [start:end].

    Raises:
        TypeError: An end is missing, or there is a step, or something is no number.
        RangeError: An address is below zero, or the end lies before the start.
        OSError: As `read`: GuestFaultError and the others.
    """
    if isinstance(where, slice):
        start, end = _span(where)
        return mm.read(start, end - start)
    return mm.read(_address(where), 1)[0]


@overload
def setitem(mm: MemoryManager, where: int, value: int) -> None: ...
@overload
def setitem(mm: MemoryManager, where: slice, value: Buffer) -> None: ...


def setitem(mm: MemoryManager, where: int | slice, value: int | Buffer) -> None:
    """Set the byte at an address, or the bytes of a range (host -> guest).

    Args:
        mm: The address space.
        where: Guest address, or [start:end].
        value: 0 to 255, or a contiguous buffer of exactly the range's length.

    Raises:
        ValueError: Another length, or no byte; nothing was written.
        TypeError: As `getitem`, or the value is of the wrong kind; nothing was written.
        RangeError: As `getitem`; nothing was written.
        OSError: As `copy_out`: GuestFaultError and the others.
    """
    if not isinstance(where, slice):
        mm.copy_out(_address(where), bytes((operator.index(value),)))  # type: ignore[arg-type]
        return
    start, end = _span(where)
    with memoryview(value) as data:  # type: ignore[arg-type]
        if data.nbytes != end - start:
            raise ValueError(
                f"[{start:#x}, {end:#x}) has {end - start} bytes, and the value {data.nbytes}"
            )
        mm.copy_out(start, data)


def _span(where: slice) -> tuple[int, int]:
    if where.step is not None:
        raise TypeError("guest memory is read and written without steps")
    if where.start is None or where.stop is None:
        raise TypeError("a range of guest memory has a start and an end: mm[start:end]")
    start, end = operator.index(where.start), operator.index(where.stop)
    if not 0 <= start <= end:
        raise RangeError(start, end, "addresses are not below zero, nor does a range end before it")
    return start, end


def _address(where: int) -> int:
    addr = operator.index(where)
    if addr < 0:
        raise RangeError(addr, addr + 1, "an address is not below zero")
    return addr
