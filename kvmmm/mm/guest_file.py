"""`GuestFile`: guest memory as a file, for whatever reads and writes files.

    io.BufferedReader, io.BufferedRandom, io.TextIOWrapper, shutil.copyfileobj, pickle, tarfile, …

Short counts are those of read(2) and write(2): where only a part can be moved, that part is, and
the next call says why.
"""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING

from kvmmm.errors import MmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from typing_extensions import Buffer

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.copy_options import CopyOptions
    from kvmmm.mm.manager import MemoryManager


def open_guest_file(
    mm: MemoryManager, ar: AddrRange, writable: bool = True, **options: Unpack[CopyOptions]
) -> GuestFile:
    """Return guest memory as a file; see `GuestFile`. Nothing is touched yet."""
    return GuestFile(mm, ar, writable, **options)


class GuestFile(io.RawIOBase):
    """The bytes of `ar` as a raw binary file, at first positioned at its start.

    It keeps nothing: each call is a copy, and finds what is mapped there at that time. Its size is
    that of the range: reading at its end gives b"", writing there is ENOSPC, as on a disk, and it
    cannot be truncated. Not thread-safe, as no raw file is.

    A call that can move only a part moves that and returns how much; the next one, at the byte that
    cannot be accessed, raises. `readall`, and so `read()`, is all or the error: the position stays.

    Args:
        mm: The address space.
        ar: Guest addresses, any alignment.
        writable: Whether it may be written through this.
        options: `opts`, `ignore_permissions`, as for `copy_in` and `copy_out`.

    Attributes:
        ar: See there.
        size_bytes: The length of `ar`.

    Raises (`read`, `readinto`, `write`):
        GuestFaultError: At `.addr`, the byte at the position; `.done` is 0.
        MmError: ENOSPC: nothing of this write lies before the end.
        OSError: As `copy_in` and `copy_out`; the position is where it was.
        io.UnsupportedOperation: It is not writable.
        ValueError: It is closed.
    """

    def __init__(
        self, mm: MemoryManager, ar: AddrRange, writable: bool = True,
        **options: Unpack[CopyOptions],
    ) -> None:  # fmt: skip
        self._mm = mm
        self._writable = writable
        self._options = options
        self._at = 0
        self.ar = ar

    def __repr__(self) -> str:
        if self.closed:
            return f"<GuestFile {self.ar} closed>"
        return f"<GuestFile {self.ar} {'rw' if self._writable else 'r'} at {self._at:#x}>"

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.ar.length_bytes

    def readable(self) -> bool:
        """Whether it may be read: always."""
        self._check_open()
        return True

    def writable(self) -> bool:
        """Whether it may be written."""
        self._check_open()
        return self._writable

    def seekable(self) -> bool:
        """Whether it has a position: always."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Return the position, in bytes from the start of the range."""
        self._check_open()
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position, and return it. It may lie behind the end.

        Raises:
            ValueError: It would lie before the start, or `whence` is unknown.
        """
        self._check_open()
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}
        if whence not in bases:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        at = bases[whence] + offset
        if at < 0:
            raise ValueError(f"position {at} lies before the start")
        self._at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes; b"" at the end. All there are with -1: `readall`."""
        if size is None or size < 0:
            return self.readall()
        self._check_open()
        found = bytearray(min(size, self._left()))
        n_bytes = self.readinto(found)
        return bytes(found if n_bytes == len(found) else found[:n_bytes])

    def readall(self) -> bytes:
        """Return everything from the position to the end; where not all can be read, nothing."""
        self._check_open()
        found = self._mm.read(self.ar.start + self._at, self._left(), **self._options)
        self._at += len(found)
        return found

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill `buffer`, or its beginning, and return how many bytes; 0 at the end."""
        self._check_open()
        return self._move(self._mm.copy_in, buffer, self._left())

    def write(self, data: Buffer, /) -> int:
        """Write `data`, or its beginning, and return how many bytes; above 0 unless it is empty."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        n_left = self._left()
        if not n_left and memoryview(data).nbytes:
            raise MmError(
                errno.ENOSPC, "write", self.ar.start + self._at, f"the file {self.ar} ends here"
            )
        return self._move(self._mm.copy_out, data, n_left)

    def _move(self, copy: Callable[..., int], data: Buffer, n_left: int) -> int:
        with memoryview(data) as whole:
            if not whole.nbytes or not n_left:
                return 0
            addr = self.ar.start + self._at
            try:
                if whole.nbytes <= n_left:
                    n_bytes = copy(addr, whole, **self._options)
                else:
                    with whole.cast("B") as flat, flat[:n_left] as part:
                        n_bytes = copy(addr, part, **self._options)
            except OSError as e:
                n_bytes = getattr(e, "done", 0)
                if not n_bytes:
                    raise
            self._at += n_bytes
            return n_bytes

    def _left(self) -> int:
        return max(self.size_bytes - self._at, 0)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
