"""The cpio "newc" format, which the kernel unpacks into its first root file system.

Archives may be laid end to end: the kernel unpacks them in turn and a later file replaces an
earlier one, which is what makes an image out of layers.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import BinaryIO

_TRAILER = "TRAILER!!!"


class Archive:
    """Writes one archive; every member belongs to root."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0

    def add(self, path: str, mode: int, data: bytes = b"", mtime_s: int = 0) -> None:
        """Append one member.

        Args:
            path: Absolute path inside the machine.
            mode: File type and permission bits, as in `st_mode`.
            data: Content of a file, or target of a symbolic link.
            mtime_s: Modification time, in seconds since 1970.
        """
        links = 2 if stat.S_ISDIR(mode) else 1
        self._member(path.lstrip("/"), mode, links, data, mtime_s)

    def close(self) -> None:
        """Append the end mark. The file itself stays open."""
        self._member(_TRAILER, 0, 1, b"", 0)

    def _member(self, name: str, mode: int, links: int, data: bytes, mtime_s: int) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        numbers = (
            self._inode, mode, 0, 0, links, mtime_s & 0xFFFF_FFFF, len(data),  # 0, 0: uid, gid
            0, 0, 0, 0, len(encoded), 0,  # device numbers; no checksum
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
        self._out.write(header + _padding(len(header)) + data + _padding(len(data)))


def _padding(length_bytes: int) -> bytes:
    # Header with name, and data, each end on a multiple of four bytes.
    return bytes(-length_bytes % 4)
