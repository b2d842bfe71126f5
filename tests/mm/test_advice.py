"""madvise and mincore."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import MmError
from kvmmm.hostarch.access import NO_ACCESS
from kvmmm.memmap.host_file import HostFile
from kvmmm.mm import advice as a
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
TOP = 1 << 64
ALL = [
    0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 100, 101,
    -1, 5, 77,
]  # fmt: skip
IGNORED = {0, 1, 2, 3, 12, 13, 14, 15, 16, 17}
EFFECTIVE = {4, 10, 11}


@pytest.fixture
def setup(make: Make) -> Setup:
    """[0, 8 pages), touched."""
    setup = make()
    setup.map(0, 8 * PAGE)
    for i in range(8):
        setup.space.store(i * PAGE, bytes([i + 1]))
    return setup


def firsts(setup: Setup) -> list[int]:
    return [setup.space.load(i * PAGE, 1)[0] for i in range(8)]


@pytest.mark.parametrize("advice", ALL)
@pytest.mark.parametrize(
    ("addr", "length"), [(1, 0), (-PAGE, PAGE), (0, TOP), (PAGE, TOP - PAGE), (0, -1)]
)
def test_a_malformed_range(setup: Setup, advice: int, addr: int, length: int):
    setup.refuses(lambda: setup.mm.madvise(addr, length, advice), errno.EINVAL, "madvise")


@pytest.mark.parametrize("advice", ALL)
def test_what_each_says(setup: Setup, advice: int):
    before = setup.snapshot()
    setup.mm.madvise(0, 0, advice)
    if advice in IGNORED:
        setup.mm.madvise(0, PAGE, advice)
    elif advice not in EFFECTIVE:
        err = {9: errno.ENOSYS, 100: errno.EPERM}.get(advice, errno.EINVAL)
        setup.refuses(lambda: setup.mm.madvise(0, PAGE, advice), err)
    assert setup.snapshot() == before


class TestDontNeed:
    def test_private_memory_is_zero_again_and_free(self, setup: Setup):
        used = setup.arena.statistics().used_bytes
        setup.mm.madvise(2 * PAGE, 2 * PAGE - 1, a.MADV_DONTNEED)
        assert setup.arena.statistics().used_bytes == used - 2 * PAGE
        assert firsts(setup) == [1, 2, 0, 0, 5, 6, 7, 8]
        assert setup.vmas() == [(0, 8 * PAGE)]

    def test_shared_memory_keeps_its_bytes(self, make: Make):
        setup = make()
        ar = setup.mm.mmap(PAGE, private=False)
        setup.space.store(ar.start, b"kept")
        setup.mm.madvise(ar.start, PAGE, a.MADV_DONTNEED)
        assert not setup.mm.pmas
        assert setup.space.load(ar.start, 4) == b"kept"

    def test_a_private_file_shows_the_file_again(self, make: Make, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(b"file" + bytes(PAGE))
        setup = make()
        with HostFile.open(path) as file:
            ar = setup.mm.mmap(PAGE, mappable=file)
            setup.space.store(ar.start, b"mine")
            setup.mm.madvise(ar.start, PAGE, a.MADV_DONTNEED)
            assert setup.space.load(ar.start, 4) == b"file"
            setup.mm.munmap(ar.start, PAGE)
        assert path.read_bytes()[:4] == b"file"

    def test_locked_memory_ends_it(self, setup: Setup):
        setup.mm.mlock(4 * PAGE, PAGE)
        with pytest.raises(MmError) as caught:
            setup.mm.madvise(3 * PAGE, 5 * PAGE, a.MADV_DONTNEED)
        assert (caught.value.errno, caught.value.addr) == (errno.EINVAL, 4 * PAGE)
        assert firsts(setup) == [1, 2, 3, 0, 5, 6, 7, 8]

    def test_a_hole_is_said_when_all_is_done(self, setup: Setup):
        setup.mm.munmap(2 * PAGE, PAGE)
        with pytest.raises(MmError) as caught:
            setup.mm.madvise(PAGE, 16 * PAGE, a.MADV_DONTNEED)
        assert caught.value.errno == errno.ENOMEM
        assert setup.mm.rss_bytes == PAGE
        setup.check()

    def test_one_shootdown(self, setup: Setup):
        for i in range(8):
            setup.mm.set_anon_name(i * PAGE, PAGE, f"{i}")
        n = setup.space.n_shootdowns
        setup.mm.madvise(0, 8 * PAGE, a.MADV_DONTNEED)
        assert setup.space.n_shootdowns == n + 1


class TestDontFork:
    def test_split_and_merged(self, setup: Setup):
        setup.mm.madvise(2 * PAGE, PAGE, a.MADV_DONTFORK)
        assert [v.dontfork for _, _, v in setup.mm.vmas] == [False, True, False]
        setup.mm.madvise(0, 8 * PAGE, a.MADV_DONTFORK)
        assert [v.dontfork for _, _, v in setup.mm.vmas] == [True]
        setup.mm.madvise(0, 8 * PAGE, a.MADV_DOFORK)
        assert [v.dontfork for _, _, v in setup.mm.vmas] == [False]

    def test_a_hole_is_said_when_all_is_done(self, setup: Setup):
        setup.mm.munmap(2 * PAGE, PAGE)
        with pytest.raises(MmError) as caught:
            setup.mm.madvise(0, 8 * PAGE, a.MADV_DONTFORK)
        assert caught.value.errno == errno.ENOMEM
        assert all(v.dontfork for _, _, v in setup.mm.vmas)


class TestMincore:
    @pytest.mark.parametrize(
        ("addr", "length", "err"),
        [
            (1, PAGE, errno.EINVAL),
            (-PAGE, PAGE, errno.EINVAL),
            (0, TOP, errno.ENOMEM),
            (PAGE, TOP - PAGE, errno.ENOMEM),
            (0, -PAGE, errno.ENOMEM),
            (0, 8 * PAGE + 1, errno.ENOMEM),
            (16 * PAGE, PAGE, errno.ENOMEM),
        ],
    )
    def test_refused(self, setup: Setup, addr: int, length: int, err: int):
        setup.refuses(lambda: setup.mm.mincore(addr, length), err, "mincore")

    def test_every_mapped_page_is_resident(self, setup: Setup):
        setup.map(8 * PAGE, HUGE, NO_ACCESS)
        assert setup.mm.mincore(0, HUGE) == b"\1" * 512
        assert setup.mm.mincore(7 * PAGE, PAGE + 1) == b"\1\1"
        assert setup.mm.mincore(0, 0) == b""


def test_the_constants_are_linuxs():
    import mmap

    for name in [n for n in dir(a) if n.startswith("MADV_")]:
        assert getattr(mmap, name, getattr(a, name)) == getattr(a, name), name
    assert os.name == "posix"
