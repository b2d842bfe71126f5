"""`Arena`: frames over one sealed memfd, their bytes, and its end. The package has the states."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, Self

from kvmmm.arena.frames import Frames
from kvmmm.arena.memfd import create_sealed
from kvmmm.arena.statistics import ArenaStatistics
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError, SyscallError
from kvmmm.hostarch.addr import (
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    PAGE_MASK,
    HostVirt,
    align_up,
    page_down,
    page_up,
)
from kvmmm.hostarch.ranges import FileRange
from kvmmm.safemem.ffi import HostMapping

if TYPE_CHECKING:
    from types import TracebackType

    from kvmmm.arena.usage import Reservation

_CAPACITY_MAX_BYTES = 1 << 46  # half of what an x86-64 process can map with four levels
_DEBUG = os.environ.get("KVMMM_DEBUG", "") not in ("", "0")


class Source(Protocol):
    """What can be copied from: any `kvmmm.memmap` File."""

    def view_of(self, fr: FileRange) -> memoryview:
        """Return the bytes of `fr`. They need not be there to be touched."""


class Arena(Frames):
    """All memory behind a VM: a sealed sparse memfd, mapped linearly, handed out in pages.

    Thread-safe. A context manager; `close` must come after the VMs that have memslots over it. A
    `kvmmm.memmap` File.

    Args:
        capacity_bytes: Its size, rounded up to 2 MiB. Costs nothing until touched.
        used_bytes: It begins with [0, used_bytes) allocated, one reference each: `first`. The same
            as allocating it, for less.
        reserved_bytes: And with so much behind that reserved: `reservation`.
        debug: Fill freed pages with 0xdb and punch them only when allocated again. Default:
            whether KVMMM_DEBUG is set.

    Attributes (all read-only; fd is -1 and hva 0 once closed):
        fd: The memfd.
        hva: Host address of its linear mapping, a multiple of 2 MiB: offset fo is at hva + fo.
        capacity_bytes: Its size in bytes.
        view: All of the mapping, writable, format "B".
        first: The range that it began with; empty without `used_bytes`.
        reservation: The reservation that it began with; None without `reserved_bytes`.
        may_fault: False: nobody can cut a sealed file short.

    Raises:
        RangeError: A capacity of zero or below, or more than a process can map.
        ArenaExhaustedError: It is to begin with more than it holds.
        SyscallError: The kernel refused the file (EMFILE, …) or the mapping (ENOMEM).

    Source: gVisor pgalloc.MemoryFile has the same purpose; it grows in chunks, this one does not.
    """

    __slots__ = ("_mapping", "_owner_count", "view")

    may_fault = False

    def __init__(
        self,
        capacity_bytes: int,
        *,
        used_bytes: int = 0,
        reserved_bytes: int = 0,
        debug: bool | None = None,
    ) -> None:
        if not 0 < capacity_bytes <= _CAPACITY_MAX_BYTES:
            raise RangeError(
                0, capacity_bytes, f"an arena's size is between 1 and {_CAPACITY_MAX_BYTES} bytes"
            )
        if (used_bytes | reserved_bytes) & PAGE_MASK or min(used_bytes, reserved_bytes) < 0:
            raise RangeError(0, used_bytes, "what an arena begins with is made of whole pages")
        if used_bytes + reserved_bytes > capacity_bytes:
            raise ArenaExhaustedError(used_bytes + reserved_bytes, capacity_bytes, capacity_bytes)
        capacity_bytes = align_up(capacity_bytes, HUGE_PAGE_BYTES)
        fd = create_sealed("kvmmm-arena", capacity_bytes)
        try:
            self._mapping = HostMapping(fd, capacity_bytes, HUGE_PAGE_BYTES)
        except OSError as e:
            os.close(fd)
            raise SyscallError(
                e.errno or 0,
                f"cannot map an arena of {capacity_bytes >> 20} MiB (ask for less, or raise the "
                "limit on address space, ulimit -v)",
            ) from e
        self.view = memoryview(self._mapping)
        self._owner_count = 1
        super().__init__(
            fd,
            self._mapping.hva,
            capacity_bytes,
            used_bytes,
            reserved_bytes,
            debug=_DEBUG if debug is None else debug,
        )

    def __repr__(self) -> str:
        if self.fd < 0:
            return "<Arena closed>"
        return f"<Arena fd={self.fd} hva={self.hva:#x} capacity_bytes={self.capacity_bytes}>"

    # The bytes.

    def view_of(self, fr: FileRange) -> memoryview:
        """Return a writable view of `fr`, format "B". It holds the mapping until it is released.

        Raises:
            RangeError: Outside the arena.
            StateError: Closed.
        """
        self._check_open()
        if fr.end > self.capacity_bytes:
            raise RangeError(fr.start, fr.end, f"the arena ends at {self.capacity_bytes:#x}")
        return memoryview(self._mapping)[fr.start : fr.end]

    def read_into(self, fo: int, dst: memoryview) -> int:
        """Copy bytes at offset `fo` into `dst`; how many there were before the arena's end.

        Raises:
            RangeError: `fo` is below zero.
            StateError: Closed.
        """
        dst = dst.cast("B")
        n_bytes = self._bytes_at(fo, len(dst))
        dst[:n_bytes] = self.view[fo : fo + n_bytes]
        return n_bytes

    def write_from(self, fo: int, src: memoryview) -> int:
        """Copy `src` to offset `fo`; how many bytes there was room for before the arena's end.

        Raises:
            RangeError: `fo` is below zero.
            StateError: Closed.
        """
        src = src.cast("B")
        n_bytes = self._bytes_at(fo, len(src))
        self.view[fo : fo + n_bytes] = src[:n_bytes]
        return n_bytes

    def _bytes_at(self, fo: int, n_bytes: int) -> int:
        self._check_open()
        if fo < 0:
            raise RangeError(0, 0, f"{fo} is no offset")
        return min(n_bytes, max(self.capacity_bytes - fo, 0))

    # Frames that come filled.

    def copy_from(
        self,
        file: Source,
        src_fo: int,
        length_bytes: int,
        *,
        align_bytes: int = PAGE_BYTES,
        phase_bytes: int = 0,
        at: int | None = None,
        reservation: Reservation | None = None,
        top_down: bool = False,
    ) -> tuple[FileRange, int]:
        """Return fresh pages, one reference each, with a copy of `file`'s bytes; and how many.

        One system call, from the file's linear mapping into holes of the memfd: the kernel neither
        clears a page first nor takes a fault for it, and a page that cannot be read is no SIGBUS
        but the end of the copy. All of it, then, or the whole pages before the first that cannot be
        read: an empty range and 0 when that is the very first.

        Args:
            file: The source, which may be the arena itself.
            src_fo: Offset there, a multiple of 4 KiB; the caller holds a reference.
            length_bytes: How much; a multiple of 4 KiB.
            align_bytes: Where the copy goes; this and the rest as in `allocate`.
            phase_bytes: See there.
            at: See there.
            reservation: See there.
            top_down: See there.

        Raises:
            RangeError: As `allocate`, or the source is outside its file; nothing changed.
            StateError: As `allocate`.
            ArenaExhaustedError: As `allocate`.
            SyscallError: The host has no memory for it (ENOSPC, ENOMEM, …); nothing changed.

        Source:
            gVisor pgalloc.MemoryFile.Allocate with a ReaderFunc (AllocateAndFill).
        """
        if file is self and 0 <= src_fo <= self.capacity_bytes - length_bytes:
            src = self.view[src_fo : src_fo + length_bytes]
        else:
            src = file.view_of(FileRange(src_fo, src_fo + length_bytes))
        # Released whatever happens: an error that somebody keeps would keep the arena open.
        with src:
            fr = self.allocate(
                length_bytes,
                align_bytes=align_bytes,
                phase_bytes=phase_bytes,
                at=at,
                reservation=reservation,
                top_down=top_down,
            )
            try:
                n_bytes = os.pwrite(self.fd, src, fr.start)
            except OSError as e:
                return self._end_copy(fr, 0, e)
        return (fr, n_bytes) if n_bytes == length_bytes else self._end_copy(fr, n_bytes, None)

    def take_copy(
        self, src_fo: int, length_bytes: int, align_bytes: int, phase_bytes: int
    ) -> int | None:
        """Copy pages of this arena to fresh ones, as `copy_from`, in the usual case; or say None.

        For the path of a fault: the arguments are not checked, and only the offset is returned.
        None means that nothing was done and `copy_from` must be asked.
        """
        fo = self.take(length_bytes, align_bytes, phase_bytes)
        if fo is None:
            return None
        n_bytes = -1
        # Not swallowed: copy_from meets it again, and says what it is.
        with suppress(OSError):
            n_bytes = os.pwrite(self.fd, self.view[src_fo : src_fo + length_bytes], fo)
        if n_bytes != length_bytes:
            self.dec_ref(FileRange(fo, fo + length_bytes))
            return None
        return fo

    def allocate_and_write(
        self,
        src: memoryview,
        *,
        align_bytes: int = PAGE_BYTES,
        phase_bytes: int = 0,
        at: int | None = None,
        reservation: Reservation | None = None,
        top_down: bool = False,
    ) -> tuple[FileRange, int]:
        """Return fresh pages, one reference each, that begin with `src`; and how much of it.

        As `copy_from`, for any bytes. Where `src` ends within a page, zeros follow.

        Raises:
            RangeError: As `allocate`, or `src` is empty; nothing changed.
            StateError: As `allocate`.
            ArenaExhaustedError: As `allocate`.
            SyscallError: The host has no memory for it (ENOSPC, ENOMEM, …); nothing changed.
        """
        fr = self.allocate(
            page_up(src.nbytes),
            align_bytes=align_bytes,
            phase_bytes=phase_bytes,
            at=at,
            reservation=reservation,
            top_down=top_down,
        )
        try:
            n_bytes = os.pwrite(self.fd, src, fr.start)
        except OSError as e:
            return self._end_copy(fr, 0, e)
        return (fr, n_bytes) if n_bytes == src.nbytes else self._end_copy(fr, n_bytes, None)

    def _end_copy(
        self, fr: FileRange, n_bytes: int, error: OSError | None
    ) -> tuple[FileRange, int]:
        # Keep the whole pages that were copied, free the rest.
        end = fr.start + page_down(n_bytes)
        self.dec_ref(FileRange(end, fr.end))
        if error is not None and error.errno != errno.EFAULT:
            raise SyscallError(
                error.errno or 0, f"cannot copy {fr.length_bytes >> 10} KiB into the arena"
            ) from error
        return FileRange(fr.start, end), end - fr.start

    # The figures, the owners, the end.

    def statistics(self) -> ArenaStatistics:
        """Return the figures of this moment; also after `close`."""
        with self._lock:
            usage = self._usage
            return ArenaStatistics(
                capacity_bytes=self.capacity_bytes,
                used_bytes=usage.used_bytes,
                reserved_bytes=usage.reserved_bytes,
                peak_used_bytes=usage.peak_used_bytes,
                largest_free_bytes=usage.free.largest_bytes,
                allocation_count=self._allocation_count,
                free_count=self._free_count,
                punched_bytes=self._punched_bytes,
            )

    def share(self) -> Self:
        """Return the arena for one owner more: each calls `close` once, and the last one closes.

        So VMs that were forked from one another have one arena.

        Raises:
            StateError: Closed.
        """
        with self._lock:
            self._check_open()
            self._owner_count += 1
        return self

    @property
    def is_shared(self) -> bool:
        """Whether it has several owners: then what one of them leaves allocated stays so."""
        return self._owner_count > 1

    def close(self) -> None:
        """Give it up; the last owner unmaps and closes it, whatever is still allocated.

        Once it is closed a further call does nothing.

        Raises:
            StateError: A view is still held; the arena stays open and whole.
        """
        with self._lock:
            if self.fd < 0:
                return
            if self._owner_count > 1:
                self._owner_count -= 1
                return
            try:
                self.view.release()
                self._mapping.close()
            except BufferError as e:
                self.view = memoryview(self._mapping)
                raise StateError(
                    f"the arena stays open: {e}; release what view_of() and slices of view gave, "
                    "then close again"
                ) from e
            fd, self.fd = self.fd, -1
            self.hva = HostVirt(0)
            os.close(fd)

    def __del__(self) -> None:
        # Quietly: fd and mapping go. A view that is still held keeps the mapping until it goes.
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
