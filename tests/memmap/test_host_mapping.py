"""HostMapping as memmap uses it: read-only, and written back."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from kvmmm.safemem.ffi import HostMapping

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


@pytest.fixture
def fd(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_read_only_descriptor_takes_a_read_only_mapping(fd: int):
    with pytest.raises(PermissionError):
        HostMapping(fd, PAGE, PAGE)
    mapping = HostMapping(fd, PAGE, PAGE, writable=False)
    with memoryview(mapping) as view:
        assert view.readonly
        assert view[0] == ord("x")
    mapping.sync(0, PAGE)
    mapping.close()


def test_sync_checks_its_range(fd: int):
    mapping = HostMapping(fd, PAGE, PAGE, False)
    for start, end in ((-1, PAGE), (0, PAGE + 1), (PAGE, 0)):
        with pytest.raises(ValueError, match="outside the mapping"):
            mapping.sync(start, end)
    with pytest.raises(OSError, match="Invalid argument") as e:
        mapping.sync(1, PAGE)
    assert e.value.errno == errno.EINVAL
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.sync(0, PAGE)
