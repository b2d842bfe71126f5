"""mlock, munlock, mlockall, munlockall: limits, marks, residence."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import MmError
from kvmmm.hostarch.access import NO_ACCESS, READ
from kvmmm.memmap.host_file import HostFile
from kvmmm.mm.vma import LOCK_EAGER, LOCK_LAZY, LOCK_NONE
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def setup(make: Make) -> Setup:
    setup = make()
    setup.map(0, 8 * PAGE)
    return setup


def modes(setup: Setup) -> list[tuple[int, int, int]]:
    return [(s // PAGE, e // PAGE, v.lock_mode) for s, e, v in setup.mm.vmas]


def caught_errno(call: Callable[[], object]) -> tuple[int, int]:
    with pytest.raises(MmError) as caught:
        call()
    return caught.value.errno or 0, caught.value.addr


class TestRefused:
    @pytest.mark.parametrize("mode", [LOCK_NONE, LOCK_LAZY, LOCK_EAGER])
    @pytest.mark.parametrize(
        ("addr", "length"), [(0, TOP), (PAGE, TOP - PAGE), (0, -1), (-1, 1), (TOP - 1, 1)]
    )
    def test_a_range_that_wraps(self, setup: Setup, mode: int, addr: int, length: int):
        setup.mm.limits.locked_bytes = 0
        setup.refuses(lambda: setup.mm.mlock(addr, length, mode), errno.EINVAL, "mlock")

    @pytest.mark.parametrize("length", [0, PAGE])
    def test_nothing_may_be_locked(self, setup: Setup, length: int):
        setup.mm.limits.locked_bytes = 0
        setup.refuses(lambda: setup.mm.mlock(0, length), errno.EPERM)
        setup.refuses(lambda: setup.mm.mlockall(current=True), errno.EPERM)
        setup.mm.munlock(0, PAGE)
        setup.mm.mlockall(future=True)  # asks for nothing now
        setup.mm.munlockall()

    def test_the_limit_counts_pages_once(self, setup: Setup):
        setup.mm.limits.locked_bytes = 3 * PAGE
        setup.refuses(lambda: setup.mm.mlock(0, 4 * PAGE), errno.ENOMEM)
        setup.mm.mlock(0, 2 * PAGE)
        setup.mm.mlock(0, 3 * PAGE, LOCK_LAZY)
        setup.refuses(lambda: setup.mm.mlock(PAGE, 3 * PAGE), errno.ENOMEM)
        setup.refuses(lambda: setup.mm.mlockall(current=True), errno.ENOMEM)
        setup.mm.limits.may_lock_all = True
        setup.mm.mlockall(current=True)
        assert setup.mm.locked_bytes == 8 * PAGE

    def test_of_nothing_the_limit_is_asked_first(self, setup: Setup):
        before = setup.snapshot()
        setup.mm.mlock(128 << 20, 0)
        assert setup.snapshot() == before

    def test_neither_now_nor_later(self, setup: Setup):
        setup.refuses(setup.mm.mlockall, errno.EINVAL, "mlockall")


class TestMarks:
    def test_whole_pages(self, setup: Setup):
        setup.mm.mlock(2 * PAGE - 1, 2, LOCK_LAZY)
        assert modes(setup) == [(0, 1, 0), (1, 3, LOCK_LAZY), (3, 8, 0)]
        assert setup.mm.locked_bytes == 2 * PAGE
        setup.mm.munlock(2 * PAGE + 1, 1)
        assert modes(setup) == [(0, 1, 0), (1, 2, LOCK_LAZY), (2, 8, 0)]
        setup.mm.munlockall()
        assert modes(setup) == [(0, 8, 0)]

    def test_a_hole_ends_it_before_anything_is_resident(self, setup: Setup):
        setup.map(9 * PAGE, 10 * PAGE)
        error = caught_errno(lambda: setup.mm.mlock(6 * PAGE, 4 * PAGE))
        assert error == (errno.ENOMEM, 8 * PAGE)
        assert modes(setup) == [(0, 6, 0), (6, 8, LOCK_EAGER), (9, 10, 0)]
        assert not setup.mm.pmas
        error = caught_errno(lambda: setup.mm.munlock(6 * PAGE, 4 * PAGE))
        assert error == (errno.ENOMEM, 8 * PAGE)
        assert not setup.mm.locked_bytes

    def test_all_now_and_all_later(self, setup: Setup):
        setup.map(HUGE, HUGE + PAGE, NO_ACCESS)
        setup.mm.mlockall(current=True, future=True)
        assert setup.mm.locked_bytes == 9 * PAGE
        assert setup.mm.rss_bytes == 8 * PAGE  # what nobody may touch is left out
        ar = setup.mm.mmap(2 * PAGE)
        assert setup.mm.rss_bytes == 10 * PAGE
        assert setup.space.is_mapped(ar.start + PAGE, READ)
        setup.mm.munlockall()
        assert not setup.mm.locked_bytes
        setup.mm.mmap(2 * PAGE)
        assert setup.mm.rss_bytes == 10 * PAGE

    def test_later_only(self, setup: Setup):
        setup.mm.mlockall(future=True, mode=LOCK_LAZY)
        assert not setup.mm.locked_bytes
        setup.map(8 * PAGE, 9 * PAGE)
        setup.map(9 * PAGE, 10 * PAGE, lock_mode=LOCK_EAGER)
        assert modes(setup) == [(0, 8, 0), (8, 10, LOCK_LAZY)]
        setup.mm.mlockall(current=True, mode=LOCK_NONE)
        assert setup.mm.lock_mode == LOCK_LAZY

    def test_unmapping_unlocks(self, setup: Setup):
        setup.mm.mlock(0, 8 * PAGE)
        setup.mm.munmap(0, 3 * PAGE)
        assert setup.mm.locked_bytes == 5 * PAGE


class TestResidence:
    @pytest.mark.parametrize("mode", [LOCK_EAGER, LOCK_LAZY])
    def test_eager_is_now(self, setup: Setup, mode: int):
        setup.mm.mlock(PAGE, 3 * PAGE, mode)
        assert setup.mm.rss_bytes == (3 * PAGE if mode == LOCK_EAGER else 0)

    def test_what_nobody_may_touch(self, setup: Setup):
        setup.mm.mprotect(2 * PAGE, PAGE, NO_ACCESS)
        error = caught_errno(lambda: setup.mm.mlock(0, 8 * PAGE))
        assert error == (errno.ENOMEM, 2 * PAGE)
        assert setup.mm.locked_bytes == 8 * PAGE
        assert setup.mm.rss_bytes == 2 * PAGE
        setup.check()

    def test_behind_the_end_of_a_file(self, make: Make, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(bytes(PAGE))
        setup = make()
        with HostFile.open(path) as file:
            ar = setup.mm.mmap(2 * PAGE, READ, mappable=file)
            error = caught_errno(lambda: setup.mm.mlock(ar.start, 2 * PAGE))
            assert error == (errno.ENOMEM, ar.start + PAGE)
            setup.mm.munmap(ar.start, 2 * PAGE)

    def test_no_memory_left(self, make: Make):
        setup = make(HUGE)
        ar = setup.mm.mmap(2 * HUGE)
        assert caught_errno(lambda: setup.mm.mlock(ar.start, 2 * HUGE))[0] == errno.EAGAIN
        assert setup.mm.locked_bytes == 2 * HUGE
        setup.check()


def test_mmap_of_locked_memory(make: Make):
    setup = make()
    limits = setup.mm.limits
    limits.locked_bytes = 0
    setup.refuses(lambda: setup.mm.mmap(PAGE, lock_mode=LOCK_LAZY), errno.EPERM)
    limits.locked_bytes = 3 * PAGE
    setup.refuses(lambda: setup.mm.mmap(4 * PAGE, lock_mode=LOCK_EAGER), errno.EAGAIN)
    setup.map(0, 3 * PAGE, lock_mode=LOCK_EAGER)
    setup.refuses(lambda: setup.mm.mmap(PAGE, lock_mode=LOCK_LAZY), errno.EAGAIN)
    # What is replaced does not count.
    setup.map(PAGE, 3 * PAGE, READ, lock_mode=LOCK_LAZY)
    assert setup.mm.locked_bytes == 3 * PAGE
    limits.may_lock_all = True
    setup.mm.mmap(64 * PAGE, lock_mode=LOCK_LAZY)
