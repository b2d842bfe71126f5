"""Asking a `HostFile`, every answer checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ
from kvmmm.memmap.check import check_translations

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import Translation
    from kvmmm.memmap.host_file import HostFile

PAGE = 4096
SIZE = 5 * PAGE + 100


def content(n_bytes: int = SIZE) -> bytes:
    return bytes(i * 7 % 251 for i in range(n_bytes))


def translate(
    file: HostFile, required: FileRange, optional: FileRange, access: int = READ
) -> tuple[list[Translation], OSError | None]:
    answer = file.translate(required, optional, access)
    check_translations(required, optional, access, *answer)
    return answer


def read(file: HostFile, fo: int, n_bytes: int) -> bytes:
    buffer = bytearray(n_bytes)
    return bytes(buffer[: file.read_into(fo, memoryview(buffer))])
