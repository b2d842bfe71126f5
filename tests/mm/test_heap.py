"""brk and set_brk."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import READ_WRITE
from kvmmm.mm import heap
from kvmmm.mm.vma import LOCK_EAGER, LOCK_LAZY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
START = 1 << 20
TOP = 1 << 64


@pytest.fixture
def setup(make: Make) -> Setup:
    setup = make()
    setup.mm.set_brk(START)
    return setup


def limit_data(setup: Setup) -> None:
    setup.mm.limits.data_bytes = PAGE - 1


def limit_space(setup: Setup) -> None:
    setup.mm.limits.address_space_bytes = 0


def nothing_lockable(setup: Setup) -> None:
    setup.mm.lock_mode = LOCK_LAZY
    setup.mm.limits.locked_bytes = 0


def little_lockable(setup: Setup) -> None:
    setup.mm.lock_mode = LOCK_EAGER
    setup.mm.limits.locked_bytes = PAGE - 1


REFUSED = [
    (START - 1, None, errno.EINVAL),
    (0, None, errno.EINVAL),
    (START + PAGE, limit_data, errno.ENOMEM),
    (TOP - 1, limit_data, errno.ENOMEM),
    (TOP - 1, None, errno.EFAULT),
    (MAX + 1, None, errno.ENOMEM),
    (START + 1, limit_space, errno.ENOMEM),
    (START + 1, lambda s: s.map(START, START + PAGE), errno.ENOMEM),
    (START + 1, nothing_lockable, errno.EPERM),
    (START + 1, little_lockable, errno.EAGAIN),
    (START + PAGE, lambda s: s.mm.mmap(PAGE, addr=START + 2 * PAGE, grows_down=True), errno.ENOMEM),
]


@pytest.mark.parametrize(("addr", "prepare", "err"), REFUSED)
def test_refused(setup: Setup, addr: int, prepare: Callable[[Setup], object] | None, err: int):
    if prepare is not None:
        prepare(setup)
    setup.refuses(lambda: heap.move_brk(setup.mm, addr), err, "brk")
    assert setup.mm.brk(addr) == START


def test_without_a_heap(make: Make):
    setup = make()
    assert setup.mm.brk(0) == 0
    setup.refuses(lambda: heap.move_brk(setup.mm, PAGE), errno.ENOMEM)
    assert setup.mm.brk(PAGE) == 0


def test_it_grows_and_shrinks_in_whole_pages(setup: Setup):
    assert setup.mm.brk(START + 10) == START + 10
    assert setup.vmas() == [(START, START + PAGE)]
    vma = setup.mm.vmas.find_value(START)
    assert (vma.name, vma.perms, vma.private) == ("[heap]", READ_WRITE, True)
    setup.space.store(START, b"kept")
    assert setup.mm.brk(START + PAGE) == START + PAGE
    assert setup.mm.brk(START + 5 * PAGE + 1) == START + 5 * PAGE + 1
    assert setup.vmas() == [(START, START + 6 * PAGE)]
    setup.space.store(START + 5 * PAGE, b"gone")
    assert setup.mm.brk(START + PAGE) == START + PAGE
    assert setup.vmas() == [(START, START + PAGE)]
    assert setup.space.load(START, 4) == b"kept"
    assert setup.mm.brk(START + 6 * PAGE) == START + 6 * PAGE
    assert setup.space.load(START + 5 * PAGE, 4) == bytes(4)
    assert setup.mm.brk(START) == START
    assert not setup.vmas()
    assert (setup.mm.brk_start, setup.mm.brk_end) == (START, START)


def test_a_start_within_a_page(make: Make):
    setup = make()
    setup.mm.set_brk(START + 100)
    assert setup.mm.brk(START + PAGE) == START + PAGE  # the page is the program's
    assert not setup.vmas()
    setup.mm.brk(START + PAGE + 1)
    assert setup.vmas() == [(START + PAGE, START + 2 * PAGE)]


def test_a_new_heap_takes_the_old_one_away(setup: Setup):
    setup.mm.brk(START + 4 * PAGE)
    setup.mm.set_brk(START + 64 * PAGE)
    assert not setup.vmas()
    assert setup.mm.brk(0) == START + 64 * PAGE


@pytest.mark.parametrize("start", [-1, MAX + 1])
def test_no_heap_outside(setup: Setup, start: int):
    setup.mm.brk(START + 4 * PAGE)
    setup.refuses(lambda: setup.mm.set_brk(start), errno.EINVAL)


def test_locked_in_future_is_resident_at_once(setup: Setup):
    setup.mm.mlockall(future=True)
    setup.mm.brk(START + 3 * PAGE)
    assert setup.mm.rss_bytes == setup.mm.locked_bytes == 3 * PAGE
    setup.mm.brk(START + PAGE)
    assert setup.mm.locked_bytes == PAGE
