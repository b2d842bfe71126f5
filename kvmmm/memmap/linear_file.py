"""`LinearFile`: a host file in one linear mapping, its references, and moving its bytes safely."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kvmmm.errors import RangeError, StateError, SyscallError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_MASK, HostVirt, align_up, page_up
from kvmmm.memmap.references import ReferenceCounts
from kvmmm.safemem.ffi import HostMapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.hostarch.ranges import FileRange

_CAPACITY_MAX_BYTES = 1 << 46  # half of what an x86-64 process can map with four levels
_SEALS_AGAINST_WRITING = fcntl.F_SEAL_WRITE | 0x10  # F_SEAL_FUTURE_WRITE, <linux/fcntl.h>


class LinearFile:
    """A regular file of the host, mapped shared from offset 0: a `File`. Thread-safe.

    The arguments and attributes are those of `HostFile`, which is this and a `Mappable`.
    """

    __slots__ = (
        "_lock",
        "_mapping",
        "_references",
        "capacity_bytes",
        "fd",
        "hva",
        "identity",
        "name",
        "writable",
    )

    may_fault = True

    def __init__(
        self,
        fd: int,
        *,
        writable: bool | None = None,
        capacity_bytes: int = 0,
        name: str | None = None,
    ) -> None:
        self.fd = -1
        if not 0 <= capacity_bytes <= _CAPACITY_MAX_BYTES:
            raise RangeError(0, max(capacity_bytes, 0), "no capacity that a process can map")
        try:
            self.fd = os.dup(fd)
            self.name = name or str(Path(f"/proc/self/fd/{self.fd}").readlink())
            self.writable = _is_writable(self.fd) if writable is None else writable
            status = _status_of_regular(self.fd)
            self.capacity_bytes = align_up(max(capacity_bytes, status.st_size, 1), HUGE_PAGE_BYTES)
            self._mapping = HostMapping(
                self.fd, self.capacity_bytes, HUGE_PAGE_BYTES, self.writable
            )
        except OSError as e:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
            how = {True: "read-write", False: "read-only", None: "shared"}[writable]
            raise SyscallError(
                e.errno or 0, f"cannot map {name or f'file descriptor {fd}'} {how}"
            ) from e
        self.identity = status.st_dev, status.st_ino
        self.hva = HostVirt(self._mapping.hva)
        # Taken under an mm's active_lock, so nothing is called under it.
        self._lock = threading.Lock()
        self._references = ReferenceCounts()

    def __repr__(self) -> str:
        if self.fd < 0:
            return f"<{type(self).__name__} {self.name} closed>"
        how = "rw" if self.writable else "ro"
        where = f"hva={self.hva:#x} capacity_bytes={self.capacity_bytes:#x}"
        return f"<{type(self).__name__} {self.name} {how} {where}>"

    # References. Pages need not be allocated: the file has them.

    @property
    def referenced_bytes(self) -> int:
        """Pages with a reference."""
        return self._references.referenced_bytes

    def inc_ref(self, fr: FileRange) -> None:
        """Take one more reference on every page of `fr`; the first one needs no allocation.

        Raises:
            RangeError: Unaligned, empty or outside the mapping; nothing changed.
            StateError: Closed.
        """
        self._check_range(fr)
        with self._lock:
            self._references.add(fr.start, fr.end)

    def dec_ref(self, fr: FileRange) -> None:
        """Drop one reference on every page of `fr`.

        Raises:
            RangeError: Unaligned, empty or outside the mapping; nothing changed.
            StateError: Closed, or a page has no reference; nothing changed.
        """
        self._check_range(fr)
        with self._lock:
            self._references.drop(fr.start, fr.end)

    def ref_count(self, fo: int) -> int:
        """Return the references on the page that holds file offset `fo`."""
        with self._lock:
            return self._references.count(fo)

    def ref_counts(self, fr: FileRange) -> list[tuple[int, int, int]]:
        """Return (start, end, references) of the parts of `fr` that have any, in order."""
        with self._lock:
            return self._references.runs(fr.start, fr.end)

    def view_of(self, fr: FileRange) -> memoryview:
        """Return the bytes of `fr`, for system calls only: touching them may be a SIGBUS.

        Raises:
            RangeError: Outside the mapping.
            StateError: Closed.
        """
        self._check_open()
        if fr.end > self.capacity_bytes:
            raise RangeError(fr.start, fr.end, f"{self.name} is mapped to {self.capacity_bytes:#x}")
        return memoryview(self._mapping)[fr.start : fr.end]

    def read_into(self, fo: int, dst: memoryview) -> int:
        """Copy bytes at offset `fo` into `dst`; how many there were before the last page's end.

        Raises:
            RangeError: `fo` is below zero.
            StateError: Closed.
            SyscallError: The host could not read (EIO).
        """
        self._check_offset(fo)
        dst = dst.cast("B")
        n_bytes = self._move(os.preadv, fo, dst[: max(self.capacity_bytes - fo, 0)])
        # The rest of the page in which the file ends is there, and zero.
        n_there = min(len(dst), self.end() - fo)
        if n_bytes < n_there:
            dst[n_bytes:n_there] = bytes(n_there - n_bytes)
            return n_there
        return n_bytes

    def write_from(self, fo: int, src: memoryview) -> int:
        """Copy `src` to offset `fo`; how many bytes there was room for before the last page's end.

        The file does not grow, unless somebody else cuts it short at this moment.

        Raises:
            RangeError: `fo` is below zero.
            StateError: Closed.
            SyscallError: It is read-only (EBADF), or the host could not write (ENOSPC, EIO).
        """
        self._check_offset(fo)
        src = src.cast("B")
        n_kept = min(len(src), min(os.fstat(self.fd).st_size, self.capacity_bytes) - fo)
        n_bytes = self._move(os.pwritev, fo, src[: max(n_kept, 0)])
        if n_bytes < n_kept:
            return n_bytes
        return max(min(len(src), self.end() - fo), 0)

    def _move(
        self, move: Callable[[int, list[memoryview], int], int], fo: int, data: memoryview
    ) -> int:
        # preadv or pwritev, again until it comes to the end.
        done = 0
        while done < len(data):
            try:
                n_bytes = move(self.fd, [data[done:]], fo + done)
            except OSError as e:
                if done:
                    break
                raise SyscallError(
                    e.errno or 0, f"cannot move {len(data)} bytes at {fo:#x} of {self.name}"
                ) from e
            if not n_bytes:
                break
            done += n_bytes
        return done

    # Its size.

    @property
    def size_bytes(self) -> int:
        """The file's size at this moment."""
        self._check_open()
        return os.fstat(self.fd).st_size

    def end(self) -> int:
        """Return the end of the last page that the file has now, as far as it is mapped."""
        return min(page_up(os.fstat(self.fd).st_size), self.capacity_bytes)

    # The end.

    def close(self) -> None:
        """Unmap and close. A second call does nothing.

        Raises:
            StateError: A page has a reference, or a view is held; nothing changed.
        """
        with self._lock:
            if self.fd < 0:
                return
            if self._references.referenced_bytes:
                raise StateError(
                    f"{self._references.referenced_bytes >> 10} KiB of {self.name} are still in use"
                )
            try:
                self._mapping.close()
            except BufferError as e:
                raise StateError(f"{self.name} stays open: {e}") from e
            fd, self.fd = self.fd, -1
            self.hva = HostVirt(0)
            os.close(fd)

    def __del__(self) -> None:
        # Quietly, as the arena does.
        fd, self.fd = getattr(self, "fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def _check_open(self) -> None:
        if self.fd < 0:
            raise StateError(f"{self.name} is closed")

    def _check_offset(self, fo: int) -> None:
        self._check_open()
        if fo < 0:  # to preadv2(2), -1 is the file's current position
            raise RangeError(0, 0, f"{fo} is no offset")

    def _check_range(self, fr: FileRange) -> None:
        self._check_open()
        if (fr.start | fr.end) & PAGE_MASK or not fr.start < fr.end <= self.capacity_bytes:
            raise RangeError(
                fr.start, fr.end, f"not whole pages of the {self.capacity_bytes:#x} that are mapped"
            )


def _status_of_regular(fd: int) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENODEV, "no regular file")
    return status


def _is_writable(fd: int) -> bool:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return False
    try:
        return not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS_AGAINST_WRITING
    except OSError:
        return True  # no memfd
