"""Memory that faults: behind the end of a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvmmm.memmap.host_file import HostFile
from tests.safemem.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[HostFile]:
    """A file of two pages, the second of which is gone: its address is still mapped."""
    path = tmp_path / "cut"
    path.write_bytes(bytes(range(256)) * 32)
    with HostFile.open(path, writable=True) as file:
        os.truncate(path, PAGE)
        yield file
