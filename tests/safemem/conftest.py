"""Memory that faults: behind the end of a file; the read section; threads one at a time."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from kvmmm.memmap.host_file import HostFile
from kvmmm.safemem.ffi import CopyCore
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


@pytest.fixture
def core() -> CopyCore:
    """A core over no memory at all."""
    return CopyCore(1 << 30, PAGE, 0)


@pytest.fixture
def no_switches() -> Iterator[None]:
    """No thread is told to give up the interpreter: another runs only while this one waits."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)
