"""mmap, munmap, mprotect, populate: their arguments, their order, and what they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, RangeError, StateError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
CALLS: dict[str, Callable[[Any, AddrRange], object]] = {
    "mmap": lambda mm, ar: mm.mmap(ar, READ_WRITE),
    "munmap": lambda mm, ar: mm.munmap(ar),
    "mprotect": lambda mm, ar: mm.mprotect(ar, READ),
    "populate": lambda mm, ar: mm.populate(ar),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        (0x1001, 0x3000, "whole 4 KiB pages"),
        (0x1000, 0x2FFF, "whole 4 KiB pages"),
        (0x1000, 0x1000, "whole 4 KiB pages"),
        (MAX - PAGE, MAX + PAGE, f"guest memory ends at {MAX:#x}"),
        (1 << 62, 1 << 63, "guest memory ends"),
    ],
)
def test_a_malformed_range(make: Make, call: Any, start: int, end: int, why: str):
    setup = make()
    setup.mm.mmap(AddrRange(0x1000, 0x3000), READ_WRITE)
    with pytest.raises(RangeError, match=why) as caught:
        call(setup.mm, AddrRange(start, end))
    assert (caught.value.start, caught.value.end) == (start, end)
    assert [(s, e) for s, e, _ in setup.mm.vmas] == [(0x1000, 0x3000)]


def test_permissions_are_access_bits(make: Make):
    setup = make()
    for call in (setup.mm.mmap, setup.mm.mprotect):
        with pytest.raises(RangeError, match="no set of access bits"):
            call(AddrRange(0, PAGE), 8)


def test_mmap_replaces(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, 4 * PAGE), READ_WRITE, "old")
    setup.space.store(PAGE, b"old bytes")
    setup.mm.mmap(AddrRange(PAGE, 2 * PAGE), READ, "new")
    assert setup.space.load(PAGE, 9) == bytes(9)
    assert [(s, e, v.name) for s, e, v in setup.mm.vmas] == [
        (0, PAGE, "old"), (PAGE, 2 * PAGE, "new"), (2 * PAGE, 4 * PAGE, "old"),
    ]  # fmt: skip


def test_adjacent_mappings_that_are_alike_are_one(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, PAGE), READ, "a")
    setup.mm.mmap(AddrRange(2 * PAGE, 3 * PAGE), READ, "a")
    setup.mm.mmap(AddrRange(PAGE, 2 * PAGE), READ, "a")
    setup.mm.mmap(AddrRange(3 * PAGE, 4 * PAGE), READ, "b")
    assert [(s, e) for s, e, _ in setup.mm.vmas] == [(0, 3 * PAGE), (3 * PAGE, 4 * PAGE)]


def test_munmap_frees_frames_and_zeroes_what_comes_back(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, 4 * HUGE), READ_WRITE)
    setup.space.store(HUGE - 4, b"bytes across")
    setup.mm.munmap(AddrRange(HUGE, 4 * HUGE))
    assert setup.arena.statistics().used_bytes == HUGE
    assert not any(page >= HUGE for page in setup.space.pages)
    setup.mm.mmap(AddrRange(HUGE, 4 * HUGE), READ_WRITE)
    assert setup.space.load(HUGE - 4, 12) == b"byte" + bytes(8)


def test_mprotect_keeps_frames_and_drops_translations(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, 2 * HUGE), READ_WRITE)
    setup.space.store(0, b"kept")
    setup.mm.mprotect(AddrRange(0, PAGE), READ)
    assert 0 not in setup.space.pages
    assert PAGE in setup.space.pages
    assert setup.space.load(0, 4) == b"kept"
    with pytest.raises(GuestFaultError) as caught:
        setup.space.store(0, b"lost")
    assert caught.value.mapped
    assert setup.mm.counters.pma_hits == 1


def test_mprotect_of_a_hole_changes_nothing(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, 2 * PAGE), READ_WRITE)
    setup.mm.mmap(AddrRange(3 * PAGE, 4 * PAGE), READ_WRITE)
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.mprotect(AddrRange(0, 4 * PAGE), READ)
    assert (caught.value.addr, caught.value.mapped) == (2 * PAGE, False)
    assert all(v.perms == READ_WRITE for _, _, v in setup.mm.vmas)


def test_generation_grows_with_every_change_of_a_vma(make: Make):
    mm = make().mm
    seen = [mm.generation]
    for change in (
        lambda: mm.mmap(AddrRange(0, HUGE), READ_WRITE),
        lambda: mm.mprotect(AddrRange(0, PAGE), READ),
        lambda: mm.munmap(AddrRange(0, PAGE)),
    ):
        change()
        assert mm.generation > seen[-1]
        seen.append(mm.generation)
    mm.handle_user_fault(PAGE, READ)
    mm.copy_out(PAGE, b"x")
    mm.populate(AddrRange(PAGE, 2 * PAGE))
    assert mm.generation == seen[-1]


class TestPopulate:
    def test_allocates_exactly_that(self, make: Make):
        setup = make()
        setup.mm.mmap(AddrRange(0, 2 * HUGE), READ_WRITE)
        setup.mm.populate(AddrRange(PAGE, 5 * PAGE))
        assert sorted(setup.space.pages) == [n * PAGE for n in range(1, 5)]
        assert setup.arena.statistics().used_bytes == 4 * PAGE
        assert setup.mm.counters.faults == 0

    def test_across_permissions_and_what_is_there(self, make: Make):
        setup = make()
        setup.mm.mmap(AddrRange(0, 8 * PAGE), READ_WRITE)
        setup.mm.mprotect(AddrRange(2 * PAGE, 4 * PAGE), READ | EXECUTE)
        setup.mm.populate(AddrRange(3 * PAGE, 4 * PAGE))
        setup.mm.populate(AddrRange(0, 8 * PAGE))
        assert [p for _, _, p in map(setup.space.pages.get, range(0, 8 * PAGE, PAGE))] == [
            *[READ_WRITE] * 2, *[READ | EXECUTE] * 2, *[READ_WRITE] * 4,
        ]  # fmt: skip

    @pytest.mark.parametrize("perms", [None, NO_ACCESS])
    def test_stops_at_what_cannot_be_read(self, make: Make, perms: int | None):
        setup = make()
        setup.mm.mmap(AddrRange(0, 8 * PAGE), READ_WRITE)
        hole = AddrRange(3 * PAGE, 4 * PAGE)
        if perms is None:
            setup.mm.munmap(hole)
        else:
            setup.mm.mprotect(hole, perms)
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.populate(AddrRange(PAGE, 8 * PAGE))
        error = caught.value
        assert (error.addr, error.done, error.mapped) == (3 * PAGE, 2 * PAGE, perms is not None)
        assert sorted(setup.space.pages) == [PAGE, 2 * PAGE]

    def test_exhausted(self, make: Make):
        setup = make(HUGE)
        setup.mm.mmap(AddrRange(0, 4 * HUGE), READ_WRITE)
        with pytest.raises(ArenaExhaustedError):
            setup.mm.populate(AddrRange(0, 4 * HUGE))
        setup.mm.check_invariants()


class TestOrder:
    """Removal: translations, then frames, then the vma; who refuses the first stops it all."""

    @pytest.fixture
    def setup(self, make: Make) -> Setup:
        setup = make()
        setup.mm.mmap(AddrRange(0, 2 * HUGE), READ_WRITE)
        setup.space.store(0, b"here")
        return setup

    @pytest.mark.parametrize("name", ["mmap", "munmap", "mprotect"])
    def test_a_running_cpu_stops_it(self, setup: Setup, name: str, monkeypatch: pytest.MonkeyPatch):
        def refuse(_ar: AddrRange) -> None:
            raise StateError("a CPU runs")

        with monkeypatch.context() as patch:
            patch.setattr(setup.space, "unmap", refuse)
            with pytest.raises(StateError, match="a CPU runs"):
                CALLS[name](setup.mm, AddrRange(0, HUGE))
        setup.mm.check_invariants()
        assert [v.perms for _, _, v in setup.mm.vmas] == [READ_WRITE]
        assert setup.space.load(0, 4) == b"here"

    @pytest.mark.parametrize("name", ["mmap", "munmap", "mprotect"])
    def test_frames_go_after_translations(
        self, setup: Setup, name: str, monkeypatch: pytest.MonkeyPatch
    ):
        unmap = setup.space.unmap

        def check(ar: AddrRange) -> None:
            frame = setup.mm.pmas.find(0)[2].file_range(0, PAGE).start
            assert setup.arena.ref_count(frame) == 1
            assert setup.mm.vmas.find_value(0) is not None
            unmap(ar)

        monkeypatch.setattr(setup.space, "unmap", check)
        CALLS[name](setup.mm, AddrRange(0, HUGE))


def test_close_drops_everything_and_twice_is_once(make: Make):
    setup = make(128 << 20, 64 << 20, home=True)
    setup.mm.mmap(AddrRange(0, 64 << 20), ANY_ACCESS)
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
        mm.mmap(AddrRange(0, HUGE), READ_WRITE)
    setup.space.store(100, b"one")
    other_space.store(100, b"two")
    assert (setup.space.load(100, 3), other_space.load(100, 3)) == (b"one", b"two")
    other.close()
    assert setup.space.load(100, 3) == b"one"
    assert setup.arena.statistics().used_bytes == HUGE


def test_write_alone_implies_read(make: Make):
    setup = make()
    setup.mm.mmap(AddrRange(0, PAGE), WRITE)
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
        setup.mm.check_invariants()

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
        setup.mm.mmap(AddrRange(8 * PAGE, 10 * PAGE), READ_WRITE)
        with pytest.raises(RangeError):
            setup.mm.mmap_all([(PAGE, 2 * PAGE, READ, ""), *more])
        assert [(s, e) for s, e, _ in setup.mm.vmas] == [(8 * PAGE, 10 * PAGE)]
