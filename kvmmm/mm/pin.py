"""Pins: frames that somebody outside the CPU's translations uses, and that must stay the guest's.

A device that reads or writes guest memory (DMA), or a copy that is handed to another thread, needs
frames that are not freed, and that stay those behind the address: so what is shared copy-on-write
is copied first, even for reading, and a fork gives the child copies of pinned pages.

Source: gVisor mm.Pin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kvmmm.errors import GuestBusError, GuestFaultError, RangeError
from kvmmm.hostarch.addr import page_down, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import backing
from kvmmm.mm.vma import usable_end_locked

if TYPE_CHECKING:
    from types import TracebackType

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import File
    from kvmmm.mm.manager import MemoryManager


class Pin:
    """Frames with an extra reference each, until `release`. A context manager.

    It may outlive its mappings, and the memory manager.

    Attributes:
        ranges: (guest addresses, file, file range) of each piece, ascending and contiguous, whole
            pages.
        error: Why it ends before what was asked for; None if it does not.
    """

    __slots__ = ("_mm", "error", "ranges")

    def __init__(
        self, mm: MemoryManager, ranges: list[tuple[AddrRange, File, FileRange]],
        error: OSError | None,
    ) -> None:  # fmt: skip
        self._mm: MemoryManager | None = mm
        self.ranges = ranges
        self.error = error

    def release(self) -> None:
        """Drop the references. Idempotent."""
        mm, self._mm = self._mm, None
        if mm is None:
            return
        with mm.active_lock:
            mm.pins.discard(self)
        for _, file, fr in self.ranges:
            file.dec_ref(fr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()


def pin(mm: MemoryManager, addr: int, length_bytes: int, access: int) -> Pin:
    """Keep the frames of the pages that [addr, addr + length_bytes) touches.

    Args:
        mm: The address space.
        addr: Guest address.
        length_bytes: Above zero.
        access: What they are used for; private pages that are shared are copied in any case.

    Returns:
        The pin; release it. Where the range cannot be used to its end, it holds what comes before,
        and `.error` says what ended it.

    Raises:
        GuestFaultError: Not even the first page can be used so.
        ArenaExhaustedError: No memory is left to back it, or to copy it to.
        OSError: What a mappable says.
        RangeError: The length is not above zero, or the range wraps.
    """
    if length_bytes <= 0 or addr < 0:
        raise RangeError(addr, addr + length_bytes, "a pin has at least one byte")
    start, end = page_down(addr), page_up(addr + length_bytes)
    with mm.mapping_lock, mm.active_lock:
        error: OSError | None
        end, error = usable_end_locked(mm, start, end, access)
        if start < end:
            end, cause = backing.get_pmas_locked(mm, start, end, access, break_cow=True)
            error = cause or error
        if end <= start:
            raise _at(error, addr, access)
        ranges = []
        for pma_start, pma_end, pma in mm.pmas.segments(start, end):
            ar = AddrRange(max(start, pma_start), min(end, pma_end))
            fr = pma.file_range(ar.start, ar.end)
            pma.file.inc_ref(fr)
            ranges.append((ar, pma.file, fr))
        made = Pin(mm, ranges, error)
        mm.pins.add(made)
        return made


def _at(error: OSError | None, addr: int, access: int) -> OSError:
    # As the caller asked: not the page, the address.
    if isinstance(error, GuestBusError):
        return GuestBusError(addr, access)
    if error is None or isinstance(error, GuestFaultError):
        return GuestFaultError(addr, access, mapped=error is not None and error.mapped)
    return error
