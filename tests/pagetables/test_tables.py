"""The face of `PageTables`: options, what it refuses, where tables go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.pagetables.pte import PTE_PS, flags_of

if TYPE_CHECKING:
    from tests.pagetables.conftest import MakeTables, TablesAtHand

PAGE = 1 << 12
HUGE = 1 << 21
GIANT = 1 << 30
LOWER_END = 0x0000_8000_0000_0000
UPPER_START = 0xFFFF_8000_0000_0000
TOP = 1 << 64

R = flags_of(READ, user=True)
RW = flags_of(READ_WRITE, user=True)


def test_new_tables_are_a_root_alone(f: TablesAtHand):
    assert f.runs() == []
    assert f.pt.n_tables == f.allocator.n_allocated == 1
    assert f.pt.is_empty()


@pytest.mark.parametrize(
    ("options", "leaf_bytes"),
    [
        ({}, HUGE),
        ({"giant_pages": True}, GIANT),
        ({"giant_pages": True, "max_leaf_bytes": HUGE}, HUGE),
    ],
)
def test_leaf_size_is_capped_by_the_cpu_and_the_caller(
    options: dict[str, Any], leaf_bytes: int, make_tables: MakeTables
):
    f = make_tables(**options)
    f.pt.map(GIANT, GIANT, GIANT, RW)
    assert f.runs() == [(GIANT, GIANT, GIANT, leaf_bytes, RW)]


def test_leaf_size_of_4k_is_obeyed(make_tables: MakeTables):
    f = make_tables(max_leaf_bytes=PAGE)
    f.pt.map(HUGE, HUGE, HUGE, RW)
    assert f.runs() == [(HUGE, HUGE, HUGE, PAGE, RW)]


def test_leaf_size_that_is_none_is_refused(make_tables: MakeTables):
    with pytest.raises(ValueError, match="4 KiB, 2 MiB or 1 GiB"):
        make_tables(max_leaf_bytes=8192)


def test_map_without_access_is_unmap(f: TablesAtHand):
    f.pt.map(0x1000, 3 * PAGE, 0x1000, RW)
    assert f.pt.map(0x2000, PAGE, 0x2000, 0)
    assert not f.pt.map(0x2000, PAGE, 0x2000, 0)
    assert [run[0] for run in f.runs()] == [0x1000, 0x3000]


def test_emptied_tables_wait_for_recycle(f: TablesAtHand):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    f.pt.unmap(0x1000, PAGE)
    assert f.pt.n_tables == 1
    assert f.allocator.n_allocated == 4, "a CPU may still walk them"
    f.pt.recycle(zapped=True)
    assert f.allocator.n_allocated == 1


@pytest.mark.parametrize("gva", [0, LOWER_END - PAGE, UPPER_START, TOP - PAGE])
def test_first_and_last_page_of_each_half(f: TablesAtHand, gva: int):
    f.pt.map(gva, PAGE, 0x5000, RW)
    assert f.runs() == [(gva, PAGE, 0x5000, PAGE, RW)]
    assert f.pt.lookup(gva + PAGE - 1).gva == gva
    assert f.pt.unmap(gva, PAGE)
    assert f.pt.is_empty()


def test_both_halves_as_a_whole(f: TablesAtHand):
    f.pt.map(LOWER_END - PAGE, PAGE, 0x5000, RW)
    f.pt.map(UPPER_START, PAGE, 0x6000, RW)
    assert f.pt.unmap(UPPER_START, TOP - UPPER_START)
    assert [run[0] for run in f.runs()] == [LOWER_END - PAGE]


@pytest.mark.parametrize(
    ("gva", "length"),
    [
        (LOWER_END, PAGE),
        (LOWER_END - PAGE, 2 * PAGE),
        (UPPER_START - PAGE, PAGE),
        (UPPER_START - PAGE, 2 * PAGE),
        (LOWER_END - PAGE, UPPER_START - LOWER_END + 2 * PAGE),
        (0, TOP),
        (TOP - PAGE, 2 * PAGE),
        (TOP, PAGE),
        (-PAGE, PAGE),
        (0x1000, 0),
        (0x1000, -PAGE),
        (0x1001, PAGE),
        (0x1000, PAGE + 1),
    ],
)
def test_malformed_ranges_are_refused_and_change_nothing(f: TablesAtHand, gva: int, length: int):
    f.pt.map(LOWER_END - PAGE, PAGE, 0x5000, RW)
    before = f.runs()
    for call in (
        lambda: f.pt.map(gva, length, 0x7000, R),
        lambda: f.pt.unmap(gva, length),
        lambda: f.pt.protect(gva, length, R),
    ):
        with pytest.raises(RangeError) as e:
            call()
        assert (e.value.start, e.value.end) == (gva, gva + length)
    assert f.runs() == before


@pytest.mark.parametrize("gpa", [0x1001, -PAGE, 1 << 52, (1 << 52) - PAGE])
def test_malformed_frames_are_refused_and_change_nothing(f: TablesAtHand, gpa: int):
    with pytest.raises(RangeError) as e:
        f.pt.map(0x1000, 2 * PAGE, gpa, RW)
    assert e.value.start == gpa
    assert f.pt.n_tables == 1


@pytest.mark.parametrize("flags", [RW | PTE_PS, RW | 0x1000, RW | 1 << 9])
def test_flags_that_are_none_are_refused(f: TablesAtHand, flags: int):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    with pytest.raises(ValueError, match="no flags of a leaf"):
        f.pt.map(0x1000, PAGE, 0x1000, flags)
    with pytest.raises(ValueError, match="no flags of a leaf"):
        f.pt.protect(0x1000, PAGE, flags)
    assert f.runs() == [(0x1000, PAGE, 0x1000, PAGE, RW)]


def test_the_last_frame_can_be_mapped(f: TablesAtHand):
    f.pt.map(0x1000, PAGE, (1 << 52) - PAGE, RW)
    assert f.pt.lookup(0x1000).gpa == (1 << 52) - PAGE


def test_protect_without_access_is_unmap(f: TablesAtHand):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    assert f.pt.protect(0x1000, PAGE, 0)
    assert f.pt.is_empty()


def test_alloc_free(f: TablesAtHand):
    """Made, and released: gVisor's TestAllocFree."""
    assert f.allocator.n_allocated == 1
    f.pt.release(zapped=True)
    assert f.allocator.n_allocated == 0


def test_release_gives_every_page_back(f: TablesAtHand):
    f.pt.map(PAGE, 3 * HUGE, PAGE, RW)
    f.pt.map(UPPER_START, PAGE, PAGE, RW)
    f.pt.unmap(PAGE, HUGE)
    f.pt.release(zapped=True)
    f.pt.release(zapped=True)
    assert f.allocator.n_allocated == 0
    assert f.pt.n_tables == 0
    for call in (
        lambda: f.pt.lookup(0x1000),
        lambda: f.pt.map(0x1000, PAGE, 0, RW),
        f.pt.is_empty,
    ):
        with pytest.raises(StateError, match="released"):
            call()
