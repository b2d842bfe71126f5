"""munmap, populate, mmap_all, close: their arguments, their order, and what they leave."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError, RangeError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, NO_ACCESS, READ, READ_WRITE, WRITE
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
TOP = 1 << 64


class TestMunmap:
    @pytest.mark.parametrize(
        ("addr", "length"),
        [
            (0x1001, PAGE),
            (0x1000, 0),
            (0x1000, -1),
            (-PAGE, PAGE),
            (0x1000, TOP),
            (0x1000, TOP - 0x1000),
            (TOP - PAGE, PAGE),
            (TOP, PAGE),
        ],
    )
    def test_einval(self, make: Make, addr: int, length: int):
        setup = make()
        setup.map(0x1000, 0x3000)
        setup.space.store(0x1000, b"kept")
        setup.refuses(lambda: setup.mm.munmap(addr, length), errno.EINVAL, "munmap")

    def test_length_is_rounded_up_and_holes_are_fine(self, make: Make):
        setup = make()
        setup.map(PAGE, 2 * PAGE)
        setup.map(4 * PAGE, 8 * PAGE)
        setup.mm.munmap(0, 5 * PAGE + 1)
        assert setup.vmas() == [(6 * PAGE, 8 * PAGE)]

    def test_nothing_there_costs_no_shootdown(self, make: Make):
        setup = make()
        setup.map(0, PAGE)
        n, generation = setup.space.n_shootdowns, setup.mm.generation
        setup.mm.munmap(PAGE, TOP - 2 * PAGE)
        assert (setup.space.n_shootdowns, setup.mm.generation) == (n, generation)

    def test_it_frees_frames_and_zeroes_what_comes_back(self, make: Make):
        setup = make()
        setup.map(0, 4 * HUGE)
        setup.space.store(HUGE - 4, b"bytes across")
        setup.mm.munmap(HUGE, 3 * HUGE)
        assert setup.arena.statistics().used_bytes == HUGE
        assert not any(page >= HUGE for page in setup.space.pages)
        setup.map(HUGE, 4 * HUGE)
        assert setup.space.load(HUGE - 4, 12) == b"byte" + bytes(8)

    def test_translations_first_then_frames_and_all_in_one_shootdown(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ):
        setup = make()
        for start in range(0, 6 * HUGE, 2 * HUGE):
            setup.map(start, start + HUGE)
            setup.space.store(start, b"here")
        frame = setup.mm.pmas.find(0)[2].file_range(0, PAGE).start
        unmap, seen = setup.space.unmap, []

        def look(ranges: Sequence[AddrRange]) -> None:
            seen.append(setup.arena.ref_count(frame))
            assert setup.mm.vmas.find_value(0) is not None
            unmap(ranges)

        monkeypatch.setattr(setup.space, "unmap", look)
        setup.mm.munmap(0, 6 * HUGE)
        assert seen == [1]
        assert not setup.arena.statistics().used_bytes


class TestPopulate:
    @pytest.mark.parametrize(
        ("addr", "length"), [(1, PAGE), (-PAGE, PAGE), (0, -PAGE), (0, MAX + 1), (MAX, PAGE)]
    )
    def test_einval(self, make: Make, addr: int, length: int):
        setup = make()
        setup.map(0, PAGE)
        setup.refuses(lambda: setup.mm.populate(addr, length), errno.EINVAL, "populate")

    def test_allocates_exactly_that(self, make: Make):
        setup = make()
        setup.map(0, 2 * HUGE)
        setup.mm.populate(PAGE, 4 * PAGE)
        assert sorted(setup.space.pages) == [n * PAGE for n in range(1, 5)]
        assert setup.arena.statistics().used_bytes == 4 * PAGE
        assert setup.mm.counters.faults == 0

    def test_across_permissions_and_what_is_there(self, make: Make):
        setup = make()
        setup.map(0, 8 * PAGE)
        setup.mm.mprotect(2 * PAGE, 2 * PAGE, READ | EXECUTE)
        setup.mm.populate(3 * PAGE, PAGE)
        setup.mm.populate(0, 8 * PAGE)
        assert [p for _, _, p in map(setup.space.pages.get, range(0, 8 * PAGE, PAGE))] == [
            *[READ_WRITE] * 2, *[READ | EXECUTE] * 2, *[READ_WRITE] * 4,
        ]  # fmt: skip

    @pytest.mark.parametrize("perms", [None, NO_ACCESS])
    def test_stops_at_what_cannot_be_read(self, make: Make, perms: int | None):
        setup = make()
        setup.map(0, 8 * PAGE)
        if perms is None:
            setup.mm.munmap(3 * PAGE, PAGE)
        else:
            setup.mm.mprotect(3 * PAGE, PAGE, perms)
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.populate(PAGE, 7 * PAGE)
        error = caught.value
        assert (error.addr, error.done, error.mapped) == (3 * PAGE, 2 * PAGE, perms is not None)
        assert sorted(setup.space.pages) == [PAGE, 2 * PAGE]

    def test_exhausted(self, make: Make):
        setup = make(HUGE)
        setup.map(0, 4 * HUGE)
        with pytest.raises(ArenaExhaustedError):
            setup.mm.populate(0, 4 * HUGE)
        setup.check()


def test_close_drops_everything_and_twice_is_once(make: Make):
    setup = make(128 << 20, 64 << 20, home=True)
    setup.map(0, 64 << 20, ANY_ACCESS)
    setup.space.store(30 << 20, b"x")
    assert setup.arena.statistics().used_bytes > 0
    setup.mm.close()
    setup.mm.close()
    facts = setup.arena.statistics()
    assert (facts.used_bytes, facts.reserved_bytes) == (0, 0)
    assert len(setup.mm.vmas) == len(setup.mm.pmas) == 0


def test_two_managers_share_an_arena(make: Make):
    from kvmmm.mm import MemoryManager
    from tests.fakes import FakeAddressSpace

    setup = make()
    other_space = FakeAddressSpace(MAX)
    other = MemoryManager(setup.arena, other_space)
    other_space.on_fault = other.handle_user_fault
    for mm in (setup.mm, other):
        mm.mmap(HUGE, addr=0, fixed=True)
    setup.space.store(100, b"one")
    other_space.store(100, b"two")
    assert (setup.space.load(100, 3), other_space.load(100, 3)) == (b"one", b"two")
    other.close()
    assert setup.space.load(100, 3) == b"one"
    assert setup.arena.statistics().used_bytes == HUGE


def test_write_alone_implies_read(make: Make):
    setup = make()
    setup.map(0, PAGE, WRITE)
    assert setup.space.load(0, 1) == b"\0"


class TestMmapAll:
    def test_several_at_once(self, make: Make):
        setup = make()
        before = setup.mm.generation
        setup.mm.mmap_all(
            [(0, PAGE, READ, "a"), (PAGE, HUGE, READ, "a"), (HUGE, 2 * HUGE, READ_WRITE, "b")]
        )
        assert [(s, e, v.perms, v.name) for s, e, v in setup.mm.vmas] == [
            (0, HUGE, READ, "a"),
            (HUGE, 2 * HUGE, READ_WRITE, "b"),
        ]
        assert setup.mm.generation > before
        setup.check()

    @pytest.mark.parametrize(
        "more",
        [
            [(0, 2 * PAGE, READ, "")],  # each other
            [(0, PAGE, READ, "")],  # not ascending
            [(8 * PAGE, 9 * PAGE, READ, "")],  # what is there
            [(7 * PAGE, 12 * PAGE, READ, "")],
            [(2 * PAGE + 1, 4 * PAGE, READ, "")],
            [(MAX, MAX + PAGE, READ, "")],
            [(2 * PAGE, 3 * PAGE, 8, "")],
        ],
    )
    def test_all_or_nothing(self, make: Make, more: list[tuple[int, int, int, str]]):
        setup = make()
        setup.map(8 * PAGE, 10 * PAGE)
        before = setup.snapshot()
        with pytest.raises(RangeError):
            setup.mm.mmap_all([(PAGE, 2 * PAGE, READ, ""), *more])
        assert setup.snapshot() == before

    def test_the_limit_on_address_space(self, make: Make):
        setup = make()
        setup.map(8 * PAGE, 10 * PAGE)
        setup.mm.limits.address_space_bytes = 3 * PAGE
        setup.refuses(
            lambda: setup.mm.mmap_all([(0, PAGE, READ, ""), (PAGE, 2 * PAGE, READ, "")]),
            errno.ENOMEM,
        )
        setup.mm.mmap_all([(0, PAGE, READ, "")])


def test_an_error_says_what_where_and_why(make: Make):
    setup = make()
    with pytest.raises(MmError, match=r"munmap at 0x1001: .*aligned.*\(EINVAL\)") as caught:
        setup.mm.munmap(0x1001, PAGE)
    assert isinstance(caught.value, OSError)
    assert caught.value.addr == 0x1001
