"""Reading tables: lookup, mappings, is_empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import READ, READ_EXECUTE, READ_WRITE
from kvmmm.pagetables.pte import PTE_NX, PTE_P, PTE_U, PTE_W, flags_of

if TYPE_CHECKING:
    from tests.pagetables.conftest import TablesAtHand

PAGE = 1 << 12
HUGE = 1 << 21
GIANT = 1 << 30
LOWER_END = 0x0000_8000_0000_0000
UPPER_START = 0xFFFF_8000_0000_0000
TOP = 1 << 64

R = flags_of(READ, user=True)
RW = flags_of(READ_WRITE, user=True)
RX = flags_of(READ_EXECUTE, user=True)


def test_lookup_gives_the_leaf_around_an_address(giant: TablesAtHand):
    giant.pt.map(GIANT, GIANT, 2 * GIANT, RW)
    giant.pt.map(HUGE, HUGE, 3 * HUGE, R)
    giant.pt.map(0x3000, PAGE, 0x9000, RX)
    for gva, expected in (
        (GIANT + 0x12345678, (GIANT, 2 * GIANT, GIANT, RW)),
        (HUGE + 0x12345, (HUGE, 3 * HUGE, HUGE, R)),
        (0x3FFF, (0x3000, 0x9000, PAGE, RX)),
    ):
        t = giant.pt.lookup(gva)
        assert (t.gva, t.gpa, t.leaf_bytes, t.flags) == expected
    assert repr(giant.pt.lookup(0x3000)) == "0x0000000000003000 -> 0x9000  4K r-x U"


@pytest.mark.parametrize("gva", [0, 0x4000, HUGE, GIANT, 512 * GIANT, LOWER_END, -1, TOP])
def test_lookup_of_nothing_is_none(f: TablesAtHand, gva: int):
    f.pt.map(0x3000, PAGE, 0x9000, RX)
    assert f.pt.lookup(gva) is None


@pytest.mark.parametrize("level", [1, 2, 3])
def test_rights_are_those_of_all_levels_together(f: TablesAtHand, level: int):
    f.pt.map(0x3000, PAGE, 0x9000, flags_of(7, user=True))
    gpa = f.pt.root_gpa
    for _ in range(level - 1):
        gpa = f.allocator.entries(gpa)[0] & ~0xFFF
    entries = f.allocator.entries(gpa)
    whole = entries[0]
    for bit in (PTE_W, PTE_U):
        entries[0] = whole & ~bit
        assert not f.pt.lookup(0x3000).flags & bit
        assert not next(f.pt.mappings()).flags & bit
    entries[0] = whole | PTE_NX
    assert f.pt.lookup(0x3000).flags & PTE_NX
    assert next(f.pt.mappings()).flags & PTE_NX


def test_mappings_of_a_range_are_clipped_to_leaves(f: TablesAtHand):
    f.pt.map(0, 4 * HUGE, 0, RW)
    f.pt.map(UPPER_START, PAGE, 0x1000, RW)
    assert [(r.gva, r.length_bytes) for r in f.pt.mappings(HUGE + 1, 2 * HUGE + 1)] == [
        (HUGE, 2 * HUGE)
    ]
    assert [r.gva for r in f.pt.mappings(LOWER_END, TOP)] == [UPPER_START]
    assert list(f.pt.mappings(LOWER_END, UPPER_START)) == []
    assert list(f.pt.mappings(HUGE, HUGE)) == []


def test_mappings_join_runs_across_tables(f: TablesAtHand):
    f.pt.map(PAGE, 4 * HUGE, HUGE, RW)
    assert f.runs() == [(PAGE, 4 * HUGE, HUGE, PAGE, RW)]


def test_is_empty_looks_at_its_range_only(f: TablesAtHand):
    f.pt.map(0x3000, PAGE, 0x9000, RX)
    assert f.pt.is_empty(0, 0x3000)
    assert f.pt.is_empty(0x4000, GIANT)
    assert not f.pt.is_empty(0x3000, PAGE)
    assert not f.pt.is_empty()


def test_present_bit_is_what_makes_an_entry(f: TablesAtHand):
    f.pt.map(0x1000, PAGE, 0, PTE_P)
    t = f.pt.lookup(0x1000)
    assert (t.gpa, t.flags) == (0, PTE_P)
    assert not t.flags & PTE_U
