"""One layer of the machine's root file system: what it holds, its fingerprint, its archive.

Everything stands in the machine under the path that it has on the host. So a virtual environment,
an editable install and the paths in a traceback are right there without being rewritten.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bytecode import compiled
from cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable

_DIRECTORY = stat.S_IFDIR | 0o755


class Layer:
    """Files, directories and links to be, by absolute path."""

    def __init__(self) -> None:
        self._modes: dict[str, int] = {}
        self._contents: dict[str, bytes] = {}
        self._sources: dict[str, os.stat_result] = {}

    def directory(self, path: str, permissions: int = 0o755) -> None:
        """Add an empty directory and what lies above it."""
        for parent in reversed(Path(path).parents[:-1]):
            self._modes.setdefault(str(parent), _DIRECTORY)
        self._modes[path] = stat.S_IFDIR | permissions

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self.directory(str(Path(path).parent))
        self._modes[path] = stat.S_IFLNK | 0o777
        self._contents[path] = os.fsencode(target)

    def content(self, path: str, content: bytes, permissions: int = 0o644) -> None:
        """Add a file with this content."""
        self.directory(str(Path(path).parent))
        self._modes[path] = stat.S_IFREG | permissions
        self._contents[path] = content

    def mirror(self, path: str | Path) -> str:
        """Add a file or directory of the host, and the symbolic links on the way to it.

        Returns:
            Its path without symbolic links.
        """
        todo = list(reversed(Path(path).parts[1:]))
        here = "/"
        while todo:
            name = todo.pop()
            there = str(Path(here).parent) if name == ".." else str(Path(here) / name)
            if there in self._modes and stat.S_ISDIR(self._modes[there]):
                here = there
                continue
            status = os.lstat(there)
            if stat.S_ISLNK(status.st_mode):
                target = Path(os.readlink(there))  # noqa: PTH115 - text, not resolved
                self.symlink(there, str(target))
                here = "/" if target.is_absolute() else here
                todo += reversed(target.parts[target.is_absolute() :])
                continue
            here = there
            if stat.S_ISDIR(status.st_mode):
                self._modes[here] = _DIRECTORY
            elif stat.S_ISREG(status.st_mode):
                self._modes[here] = stat.S_IFREG | (0o755 if status.st_mode & 0o111 else 0o644)
                self._sources[here] = status
        return here

    def mirror_tree(self, top: str | Path, keep: Callable[[os.DirEntry[str]], bool]) -> None:
        """Add everything below a directory of the host for which `keep` answers True."""
        todo = [self.mirror(top)]
        while todo:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    if not keep(entry):
                        continue
                    if entry.is_symlink():
                        if Path(entry.path).exists():
                            self.mirror(entry.path)
                    elif entry.is_dir():
                        self._modes[entry.path] = _DIRECTORY
                        todo.append(entry.path)
                    else:
                        self.mirror(entry.path)

    def libraries(self) -> list[str]:
        """Return the host's shared libraries in this layer."""
        return [path for path in self._sources if ".so" in Path(path).suffixes]

    def fingerprint(self) -> str:
        """Return a digest that changes when the layer does (files: by size and time)."""
        digest = hashlib.sha256()
        for path, mode in sorted(self._modes.items()):
            status = self._sources.get(path)
            facts = (status.st_size, status.st_mtime_ns) if status else self._contents.get(path)
            digest.update(repr((path, mode, facts)).encode())
        return digest.hexdigest()

    def write(self, out: BinaryIO) -> None:
        """Write the layer as an archive; Python sources bring their bytecode."""
        archive = Archive(out)
        for name, mode in sorted(self._modes.items()):  # parents before children
            status = self._sources.get(name)
            if status is None:
                archive.add(name, mode, self._contents.get(name, b""))
            else:
                archive.add(name, mode, Path(name).read_bytes(), int(status.st_mtime))
        self._write_bytecode(archive)
        archive.close()

    def _write_bytecode(self, archive: Archive) -> None:
        made = set()
        for source, status in self._sources.items():
            if not source.endswith(".py"):
                continue
            for path, content in compiled(source, status):
                folder = str(Path(path).parent)
                if folder not in made:
                    made.add(folder)
                    archive.add(folder, _DIRECTORY)
                archive.add(path, stat.S_IFREG | 0o644, content)
