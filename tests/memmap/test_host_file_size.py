"""HostFile: what happens to its pages when somebody changes its size."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import SyscallError
from kvmmm.hostarch.ranges import AddrRange, FileRange
from tests.memmap.asking import PAGE, SIZE, content, read, translate
from tests.memmap.fake_space import FakeSpace

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.memmap.host_file import HostFile

HUGE = 1 << 21


def test_truncate_takes_back_what_is_gone(file: HostFile, path: Path):
    space, ar = FakeSpace(), AddrRange(0x40000, 0x40000 + 8 * PAGE)
    file.add_mapping(space, ar, 0, writable=True)
    translate(file, FileRange(0, PAGE), FileRange(0, 8 * PAGE))
    file.truncate(2 * PAGE + 1)
    assert path.stat().st_size == 2 * PAGE + 1
    assert space.invalidated == [(0x40000 + 3 * PAGE, 0x40000 + 8 * PAGE)]
    assert space.private == [True]
    page = FileRange(3 * PAGE, 4 * PAGE)
    assert translate(file, page, page)[0] == []
    file.truncate(8 * PAGE)  # longer again: there is nothing to take back
    assert len(space.invalidated) == 1
    assert translate(file, page, page)[1] is None
    file.remove_mapping(space, ar, 0, writable=True)


def test_truncate_refused(file: HostFile):
    with pytest.raises(SyscallError) as e:
        file.truncate(-1)
    assert e.value.errno == errno.EINVAL


def test_cut_short_by_others(file: HostFile, path: Path):
    space, ar = FakeSpace(), AddrRange(0x40000, 0x40000 + 6 * PAGE)
    file.add_mapping(space, ar, 0, writable=False)
    assert not file.revalidate()
    os.truncate(path, PAGE)
    assert not file.revalidate()  # nothing had been handed out
    os.truncate(path, SIZE)
    translate(file, FileRange(0, PAGE), FileRange(0, 6 * PAGE))
    os.truncate(path, PAGE + 1)
    assert read(file, 0, SIZE) == content()[:PAGE] + bytes(PAGE)  # no SIGBUS, nothing invented
    assert file.write_from(PAGE, memoryview(b"y" * 3 * PAGE)) == PAGE
    assert path.stat().st_size == PAGE + 1
    assert file.revalidate()
    assert space.invalidated == [(0x40000 + 2 * PAGE, 0x40000 + 6 * PAGE)]
    assert not file.revalidate()
    file.remove_mapping(space, ar, 0, writable=False)


def test_copying_what_was_cut_short_is_no_bus_error(file: HostFile, path: Path):
    with Arena(2 * HUGE, debug=False) as arena:
        translate(file, FileRange(0, PAGE), FileRange(0, 6 * PAGE))
        os.truncate(path, 2 * PAGE)
        fr, n_bytes = arena.copy_from(file, 0, 5 * PAGE)
        assert (fr.length_bytes, n_bytes) == (2 * PAGE, 2 * PAGE)
        with arena.view_of(fr) as view:
            assert view == content()[: 2 * PAGE]
        assert arena.copy_from(file, 2 * PAGE, PAGE)[1] == 0
        assert arena.statistics().used_bytes == 2 * PAGE


def test_a_file_cut_and_grown_all_the_time(file: HostFile, path: Path):
    done = threading.Event()

    def cut() -> None:
        while not done.is_set():
            os.truncate(path, PAGE)
            os.truncate(path, 64 * PAGE)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        with Arena(2 * HUGE, debug=False) as arena:
            for _ in range(200):
                assert len(read(file, 0, 64 * PAGE)) in {PAGE * i for i in range(65)}
                fr, n_bytes = arena.copy_from(file, 0, 64 * PAGE)
                assert PAGE <= n_bytes == fr.length_bytes
                arena.dec_ref(fr)
                file.revalidate()
            assert arena.statistics().used_bytes == 0
    finally:
        done.set()
        thread.join(timeout=60)
