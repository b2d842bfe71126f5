"""The sealed memfd: a file without a name whose size nobody can change any more.

The seals are what makes the mapping safe to touch: a file that shrinks under a mapping turns every
access behind its end into SIGBUS, in the host and in KVM_RUN.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from kvmmm.errors import SyscallError

if TYPE_CHECKING:
    from collections.abc import Iterator

# <linux/memfd.h>; the os module of Python 3.11 lacks it. Clears the x bits for good.
_MFD_NOEXEC_SEAL = 0x8
_FLAGS_OLD = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

# What this kernel takes: MFD_NOEXEC_SEAL came with Linux 6.3.
_flags = _FLAGS_OLD | _MFD_NOEXEC_SEAL


def create_sealed(name: str, length_bytes: int) -> int:
    """Return the file descriptor of a new memfd of `length_bytes` zero bytes, sealed.

    It is sparse: nothing is allocated until it is touched, whatever its size. Holes may be punched.

    Args:
        name: Shown in /proc/<pid>/maps as `/memfd:name`.
        length_bytes: Its size for ever, in bytes.

    Raises:
        SyscallError: The kernel refused: no file descriptor left (EMFILE), no memory (ENOMEM), …

    Source: memfd_create(2), fcntl(2) "File sealing".
    """
    fd = -1
    try:
        fd = _memfd_create(name)
        os.ftruncate(fd, length_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        raise SyscallError(
            e.errno or 0, f"cannot make a sealed memfd of {length_bytes >> 20} MiB"
        ) from e
    return fd


def _memfd_create(name: str) -> int:
    global _flags  # noqa: PLW0603  one answer for the process, asked once
    try:
        return os.memfd_create(name, _flags)
    except OSError as e:
        if e.errno != errno.EINVAL or _flags == _FLAGS_OLD:
            raise
    fd = os.memfd_create(name, _FLAGS_OLD)
    _flags = _FLAGS_OLD
    return fd


def data_runs(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces of [start, end) that are not holes, as offsets, ascending.

    Raises:
        OSError: lseek(2) refused.
    """
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            raise
        if start < end:
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            yield start, stop
            start = stop
