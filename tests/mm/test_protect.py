"""mprotect: every reason to refuse, what it changes before a hole, and what it costs."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import GuestFaultError, MmError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, NO_ACCESS, READ, READ_WRITE, WRITE
from tests.mm.conftest import HUGE, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
TOP = 1 << 64


@pytest.fixture
def setup(make: Make) -> Setup:
    """[0x1000, 0x5000), and a stack at 16 MiB."""
    setup = make()
    setup.map(0x1000, 0x5000)
    setup.space.store(0x1000, b"kept")
    setup.mm.mmap(0x4000, addr=16 << 20, fixed=True, grows_down=True)
    return setup


REFUSED = [
    ((0x1001, 0, READ), {}, errno.EINVAL),
    ((-PAGE, PAGE, READ), {}, errno.EINVAL),
    ((0x1000, PAGE, 8), {}, errno.EINVAL),
    ((0x1000, TOP, READ), {}, errno.ENOMEM),
    ((TOP - PAGE, PAGE, READ), {}, errno.ENOMEM),
    ((0x1000, -1, READ), {}, errno.ENOMEM),
    ((0, 2 * PAGE, READ), {}, errno.ENOMEM),  # begins with a hole
    ((0x5000, PAGE, READ), {}, errno.ENOMEM),
    ((128 << 20, PAGE, READ), {}, errno.ENOMEM),  # nothing from there on
    ((0x1000, PAGE, READ), {"grows_down": True}, errno.EINVAL),
    ((8 << 20, PAGE, READ), {"grows_down": True}, errno.ENOMEM),  # the stack is above
    ((128 << 20, PAGE, READ), {"grows_down": True}, errno.ENOMEM),
]


@pytest.mark.parametrize(("args", "more", "err"), REFUSED)
def test_refused(setup: Setup, args: tuple[int, int, int], more: dict[str, bool], err: int):
    setup.refuses(lambda: setup.mm.mprotect(*args, **more), err, "mprotect")


def test_length_0_is_nothing(setup: Setup):
    before = setup.snapshot()
    setup.mm.mprotect(0x1000, 0, READ)
    setup.mm.mprotect(128 << 20, 0, READ)
    assert setup.snapshot() == before


def test_the_same_again_is_nothing(setup: Setup):
    before = setup.snapshot()
    setup.mm.mprotect(0x2000, PAGE, READ_WRITE)
    assert setup.snapshot() == before


def test_a_hole_ends_it_and_what_comes_before_has_changed(setup: Setup):
    setup.map(0x6000, 0x7000)
    with pytest.raises(MmError) as caught:
        setup.mm.mprotect(0x3000, 4 * PAGE, READ)
    assert (caught.value.errno, caught.value.addr) == (errno.ENOMEM, 0x5000)
    assert [(s, e, v.perms) for s, e, v in setup.mm.vmas][:3] == [
        (0x1000, 0x3000, READ_WRITE), (0x3000, 0x5000, READ), (0x6000, 0x7000, READ_WRITE),
    ]  # fmt: skip
    setup.check()


@pytest.mark.parametrize("wanted", [WRITE, READ_WRITE])
def test_a_vma_that_may_not_ends_it_before_it_is_split(setup: Setup, wanted: int):
    setup.map(0x5000, 0x8000, READ, max_perms=READ | EXECUTE)
    with pytest.raises(MmError) as caught:
        setup.mm.mprotect(0x4000, 2 * PAGE, wanted)
    assert (caught.value.errno, caught.value.addr) == (errno.EACCES, 0x5000)
    assert (0x5000, 0x8000) in setup.vmas()
    assert setup.mm.vmas.find_value(0x4000).perms == wanted
    setup.check()


def test_execute_takes_the_right_to_read(setup: Setup):
    setup.map(0x5000, 0x6000, NO_ACCESS, max_perms=NO_ACCESS)
    setup.refuses(lambda: setup.mm.mprotect(0x5000, PAGE, EXECUTE), errno.EACCES)


def test_from_the_start_of_a_stack(setup: Setup):
    start = 16 << 20
    setup.mm.mprotect(start + 0x2000, PAGE, READ, grows_down=True)
    found = [(s, e, v.perms) for s, e, v in setup.mm.vmas if s >= start]
    assert found == [(start, start + 0x3000, READ), (start + 0x3000, start + 0x4000, READ_WRITE)]
    # A range that only reaches into it does as well.
    setup.mm.mprotect(start - PAGE, 2 * PAGE, NO_ACCESS, grows_down=True)
    assert setup.mm.vmas.find(start)[:2] == (start, start + PAGE)


class TestTranslations:
    def test_a_loss_drops_them_and_frames_stay(self, make: Make):
        setup = make()
        setup.map(0, 2 * HUGE)
        setup.space.store(0, b"kept")
        setup.mm.mprotect(0, PAGE, READ)
        assert 0 not in setup.space.pages
        assert setup.space.load(0, 4) == b"kept"
        with pytest.raises(GuestFaultError) as caught:
            setup.space.store(0, b"lost")
        assert caught.value.mapped
        assert setup.mm.counters.pma_hits == 1

    def test_a_gain_costs_no_shootdown(self, make: Make):
        setup = make()
        setup.map(0, HUGE, READ)
        setup.space.load(0, 1)
        n = setup.space.n_shootdowns
        setup.mm.mprotect(0, HUGE, ANY_ACCESS)
        assert setup.space.n_shootdowns == n
        setup.space.store(0, b"x")
        setup.space.load(0, 1, EXECUTE)

    def test_a_loss_in_many_vmas_is_one_shootdown(self, make: Make):
        setup = make()
        for i in range(8):
            setup.map(i * PAGE, (i + 1) * PAGE, name=f"{i}")
            setup.space.store(i * PAGE, bytes([i]))
        n = setup.space.n_shootdowns
        setup.mm.mprotect(0, 8 * PAGE, READ)
        assert setup.space.n_shootdowns == n + 1
        assert [setup.space.load(i * PAGE, 1)[0] for i in range(8)] == list(range(8))

    def test_no_permissions_keep_the_bytes(self, make: Make):
        setup = make()
        setup.map(0, PAGE)
        setup.space.store(0, b"kept")
        setup.mm.mprotect(0, PAGE, NO_ACCESS)
        with pytest.raises(GuestFaultError):
            setup.space.load(0, 1)
        setup.mm.mprotect(0, PAGE, READ)
        assert setup.space.load(0, 4) == b"kept"

    def test_vmas_and_pmas_become_one_again(self, make: Make):
        setup = make()
        setup.map(0, 8 * PAGE)
        setup.space.store(0, b"x")
        setup.mm.mprotect(2 * PAGE, 2 * PAGE, READ)
        assert (len(setup.mm.vmas), len(setup.mm.pmas)) == (3, 3)
        setup.mm.mprotect(2 * PAGE, 2 * PAGE, READ_WRITE)
        assert (len(setup.mm.vmas), len(setup.mm.pmas)) == (1, 1)

    def test_a_private_file_is_not_written_through_after_an_upgrade(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, PAGE)
        shared = setup.mm.mmap(PAGE, mappable=memory, private=False)
        private = setup.mm.mmap(PAGE, READ, mappable=memory)
        assert setup.space.load(private.start, 1) == b"\0"
        setup.mm.mprotect(private.start, PAGE, READ_WRITE)
        setup.space.store(private.start, b"mine")
        assert setup.space.load(shared.start, 4) == bytes(4)
        assert setup.space.load(private.start, 4) == b"mine"
