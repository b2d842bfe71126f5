"""`HostFile`: a file of the host, or somebody else's memfd, behind guest memory.

The file lies in one linear shared mapping, from offset 0, of fixed length: file offset fo is at
`hva + fo` for as long as it is open, whatever the file's size is. Somebody else may cut the file
short at any time. Then a CPU that touches what is gone faults, the page tables notwithstanding; the
host must not touch it but by copies that recover from the bus error (`safemem.ffi.safe_copy`), or
by system calls, which is what `read_into` and `write_from` do; and `revalidate` takes back what was
handed out.

The page in which the file ends can be used as a whole, as with mmap(2). What was read from behind
the end is zero, what is written there is lost.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Self

from kvmmm.errors import StateError, SyscallError
from kvmmm.hostarch.access import ANY_ACCESS, READ_EXECUTE, WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, page_down, page_up
from kvmmm.memmap.file import Translation
from kvmmm.memmap.linear_file import LinearFile
from kvmmm.memmap.mapping_set import Mapped

if TYPE_CHECKING:
    from types import TracebackType

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import MappingSpace


class HostFile(Mapped, LinearFile):
    """A regular file of the host: a `File` and a `Mappable`. Thread-safe. A context manager.

    Args:
        fd: The file, open for reading, or for reading and writing. It is duplicated: the caller
            keeps its own.
        writable: Whether it may be written through us. Default: what `fd` allows.
        capacity_bytes: How much of it can be mapped, at least: for files that will grow. Rounded up
            to 2 MiB, as is the file's own size, which it never is below.
        name: Shown in maps. Default: the file's path.

    Attributes (all read-only; fd is -1 and hva 0 once closed):
        fd: Our descriptor.
        hva: Host address of offset 0, a multiple of 2 MiB. As said above.
        capacity_bytes: Length of the mapping. What the file has behind it cannot be mapped.
        writable: Whether the mapping is.
        max_shared_perms: What a shared mapping of it may be given; a private one may be given all.
        may_fault: True.
        name: See there.
        identity: (st_dev, st_ino), the same for every `HostFile` of one file.

    Raises:
        SyscallError: `fd` does not allow it (EACCES), is no regular file (ENODEV), or the host
            refused the mapping.
        RangeError: A capacity below zero, or more than a process can map.

    Source: gVisor fsutil.HostMappable, fsutil.HostFileMapper.
    """

    def __init__(
        self,
        fd: int,
        *,
        writable: bool | None = None,
        capacity_bytes: int = 0,
        name: str | None = None,
    ) -> None:
        LinearFile.__init__(self, fd, writable=writable, capacity_bytes=capacity_bytes, name=name)
        Mapped.__init__(self)
        self.max_shared_perms = ANY_ACCESS if self.writable else READ_EXECUTE
        # Up to where pages were handed out since they were last taken back; guarded by _lock.
        self._seen_end = 0

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, writable: bool = False, capacity_bytes: int = 0
    ) -> Self:
        """Return the file at `path`, which must exist.

        Raises:
            SyscallError: It cannot be opened so, or as for the class.
            RangeError: As for the class.
        """
        name = os.fspath(path)
        try:
            fd = os.open(name, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as e:
            raise SyscallError(e.errno or 0, f"cannot open {name}") from e
        try:
            return cls(fd, writable=writable, capacity_bytes=capacity_bytes, name=name)
        finally:
            os.close(fd)

    # As a Mappable.

    def add_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """See `kvmmm.memmap.file.Mappable`.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap.
            StateError: Closed.
            SyscallError: Writable, but the file is not (EACCES).
        """
        self._check_open()
        if writable and not self.writable:
            raise self._read_only()
        super().add_mapping(space, ar, offset, writable=writable)

    def translate(
        self, required: FileRange, optional: FileRange, access: int
    ) -> tuple[list[Translation], OSError | None]:
        """See `kvmmm.memmap.file.Mappable`: offsets are file offsets, all in one piece.

        Returns:
            As there; the error is EIO behind the page in which the file ends now (or behind what is
            mapped of it), EACCES for writing to a read-only one.
        """
        self._check_open()
        if access & WRITE and not self.writable:
            return [], self._read_only()
        end = self.end()
        if required.start >= end:
            return [], self._behind(required.start)
        stop = min(optional.end, end)
        # Whoever cuts the file short now takes this back only after the caller has noted it: both
        # need the mm's active_lock.
        with self._lock:
            self._seen_end = max(self._seen_end, stop)
        start = optional.start
        found = Translation(start, stop, self, start, self.max_shared_perms)
        return [found], self._behind(stop) if stop < required.end else None

    def msync(self, start: int, end: int) -> None:
        """Write [start, end) back to the file's storage, and wait until it is there.

        Raises:
            StateError: Closed.
            SyscallError: The host could not (EIO, ENOSPC).
        """
        self._check_open()
        end = min(page_up(end), self.capacity_bytes)
        start = page_down(start)
        if start < end:
            try:
                self._mapping.sync(start, end)
            except OSError as e:
                raise SyscallError(e.errno or 0, f"cannot write {self.name} back") from e

    # Its size.

    def truncate(self, size_bytes: int) -> None:
        """Set the file's size. Pages wholly behind it are taken back, private copies with them.

        Preconditions:
            - The caller holds no lock of an mm.

        Raises:
            StateError: Closed.
            SyscallError: The host refused (EACCES, EINVAL, EPERM, EFBIG).
        """
        self._check_open()
        if not self.writable:
            raise self._read_only()
        try:
            os.ftruncate(self.fd, size_bytes)
        except OSError as e:
            raise SyscallError(e.errno or 0, f"cannot set the size of {self.name}") from e
        self.revalidate()

    def revalidate(self) -> bool:
        """Look whether somebody cut the file short; if so take back what is gone, as `truncate`.

        To be called when a CPU or the host failed to touch a page of it.

        Preconditions:
            - The caller holds no lock of an mm.

        Returns:
            Whether pages were handed out that are gone now.

        Raises:
            StateError: Closed.
        """
        self._check_open()
        # Held throughout: whoever asks meanwhile is answered when the pages have been taken back.
        with self._mappings_lock:
            end = self.end()
            with self._lock:
                is_cut = self._seen_end > end
                if is_cut:
                    self._seen_end = end
            if is_cut:
                self._mappings.invalidate(end, ADDRESS_LIMIT, private=True)
        return is_cut

    # The end.

    def close(self) -> None:
        """Unmap and close. A second call does nothing.

        Raises:
            StateError: It is mapped, or a page has a reference, or a view is held; nothing changed.
        """
        with self._mappings_lock:
            if self._mappings:
                raise StateError(f"{self.name} is still mapped")
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Refusals.

    def _read_only(self) -> SyscallError:
        return SyscallError(errno.EACCES, f"{self.name} is open for reading only")

    def _behind(self, fo: int) -> SyscallError:
        if fo < self.capacity_bytes:
            return SyscallError(errno.EIO, f"{self.name} ends before {fo:#x}")
        return SyscallError(
            errno.EIO,
            f"{self.name} is mapped to {self.capacity_bytes:#x} only, not to {fo:#x} "
            "(give HostFile a larger capacity_bytes)",
        )
