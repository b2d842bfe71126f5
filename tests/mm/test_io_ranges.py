"""Which ranges a copy may have at all, and memory that is made ready for copies."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestBusError, GuestFaultError
from kvmmm.hostarch.access import NO_ACCESS, READ, WRITE
from kvmmm.mm import io
from kvmmm.mm.manager import MemoryManager
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, MAX, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

START = 8 * HUGE
END = START + 2 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        made.first.map(START, END)
        yield made


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nobody may be asked by a copy."""

    def never(*_: Any) -> int:
        raise AssertionError("asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryManager, "_serve_copy", never)
        yield


class TestCheckIoRange:
    """Nothing is said about what is mapped there."""

    @pytest.mark.parametrize(
        ("addr", "n"),
        [(0, 0), (0, 1), (0, MAX), (MAX, 0), (MAX - 1, 1), (MAX - 1, 0), (5, PAGE), (START, HUGE)],
    )
    def test_possible(self, family: Family, addr: int, n: int):
        ar = family.first.mm.check_io_range(addr, n)
        assert (ar.start, ar.end) == (addr, addr + n)

    @pytest.mark.parametrize(
        ("addr", "n", "at"),
        [
            (0, MAX + 1, MAX),
            (1, MAX, MAX),
            (MAX, 1, MAX),
            (MAX - 1, 2, MAX),
            (MAX + 1, 0, MAX + 1),  # the end counts, for nothing as well
            (MAX + PAGE, 5, MAX + PAGE),
            ((1 << 64) - 1, 1, (1 << 64) - 1),
            ((1 << 64) - 1, 2, (1 << 64) - 1),
            (1 << 64, 0, 1 << 64),
            (PAGE, (1 << 64) - PAGE, MAX),
            (PAGE, 1 << 64, MAX),
            (-1, 1, MAX),
            (-PAGE, 2 * PAGE, MAX),
            (5, -1, MAX),
            (0, -(1 << 70), MAX),
        ],
    )
    def test_impossible(self, family: Family, addr: int, n: int, at: int):
        with pytest.raises(GuestFaultError) as caught:
            family.first.mm.check_io_range(addr, n)
        assert (caught.value.addr, caught.value.done, caught.value.mapped) == (at, 0, False)


class TestEnsurePmasExist:
    def test_copies_ask_nobody_afterwards(self, family: Family):
        mm = family.first.mm
        assert mm.ensure_pmas_exist(START + 10, HUGE) == HUGE
        with silence():
            mm.copy_out(START + 10, b"x" * HUGE)
            assert mm.read(START + 10, HUGE) == b"x" * HUGE
            assert mm.swap_uint32(START + 12, 5) == 0x78787878
            assert mm.zero_out(START + 10, HUGE) == HUGE

    def test_copies_on_write_are_made(self, family: Family):
        one = family.first
        one.mm.copy_out(START, b"both" * (HUGE // 2))
        child = family.fork(one)
        breaks = one.mm.counters.cow_breaks
        assert one.mm.ensure_pmas_exist(START + PAGE, HUGE) == HUGE
        assert one.mm.counters.cow_breaks > breaks
        # Nothing was moved.
        assert one.mm.read(START, 2 * HUGE) == b"both" * (HUGE // 2)
        with silence():
            one.mm.copy_out(START + PAGE, b"mine" * (HUGE // 4))
        assert child.mm.read(START, 2 * HUGE) == b"both" * (HUGE // 2)
        family.check()

    def test_nothing(self, family: Family):
        mm = family.first.mm
        for addr in (0, START, MAX):
            assert mm.ensure_pmas_exist(addr, 0) == 0
        assert mm.rss_bytes == 0
        for addr, n in ((MAX + 1, 0), (MAX, 1), (-1, 1)):
            with pytest.raises(GuestFaultError) as caught:
                mm.ensure_pmas_exist(addr, n)
            assert caught.value.done == 0

    @pytest.mark.parametrize("perms", [None, NO_ACCESS, READ])
    def test_as_far_as_can_be_written(self, family: Family, perms: int | None):
        mm = family.first.mm
        if perms is None:
            mm.munmap(START + HUGE, PAGE)
        else:
            mm.mprotect(START + HUGE, PAGE, perms)
        with pytest.raises(GuestFaultError) as caught:
            mm.ensure_pmas_exist(START + 10, 2 * HUGE - 10)
        error = caught.value
        assert (error.addr, error.done) == (START + HUGE, HUGE - 10)
        assert (error.access, error.mapped) == (WRITE, perms is not None)
        # What comes before it is there.
        assert mm.pmas.find_gap(START) is None
        if perms == READ:
            assert mm.ensure_pmas_exist(START, 2 * HUGE, ignore_permissions=True) == 2 * HUGE

    def test_memory_runs_out(self):
        with Family(Arena(4 << 20)) as family:
            mm = family.first.mm
            family.first.map(START, START + (8 << 20))
            with pytest.raises(ArenaExhaustedError) as caught:
                mm.ensure_pmas_exist(START, 8 << 20)
            assert any("after" in note for note in caught.value.__notes__)
            mm.munmap(START, 8 << 20)
            family.first.map(START, END)
            assert mm.ensure_pmas_exist(START, HUGE) == HUGE

    def test_a_file_that_ends(self, family: Family):
        one = family.first
        mappable = FakeMappable(FakeFile(2 * PAGE))
        one.map(START, START + 4 * PAGE, mappable=mappable, private=True)
        with pytest.raises(GuestBusError) as caught:
            one.mm.ensure_pmas_exist(START + 1, 3 * PAGE)
        assert (caught.value.addr, caught.value.done) == (START + 2 * PAGE, 2 * PAGE - 1)
        assert one.mm.ensure_pmas_exist(START, 2 * PAGE) == 2 * PAGE

    def test_by_its_other_name(self, family: Family):
        assert io.ensure_pmas_exist(family.first.mm, START, 1) == 1
