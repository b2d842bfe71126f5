"""mremap: every reason to refuse, and what moves, grows, shrinks and doubles."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError, MmError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.mm.vma import LOCK_EAGER
from tests.mm.conftest import HUGE, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
TOP = 1 << 64
AT = 0x10_0000  # 4 pages, then 4 of another vma
FREE = 0x80_0000


@pytest.fixture
def setup(make: Make) -> Setup:
    setup = make()
    setup.map(AT, AT + 4 * PAGE, name="first")
    setup.map(AT + 4 * PAGE, AT + 8 * PAGE, READ, name="second")
    setup.space.store(AT, b"zero")
    setup.space.store(AT + 3 * PAGE, b"three")
    return setup


MOVE = {"may_move": True}
REFUSED: list[tuple[tuple[int, int, int], dict[str, Any], int]] = [
    ((AT + 1, PAGE, PAGE), {}, errno.EINVAL),
    ((-PAGE, PAGE, PAGE), {}, errno.EINVAL),
    ((AT, PAGE, 0), {}, errno.EINVAL),
    ((AT, PAGE, TOP - 1), {}, errno.EINVAL),
    ((AT, TOP - AT, PAGE), {}, errno.EINVAL),
    ((0, PAGE, PAGE), {}, errno.EFAULT),
    ((FREE, PAGE, 2 * PAGE), MOVE, errno.EFAULT),
    ((AT, 5 * PAGE, 6 * PAGE), {}, errno.EFAULT),  # two vmas
    ((AT, 5 * PAGE, 6 * PAGE), MOVE, errno.EFAULT),
    ((AT, 4 * PAGE, 5 * PAGE), {}, errno.ENOMEM),  # no room
    ((AT, 0, PAGE), {}, errno.ENOMEM),
    ((AT, 4 * PAGE, MAX), MOVE, errno.ENOMEM),
    ((AT, PAGE, PAGE), {"new_addr": FREE + 1}, errno.EINVAL),
    ((AT, PAGE, PAGE), {"new_addr": -PAGE}, errno.EINVAL),
    ((AT, PAGE, PAGE), {"new_addr": TOP - PAGE}, errno.EINVAL),
    ((AT, 2 * PAGE, 2 * PAGE), {"new_addr": AT + PAGE}, errno.EINVAL),
    ((AT, PAGE, 2 * PAGE), {"new_addr": AT - PAGE}, errno.EINVAL),
    ((AT, 0, PAGE), {"new_addr": AT}, errno.EINVAL),
    ((AT, PAGE, PAGE), {"new_addr": MAX}, errno.ENOMEM),
]


@pytest.mark.parametrize(("args", "more", "err"), REFUSED)
def test_refused(setup: Setup, args: tuple[int, int, int], more: dict[str, Any], err: int):
    setup.refuses(lambda: setup.mm.mremap(*args, **more), err, "mremap")


class TestLimits:
    def test_address_space(self, setup: Setup):
        setup.mm.limits.address_space_bytes = 9 * PAGE
        args = AT + 4 * PAGE, 4 * PAGE, 6 * PAGE
        setup.refuses(lambda: setup.mm.mremap(*args), errno.ENOMEM)
        setup.refuses(lambda: setup.mm.mremap(*args, may_move=True), errno.ENOMEM)
        setup.refuses(lambda: setup.mm.mremap(*args, new_addr=FREE), errno.ENOMEM)
        setup.mm.mremap(AT + 4 * PAGE, 4 * PAGE, 5 * PAGE)

    def test_what_moves_does_not_count_twice(self, setup: Setup):
        setup.mm.limits.address_space_bytes = 10 * PAGE
        assert setup.mm.mremap(AT, 4 * PAGE, 6 * PAGE, may_move=True) != AT
        assert setup.mm.usage_bytes == 10 * PAGE

    def test_locked_memory(self, setup: Setup):
        setup.mm.mlock(AT + 4 * PAGE, 4 * PAGE)
        setup.mm.limits.locked_bytes = 5 * PAGE
        args = AT + 4 * PAGE, 4 * PAGE, 6 * PAGE
        for more in ({}, {"may_move": True}, {"new_addr": FREE}):
            setup.refuses(lambda more=more: setup.mm.mremap(*args, **more), errno.EAGAIN)
        setup.mm.limits.may_lock_all = True
        setup.mm.mremap(*args)
        assert setup.mm.locked_bytes == 6 * PAGE
        assert setup.mm.rss_bytes >= 6 * PAGE


class TestInPlace:
    def test_the_same_size_is_nothing_even_with_holes(self, setup: Setup):
        before = setup.snapshot()
        assert setup.mm.mremap(AT, 64 * PAGE, 64 * PAGE) == AT
        assert setup.mm.mremap(AT, 1, PAGE, may_move=True) == AT
        assert setup.snapshot() == before

    def test_shrinking_unmaps_the_tail_whatever_it_is(self, setup: Setup):
        assert setup.mm.mremap(AT, 7 * PAGE, 2 * PAGE) == AT
        assert setup.vmas() == [(AT, AT + 2 * PAGE), (AT + 7 * PAGE, AT + 8 * PAGE)]
        assert setup.space.load(AT, 4) == b"zero"
        with pytest.raises(GuestFaultError):
            setup.space.load(AT + 3 * PAGE, 1)

    def test_growing_merges(self, setup: Setup):
        setup.mm.munmap(AT + 4 * PAGE, 4 * PAGE)
        assert setup.mm.mremap(AT + PAGE, 3 * PAGE, 6 * PAGE) == AT + PAGE
        assert setup.vmas() == [(AT, AT + 7 * PAGE)]
        assert setup.space.load(AT + 3 * PAGE, 5) == b"three"
        assert setup.space.load(AT + 6 * PAGE, 1) == b"\0"

    def test_growing_asks_the_mappable(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        ar = setup.mm.mmap(2 * PAGE, mappable=memory, offset=3 * PAGE, private=False)
        setup.mm.mremap(ar.start, 2 * PAGE, 5 * PAGE)
        assert memory.calls[1:] == [("add", ar.end, ar.end + 3 * PAGE, 5 * PAGE, True)]
        assert setup.vmas() == [(ar.start, ar.start + 5 * PAGE)]

    def test_what_refuses_to_grow_in_place_may_move(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        ar = setup.mm.mmap(2 * PAGE, mappable=memory)
        memory.refuse = OSError(errno.ENODEV, "not there")
        with pytest.raises(OSError, match="not there"):
            setup.mm.mremap(ar.start, 2 * PAGE, 5 * PAGE)
        memory.refuse = OSError(errno.ENODEV, "not there")
        assert setup.mm.mremap(ar.start, 2 * PAGE, 5 * PAGE, may_move=True) != ar.start


class TestMoving:
    def test_bytes_and_frames_go_along(self, setup: Setup):
        frame = setup.mm.pmas.find(AT)[2].file_range(AT, AT + PAGE)
        new = setup.mm.mremap(AT, 4 * PAGE, 6 * PAGE, may_move=True)
        assert setup.vmas() == [(new, new + 6 * PAGE), (AT + 4 * PAGE, AT + 8 * PAGE)]
        assert setup.mm.pmas.find(new)[2].file_range(new, new + PAGE) == frame
        assert AT not in setup.space.pages
        assert setup.space.load(new, 4) == b"zero"
        assert setup.space.load(new + 3 * PAGE, 5) == b"three"
        assert setup.space.load(new + 5 * PAGE, 1) == b"\0"
        with pytest.raises(GuestFaultError):
            setup.space.load(AT, 1)

    def test_the_middle_of_a_vma(self, setup: Setup):
        setup.mm.mremap(AT + PAGE, 2 * PAGE, 2 * PAGE, new_addr=FREE)
        assert setup.vmas()[:2] == [(AT, AT + PAGE), (AT + 3 * PAGE, AT + 4 * PAGE)]
        assert setup.space.load(AT + 3 * PAGE, 5) == b"three"

    def test_over_something(self, setup: Setup):
        setup.map(FREE, FREE + HUGE, name="there")
        setup.space.store(FREE, b"gone")
        assert setup.mm.mremap(AT, 4 * PAGE, 2 * PAGE, new_addr=FREE + PAGE) == FREE + PAGE
        assert setup.vmas() == [
            (AT + 4 * PAGE, AT + 8 * PAGE),
            (FREE, FREE + PAGE),
            (FREE + PAGE, FREE + 3 * PAGE),
            (FREE + 3 * PAGE, FREE + HUGE),
        ]
        assert setup.space.load(FREE + PAGE, 4) == b"zero"

    def test_one_shootdown(self, setup: Setup):
        n = setup.space.n_shootdowns
        setup.mm.mremap(AT, 4 * PAGE, 4 * PAGE, new_addr=FREE)
        assert setup.space.n_shootdowns == n + 1

    def test_what_is_checked_too_late(self, setup: Setup):
        """The target is cleared, and the tail cut, before the rest is looked at: as in Linux."""
        setup.map(FREE, FREE + 8 * PAGE)
        with pytest.raises(MmError) as caught:
            setup.mm.mremap(AT, 7 * PAGE, 6 * PAGE, new_addr=FREE)
        assert caught.value.errno == errno.EFAULT
        assert setup.vmas() == [
            (AT, AT + 4 * PAGE),
            (AT + 4 * PAGE, AT + 6 * PAGE),
            (AT + 7 * PAGE, AT + 8 * PAGE),
            (FREE + 6 * PAGE, FREE + 8 * PAGE),
        ]
        setup.check()

    def test_the_mappable_learns_the_new_before_it_forgets_the_old(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        ar = setup.mm.mmap(4 * PAGE, mappable=memory, offset=PAGE, private=False)
        setup.space.store(ar.start, b"0")
        old, moved_pmas = ar.start + PAGE, []
        memory.before = lambda what: moved_pmas.append((what, bool(setup.mm.pmas.find(FREE))))
        setup.mm.mremap(old, 2 * PAGE, 3 * PAGE, new_addr=FREE)
        assert memory.calls[1:] == [
            ("copy", FREE, FREE + 3 * PAGE, 2 * PAGE, True),
            ("remove", old, old + 2 * PAGE, 2 * PAGE, True),
        ]
        assert moved_pmas == [("copy", False), ("remove", True)]
        setup.space.store(FREE, b"moved")
        assert setup.mm.vmas.find_value(FREE).delta == 2 * PAGE - FREE

    def test_its_refusal_comes_out(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        ar = setup.mm.mmap(PAGE, mappable=memory)
        memory.refuse = OSError(errno.ENOMEM, "not twice")
        before = setup.snapshot()
        with pytest.raises(OSError, match="not twice"):
            setup.mm.mremap(ar.start, PAGE, PAGE, new_addr=FREE)
        assert setup.snapshot() == before

    def test_offsets_do_not_wrap(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, PAGE)
        ar = setup.mm.mmap(PAGE, mappable=memory, offset=TOP - 2 * PAGE)
        args = ar.start, PAGE, 3 * PAGE
        setup.refuses(lambda: setup.mm.mremap(*args), errno.EINVAL)
        setup.refuses(lambda: setup.mm.mremap(*args, may_move=True), errno.EINVAL)
        setup.refuses(lambda: setup.mm.mremap(*args, new_addr=FREE), errno.EINVAL)

    def test_what_is_locked_is_resident_there(self, setup: Setup):
        setup.mm.mlock(AT, 4 * PAGE, LOCK_EAGER)
        new = setup.mm.mremap(AT, 4 * PAGE, 16 * PAGE, may_move=True)
        assert setup.mm.locked_bytes == 16 * PAGE
        assert all(setup.space.is_mapped(new + i * PAGE, READ) for i in range(16))

    def test_superpages_stay_possible(self, make: Make):
        setup = make()
        ar = setup.mm.mmap(HUGE)
        setup.mm.mmap(PAGE, READ, addr=ar.end, fixed=True)
        new = setup.mm.mremap(ar.start, HUGE, 2 * HUGE, may_move=True)
        assert new % HUGE == 0
        assert new != ar.start


class TestDoubling:
    """From a range of no bytes: the same mapping a second time."""

    def test_shared_memory(self, make: Make):
        setup = make()
        ar = setup.mm.mmap(2 * PAGE, private=False)
        setup.space.store(ar.start + PAGE, b"one")
        new = setup.mm.mremap(ar.start + PAGE, 0, PAGE, new_addr=FREE)
        assert new == FREE
        assert setup.space.load(new, 3) == b"one"
        setup.space.store(new, b"two")
        assert setup.space.load(ar.start + PAGE, 3) == b"two"
        assert setup.mm.mremap(ar.start, 0, 2 * PAGE, may_move=True) not in (ar.start, FREE)
        assert setup.mm.usage_bytes == 5 * PAGE

    def test_private_memory_doubles_as_zeros(self, setup: Setup):
        new = setup.mm.mremap(AT, 0, PAGE, may_move=True)
        assert setup.space.load(new, 4) == bytes(4)
        assert setup.space.load(AT, 4) == b"zero"
        assert setup.mm.vmas.find_value(new).perms == READ_WRITE
