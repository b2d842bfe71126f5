"""A host file to map: `SIZE` bytes of `content()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.memmap.host_file import HostFile
from tests.memmap.asking import content

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(content())
    return path


@pytest.fixture
def file(path: Path):
    with HostFile.open(path, writable=True) as file:
        yield file
