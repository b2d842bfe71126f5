"""Pins: frames that somebody outside the CPU's translations uses, and that must stay the guest's.

A device that reads or writes guest memory (DMA), or a copy that is handed to another thread, needs
frames that are not freed, and that stay those behind the address: so what is shared copy-on-write
is copied first, even for reading, and a fork gives the child copies of pinned pages.

    mm.pin          a memoryview of exactly these bytes, contiguous wherever the frames lie
    mm.pin_frames   a `Pin`: which file ranges they are

Source: gVisor mm.Pin.
"""

from __future__ import annotations

import collections
import errno
import sys
from typing import TYPE_CHECKING, Self

from kvmmm.errors import (
    GuestFaultError,
    MmError,
    RangeError,
    StateError,
    SyscallError,
)
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, page_down, page_up
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import backing
from kvmmm.mm.asio import error_at
from kvmmm.mm.vma import usable_end_locked
from kvmmm.safemem.ffi import PinnedWindow

if TYPE_CHECKING:
    from types import TracebackType

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import File
    from kvmmm.mm.manager import MemoryManager

# What _fd_of says.
_CLOSED, _NONE = -1, -2
# Pins whose buffer went at a moment when they could not be released; see `Pin._let_go`.
_waiting: collections.deque[Pin] = collections.deque()


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
        mm = self._mm
        if mm is None:
            return
        with mm.active_lock:
            if self._mm is None:
                return  # somebody else was quicker
            self._mm = None
            mm.pins.discard(self)
        for _, file, fr in self.ranges:
            # A file that was closed has forgotten its references.
            if _fd_of(file) != _CLOSED:
                file.dec_ref(fr)

    def _let_go(self, is_collected: bool) -> None:
        # The last buffer on a window is gone; where that happened nobody knows. If a function of
        # ours runs in this thread then it may hold the locks that a release takes; and what the
        # collector finds, in the middle of anything, is not unmapped yet. So it may have to wait
        # for the next use of pins.
        _waiting.append(self)
        if not is_collected and not _is_inside_kvmmm():
            release_waiting()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.release()


def pin(
    mm: MemoryManager, where: AddrRange | int, length_bytes: int | None = None, *,
    writable: bool = True,
) -> memoryview:  # fmt: skip
    """Return guest memory itself as a buffer: no copy, and what either side writes the other sees.

    It is contiguous wherever the frames lie: they are mapped side by side once more. They stay
    those behind these addresses until the guest unmaps them; a fork gives the child copies. The
    buffer stays valid after that: after munmap, and even when memory manager and arena are closed.
    The frames are released with the last buffer: end it by `with`, by `release()`, or drop it.

    Args:
        mm: The address space.
        where: Guest addresses, or the first of `length_bytes`.
        length_bytes: Above zero; only with an address.
        writable: Whether the buffer is; then the guest must have the right to write there as well.

    Returns:
        A memoryview of exactly these bytes, format "B".

    Raises:
        GuestFaultError: `.addr`: the first byte that cannot be used so. As with every error,
            nothing stays pinned. `GuestBusError`: because its file ends.
        MmError: EOPNOTSUPP: at `.addr` lies a shared mapping of a file that somebody could cut
            short, which would kill the process that touches it. Private copies of its pages can be
            pinned, and its frames by `pin_frames`.
        ArenaExhaustedError: No memory is left to back it, or to copy it to.
        SyscallError: The host refused to map it: too many pieces (ENOMEM), say.
        RangeError: It has no bytes, or wraps.
        StateError: Called from inside a Reader or Writer.
    """
    addr, length_bytes = _span(where, length_bytes)
    made = pin_frames(mm, addr, length_bytes, READ_WRITE if writable else READ)
    if made.error is not None:
        made.release()
        error = made.error
        if isinstance(error, GuestFaultError):
            raise error_at(error, error.addr, error.access)
        raise error
    start = addr - made.ranges[0][0].start
    return memoryview(_window(made, writable=writable))[start : start + length_bytes]


def pin_frames(mm: MemoryManager, addr: int, length_bytes: int, access: int) -> Pin:
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
        StateError: Called from inside a Reader or Writer.
    """
    release_waiting()
    if length_bytes <= 0 or not 0 <= addr <= ADDRESS_LIMIT - length_bytes:
        raise RangeError(addr, addr + length_bytes, "a pin has at least one byte")
    start, end = page_down(addr), page_up(addr + length_bytes)
    with mm.mapping_lock, mm.active_lock:
        error: OSError | None
        end, error = usable_end_locked(mm, start, end, access)
        if start < end:
            end, cause = backing.get_pmas_locked(mm, start, end, access, break_cow=True)
            error = cause or error
        if end <= start:
            raise error_at(error, addr, access)
        ranges = []
        for pma_start, pma_end, pma in mm.pmas.segments(start, end):
            ar = AddrRange(max(start, pma_start), min(end, pma_end))
            fr = pma.file_range(ar.start, ar.end)
            pma.file.inc_ref(fr)
            ranges.append((ar, pma.file, fr))
        made = Pin(mm, ranges, error)
        mm.pins.add(made)
        return made


def release_waiting() -> None:
    """Release the pins whose buffer went in the middle of something else.

    Preconditions:
        - This thread holds no lock of a memory manager, a file or an arena.
    """
    while _waiting:
        try:
            made = _waiting.popleft()
        except IndexError:  # another thread
            return
        try:
            made.release()
        except StateError:
            _waiting.append(made)  # from inside a Reader or Writer
            return


def _is_inside_kvmmm() -> bool:
    # inspect is slow to import. From the caller's caller, if any: nobody calls at the very end.
    frame = sys._getframe(1).f_back  # noqa: SLF001
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("kvmmm."):
            return True
        frame = frame.f_back
    return False


def _span(where: AddrRange | int, length_bytes: int | None) -> tuple[int, int]:
    if isinstance(where, AddrRange):
        if length_bytes is not None:
            raise TypeError("a range has its length: give no other")
        return where.start, where.length_bytes
    if length_bytes is None:
        raise TypeError("an address needs length_bytes")
    return where, length_bytes


def _window(made: Pin, *, writable: bool) -> PinnedWindow:
    # It releases the pin at its end; so does this when there is none.
    try:
        pieces = _pieces(made)
        return PinnedWindow(pieces, made._let_go, writable)  # noqa: SLF001  # its other half
    except OSError as e:
        made.release()
        if isinstance(e, MmError):
            raise
        n = len(made.ranges)
        raise SyscallError(e.errno or 0, f"cannot map {n} pieces of memory side by side") from e
    except BaseException:
        made.release()
        raise


def _pieces(made: Pin) -> list[tuple[int, int, int]]:
    # (fd, offset, bytes) for PinnedWindow; what lies side by side in its file is one.
    pieces: list[tuple[int, int, int]] = []
    for ar, file, fr in made.ranges:
        fd = _fd_of(file)
        if file.may_fault or fd < 0:
            raise MmError(
                errno.EOPNOTSUPP, "pin", ar.start,
                "a shared mapping of a file that could be cut short under the buffer",
            )  # fmt: skip
        if pieces and pieces[-1][0] == fd and sum(pieces[-1][1:]) == fr.start:
            pieces[-1] = fd, pieces[-1][1], pieces[-1][2] + fr.length_bytes
        else:
            pieces.append((fd, fr.start, fr.length_bytes))
    return pieces


def _fd_of(file: File) -> int:
    # Not every File has one.
    return getattr(file, "fd", _NONE)
