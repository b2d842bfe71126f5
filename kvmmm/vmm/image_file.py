"""Reading image files: what cannot be read, and why; which file is the one that was read before."""

from __future__ import annotations

import errno
import os
import stat

from kvmmm.errors import EXIT_NO_INPUT, ImageError
from kvmmm.hostarch.units import format_bytes
from kvmmm.vmm import elf

# Debug information may make a file larger than the memory it is loaded into; this is enough of it.
FILE_LIMIT_BYTES = 256 << 20
# What tells an ELF, and which one.
_BEGINNING_BYTES = 64

_LOOKS_LIKE = (
    (b"\x1f\x8b", "a gzip file"),
    (b"!<arch>", "a static library (ar archive)"),
    (b"MZ", "a PE/EFI executable or a Linux bzImage"),
    (b"#!", "a script"),
)


class ImageNotFoundError(ImageError, OSError):
    """The file cannot be read: missing, not permitted, a directory, or no regular file.

    Attributes:
        path: The image, as the caller named it.
        reason: Why.
        remedy: What to do about it.
        errno: What the kernel answered (EINVAL for what is not a regular file).
    """

    exit_code = EXIT_NO_INPUT

    def __init__(self, path: str, err: int, reason: str, remedy: str = "") -> None:
        super().__init__(path, reason, remedy)
        self.errno = err

    def __str__(self) -> str:
        return str(self.args[0])


def identity(path: str) -> tuple[object, ...] | None:
    """Return what changes when a regular file is written to or replaced; None for anything else."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path costs as much as the call
    except (OSError, ValueError):
        return None  # reading it says why
    if not stat.S_ISREG(status.st_mode):
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def read_file(path: str, limit_bytes: int) -> bytes:
    """Return the contents of a regular file.

    Raises:
        ImageNotFoundError: It cannot be read.
        ImageError: It is larger than `limit_bytes`.
    """
    # O_NONBLOCK: opening a FIFO that nobody writes must not hang; regular files ignore it.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as e:  # ValueError: the name itself holds a NUL
        raise _unreadable(path, e) from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path, status.st_mode)
        if status.st_size > limit_bytes:
            raise _too_large(path, os.read(fd, _BEGINNING_BYTES), status.st_size, limit_bytes)
        data = os.read(fd, status.st_size)
        while len(data) < status.st_size:  # one read() gives at most 2 GiB
            more = os.read(fd, status.st_size - len(data))
            if not more:
                break
            data += more
    except ImageError:
        raise  # some of them are OSErrors as well
    except OSError as e:
        raise _unreadable(path, e) from e
    else:
        return data
    finally:
        os.close(fd)


def _unreadable(path: str, cause: OSError | ValueError) -> ImageNotFoundError:
    if not isinstance(cause, OSError):
        return ImageNotFoundError(elf.printable(path), errno.EINVAL, f"no file name: {cause}")
    err = cause.errno or errno.EIO
    reason = f"cannot be read: {os.strerror(err)}"
    if err == errno.ENOENT:
        reason = "there is no such file"
        remedy = "`kvmmm guests` lists the guests that are known by name"
    elif err in (errno.EACCES, errno.EPERM):
        remedy = f"make it readable: chmod +r {path}"
    else:
        remedy = ""
    return ImageNotFoundError(path, err, reason, remedy)


def _not_regular(path: str, mode: int) -> ImageNotFoundError:
    if stat.S_ISDIR(mode):
        return ImageNotFoundError(path, errno.EISDIR, "a directory", "name a file in it")
    return ImageNotFoundError(path, errno.EINVAL, "not a regular file", "copy it into one first")


def _too_large(path: str, beginning: bytes, size_bytes: int, limit_bytes: int) -> ImageError:
    # An ELF of another kind is a better reason than a size.
    if beginning.startswith(elf.ELF_MAGIC):
        elf.check_ident(path, beginning)
    return ImageError(
        path,
        f"the file has {format_bytes(size_bytes)}, and at most {format_bytes(limit_bytes)} are "
        f"read{looks_like(beginning)}",
        "is it the right file? Debug information can be removed with strip -g",
    )


def looks_like(data: bytes) -> str:
    """Return ` (it looks like ...)` for a file that is known by its beginning, or nothing."""
    for magic, name in _LOOKS_LIKE:
        if data.startswith(magic):
            return f" (it looks like {name})"
    return ""
