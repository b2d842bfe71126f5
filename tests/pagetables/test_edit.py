"""What map, unmap and protect do. The first ten are those of gVisor's pagetables_test.go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ, READ_EXECUTE, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import PTE_A, PTE_D, flags_of

if TYPE_CHECKING:
    from tests.pagetables.conftest import MakeTables, TablesAtHand, WalkRaw

PAGE = 1 << 12
HUGE = 1 << 21
GIANT = 1 << 30
LOWER_END = 0x0000_8000_0000_0000

R = flags_of(READ, user=True)
RW = flags_of(READ_WRITE, user=True)
RX = flags_of(READ_EXECUTE, user=True)


def test_unmap(f: TablesAtHand):
    assert not f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    assert f.pt.unmap(0x400000, PAGE)
    assert f.runs() == []
    assert f.pt.n_tables == 1


def test_read_only(f: TablesAtHand):
    f.pt.map(0x400000, PAGE, 42 * PAGE, R)
    assert f.runs() == [(0x400000, PAGE, 42 * PAGE, PAGE, R)]


@pytest.mark.parametrize("flags", [RW, RX, flags_of(READ, user=False)])
def test_read_write(f: TablesAtHand, flags: int):
    f.pt.map(0x400000, PAGE, 42 * PAGE, flags)
    assert f.runs() == [(0x400000, PAGE, 42 * PAGE, PAGE, flags)]


def test_serial_entries(f: TablesAtHand):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x401000, PAGE, 47 * PAGE, RW)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x401000, PAGE, 47 * PAGE, PAGE, RW),
    ]
    assert f.pt.n_tables == 4


def test_spanning_entries(f: TablesAtHand):
    # Two slots of the PML4.
    f.pt.map(0x7EFFFFFFF000, 2 * PAGE, 42 * PAGE, R)
    assert f.runs() == [(0x7EFFFFFFF000, 2 * PAGE, 42 * PAGE, PAGE, R)]
    assert f.pt.lookup(0x7EFFFFFFF000).gpa == 42 * PAGE
    assert f.pt.lookup(0x7F0000000000).gpa == 43 * PAGE
    assert f.pt.n_tables == 7


def test_sparse_entries(f: TablesAtHand):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x7F0000000000, PAGE, 47 * PAGE, R)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, PAGE, 47 * PAGE, PAGE, R),
    ]


def test_2m_and_4k(f: TablesAtHand):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x7F0000000000, HUGE, 47 * HUGE, R)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, HUGE, 47 * HUGE, HUGE, R),
    ]


def test_1g_and_4k(giant: TablesAtHand):
    giant.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    giant.pt.map(0x7F0000000000, GIANT, 47 * GIANT, R)
    assert giant.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, GIANT, 47 * GIANT, GIANT, R),
    ]


def test_split_1g_page(giant: TablesAtHand):
    giant.pt.map(0x7F0000000000, GIANT, 42 * GIANT, R)
    assert giant.pt.unmap(0x7F0000000000 + PAGE, GIANT - 2 * PAGE)
    assert giant.runs() == [
        (0x7F0000000000, PAGE, 42 * GIANT, PAGE, R),
        (0x7F0000000000 + GIANT - PAGE, PAGE, 43 * GIANT - PAGE, PAGE, R),
    ]
    assert giant.pt.n_tables == 5


def test_split_2m_page(f: TablesAtHand):
    f.pt.map(0x7F0000000000, HUGE, 42 * HUGE, R)
    assert f.pt.unmap(0x7F0000000000 + PAGE, HUGE - 2 * PAGE)
    assert f.runs() == [
        (0x7F0000000000, PAGE, 42 * HUGE, PAGE, R),
        (0x7F0000000000 + HUGE - PAGE, PAGE, 43 * HUGE - PAGE, PAGE, R),
    ]


def test_superpage_overlaid_by_misaligned_map_becomes_512_pages(f: TablesAtHand):
    f.pt.map(HUGE, HUGE, 8 * HUGE, RW)
    assert f.pt.map(HUGE, HUGE, 8 * HUGE + PAGE, RW)
    assert f.runs() == [(HUGE, HUGE, 8 * HUGE + PAGE, PAGE, RW)]


def test_giant_page_overlaid_by_2m_aligned_map_becomes_512_superpages(giant: TablesAtHand):
    giant.pt.map(GIANT, GIANT, 8 * GIANT, RW)
    assert giant.pt.map(GIANT, GIANT, 8 * GIANT + HUGE, RW)
    assert giant.runs() == [(GIANT, GIANT, 8 * GIANT + HUGE, HUGE, RW)]


def test_map_uses_the_largest_leaves_that_both_addresses_allow(giant: TablesAtHand):
    end = 2 * GIANT + HUGE + PAGE
    giant.pt.map(GIANT - HUGE - PAGE, end - (GIANT - HUGE - PAGE), 5 * GIANT - HUGE - PAGE, RW)
    sizes = [(length, leaf) for _, length, _, leaf, _ in giant.runs()]
    assert sizes == [(PAGE, PAGE), (HUGE, HUGE), (GIANT, GIANT), (HUGE, HUGE), (PAGE, PAGE)]


def test_map_over_identical_changes_nothing(giant: TablesAtHand):
    # Several leaves of every size, then a part of a giant page only.
    for gva, length in ((PAGE, 4 * HUGE), (GIANT, 2 * GIANT)):
        giant.pt.map(gva, length, gva + GIANT, RW)
        before = giant.runs()
        assert not giant.pt.map(gva, length, gva + GIANT, RW)
        assert giant.runs() == before
    n_tables = giant.pt.n_tables
    assert not giant.pt.map(GIANT + PAGE, PAGE, 2 * GIANT + PAGE, RW)
    assert giant.pt.n_tables == n_tables, "no reason to split"


@pytest.mark.parametrize("length", [PAGE, 3 * PAGE, HUGE, 2 * HUGE])
def test_map_over_other_flags_or_frames_is_a_change(f: TablesAtHand, length: int):
    f.pt.map(HUGE, length, HUGE, R)
    assert f.pt.map(HUGE, length, HUGE, RW)
    assert f.pt.map(HUGE, length, 4 * HUGE, RW)
    assert [run[2] for run in f.runs()] == [4 * HUGE]


def test_map_into_gaps_is_no_change(f: TablesAtHand):
    f.pt.map(0x3000, PAGE, 0x3000, RW)
    assert not f.pt.map(0x1000, 5 * PAGE, 0x1000, RW)
    assert f.runs() == [(0x1000, 5 * PAGE, 0x1000, PAGE, RW)]


def test_accessed_and_dirty_bits_are_no_difference(f: TablesAtHand):
    plain = RW & ~(PTE_A | PTE_D)
    f.pt.map(0x3000, PAGE, 0x3000, plain)
    assert not f.pt.map(0x3000, PAGE, 0x3000, RW)
    assert not f.pt.protect(0x3000, PAGE, plain)


def test_map_of_a_part_splits_a_superpage(f: TablesAtHand):
    f.pt.map(HUGE, HUGE, 4 * HUGE, R)
    assert f.pt.map(HUGE + PAGE, PAGE, 0x7000, RW)
    assert f.runs() == [
        (HUGE, PAGE, 4 * HUGE, PAGE, R),
        (HUGE + PAGE, PAGE, 0x7000, PAGE, RW),
        (HUGE + 2 * PAGE, HUGE - 2 * PAGE, 4 * HUGE + 2 * PAGE, PAGE, R),
    ]


def test_map_over_a_table_keeps_small_leaves(f: TablesAtHand):
    f.pt.map(HUGE + PAGE, PAGE, HUGE + PAGE, RW)
    assert not f.pt.map(0, 3 * HUGE, 0, RW)
    assert [(r[0], r[3]) for r in f.runs()] == [(0, HUGE), (HUGE, PAGE), (2 * HUGE, HUGE)]


def test_large_leaves_come_back_after_unmap(f: TablesAtHand):
    f.pt.map(HUGE + PAGE, PAGE, HUGE + PAGE, RW)
    f.pt.unmap(HUGE, HUGE)
    f.pt.map(HUGE, HUGE, HUGE, RW)
    assert f.runs() == [(HUGE, HUGE, HUGE, HUGE, RW)]


def test_unmap_of_nothing_is_no_change(f: TablesAtHand):
    assert not f.pt.unmap(0, LOWER_END)
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    assert not f.pt.unmap(0x2000, GIANT - 0x2000)
    assert f.pt.n_tables == 4


def test_unmap_of_everything_leaves_the_root(f: TablesAtHand):
    for gva in (0x1000, HUGE, 512 * GIANT, LOWER_END - PAGE):
        f.pt.map(gva, PAGE, 0x1000, RW)
    assert f.pt.unmap(0, LOWER_END)
    assert f.pt.n_tables == 1
    assert f.pt.is_empty()


def test_table_goes_with_its_last_page_though_unmapped_piecemeal(f: TablesAtHand):
    f.pt.map(HUGE, 512 * PAGE, PAGE, RW)
    for i in range(512):
        assert f.pt.n_tables == 4
        assert f.pt.unmap(HUGE + i * PAGE, PAGE)
    assert f.pt.n_tables == 1


def test_protect_changes_flags_and_keeps_frames(f: TablesAtHand):
    f.pt.map(0x1000, 0x3FF000, 0x1000, RW)
    assert f.pt.protect(0x1000, 0x3FF000, R)
    assert not f.pt.protect(0x1000, 0x3FF000, R)
    assert f.runs() == [
        (0x1000, 0x1FF000, 0x1000, PAGE, R),
        (HUGE, HUGE, HUGE, HUGE, R),
    ]


def test_protect_passes_over_gaps_and_mixed_flags(f: TablesAtHand):
    f.pt.map(0x1000, PAGE, 0x9000, RW)
    f.pt.map(0x2000, PAGE, 0x3000, R)
    f.pt.map(0x5000, PAGE, 0x5000, RX)
    assert f.pt.protect(0, 4 * HUGE, R)
    assert f.runs() == [
        (0x1000, PAGE, 0x9000, PAGE, R),
        (0x2000, PAGE, 0x3000, PAGE, R),
        (0x5000, PAGE, 0x5000, PAGE, R),
    ]


@pytest.mark.parametrize("odd", [None, 0x9000])
def test_protect_keeps_what_breaks_a_run(f: TablesAtHand, odd: int | None):
    # The first leaf is there, and the others nearly continue it.
    f.pt.map(0x1000, 20 * PAGE, 0x1000, RW)
    f.pt.unmap(0x5000, PAGE)
    if odd is not None:
        f.pt.map(0x5000, PAGE, odd, RW)
    assert f.pt.protect(0x1000, 20 * PAGE, R)
    assert [f.pt.lookup(gva) and f.pt.lookup(gva).gpa for gva in (0x4000, 0x5000, 0x6000)] == [
        0x4000,
        odd,
        0x6000,
    ]
    assert {run[4] for run in f.runs()} == {R}


def test_protect_of_a_part_splits_only_if_it_must(giant: TablesAtHand):
    giant.pt.map(GIANT, GIANT, GIANT, RW)
    assert not giant.pt.protect(GIANT + PAGE, PAGE, RW)
    assert giant.pt.n_tables == 2
    assert giant.pt.protect(GIANT + PAGE, PAGE, R)
    assert giant.pt.n_tables == 4
    assert giant.pt.lookup(GIANT + PAGE).flags == R
    assert giant.pt.lookup(GIANT + 2 * PAGE).flags == RW
    assert giant.pt.lookup(GIANT + HUGE).leaf_bytes == HUGE


@pytest.mark.parametrize("capacity", range(1, 6))
def test_exhausted_allocator_leaves_tables_in_order(
    capacity: int, walk_raw: WalkRaw, make_tables: MakeTables
):
    # Needs 6 tables: a PT at each end of the range, on both sides of a 1 GiB boundary.
    f = make_tables(capacity)
    with pytest.raises(ArenaExhaustedError):
        f.pt.map(GIANT - PAGE, 2 * PAGE, 0x3000, RW)
    raw = walk_raw(f.allocator, f.pt.root_gpa)
    assert len(raw.gpas) == f.pt.n_tables == f.allocator.n_allocated
    f.pt.unmap(0, LOWER_END)
    f.pt.recycle(zapped=True)
    assert f.allocator.n_allocated == 1


def test_exhausted_allocator_keeps_a_superpage_whole(make_tables: MakeTables):
    f = make_tables(4, giant_pages=True)
    f.pt.map(GIANT, GIANT, GIANT, RW)
    f.pt.map(0x1000 * GIANT, GIANT, GIANT, RW)
    for call in (
        lambda: f.pt.unmap(GIANT + PAGE, PAGE),
        lambda: f.pt.protect(GIANT + PAGE, PAGE, R),
    ):
        with pytest.raises(ArenaExhaustedError):
            call()
        assert f.pt.lookup(GIANT + PAGE).flags == RW
    assert f.n_used == f.allocator.n_allocated


class _WatchedAllocator(MemoryTableAllocator):
    """Looks at the tables whenever a new one is about to be filled."""

    seen: list[int]

    def allocate(self) -> tuple[int, memoryview]:
        if hasattr(self, "watch"):
            self.seen.append(self.watch().gpa)
        return super().allocate()


def test_superpage_stays_until_its_table_is_filled(live: bool):
    allocator = _WatchedAllocator(16)
    pt = PageTables(allocator, giant_pages=True, live=live)
    pt.map(GIANT, GIANT, GIANT, RW)
    allocator.seen = []
    allocator.watch = lambda: pt.lookup(GIANT + PAGE)
    pt.map(GIANT + PAGE, PAGE, 0x7000, RW)
    n_copies = 2 if live else 0
    assert allocator.seen == [GIANT] * (n_copies + 2), "the PD, then the PT: neither linked yet"
    assert pt.lookup(GIANT + PAGE).gpa == 0x7000
