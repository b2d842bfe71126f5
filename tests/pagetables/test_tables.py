"""One example a property. The first ten are those of gVisor's pagetables_test.go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import ArenaExhaustedError, RangeError, StateError
from kvmmm.hostarch.access import READ, READ_EXECUTE, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W, flags_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.pagetables import TableAllocator

    WalkRaw = Callable[[TableAllocator, int], Any]

PAGE = 1 << 12
HUGE = 1 << 21
GIANT = 1 << 30
LOWER_END = 0x0000_8000_0000_0000
UPPER_START = 0xFFFF_8000_0000_0000
TOP = 1 << 64

R = flags_of(READ, user=True)
RW = flags_of(READ_WRITE, user=True)
RX = flags_of(READ_EXECUTE, user=True)


class Fixture:
    """Tables over an allocator, and what they hold as plain tuples."""

    def __init__(self, capacity_tables: int = 64, **options: int) -> None:
        self.allocator = MemoryTableAllocator(capacity_tables)
        self.pt = PageTables(self.allocator, **options)

    def runs(self) -> list[tuple[int, int, int, int, int]]:
        return [(r.gva, r.length_bytes, r.gpa, r.leaf_bytes, r.flags) for r in self.pt.mappings()]


@pytest.fixture
def f() -> Fixture:
    return Fixture()


@pytest.fixture
def giant() -> Fixture:
    return Fixture(giant_pages=True)


def test_new_tables_are_a_root_alone(f: Fixture):
    assert f.runs() == []
    assert f.pt.n_tables == f.allocator.n_allocated == 1
    assert f.pt.is_empty()


def test_unmap(f: Fixture):
    assert not f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    assert f.pt.unmap(0x400000, PAGE)
    assert f.runs() == []
    assert f.pt.n_tables == 1


@pytest.mark.parametrize("flags", [R, RW, RX, flags_of(READ, user=False)])
def test_read_only_and_read_write(f: Fixture, flags: int):
    f.pt.map(0x400000, PAGE, 42 * PAGE, flags)
    assert f.runs() == [(0x400000, PAGE, 42 * PAGE, PAGE, flags)]


def test_serial_entries(f: Fixture):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x401000, PAGE, 47 * PAGE, RW)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x401000, PAGE, 47 * PAGE, PAGE, RW),
    ]
    assert f.pt.n_tables == 4


def test_spanning_entries(f: Fixture):
    # Two slots of the PML4.
    f.pt.map(0x7EFFFFFFF000, 2 * PAGE, 42 * PAGE, R)
    assert f.runs() == [(0x7EFFFFFFF000, 2 * PAGE, 42 * PAGE, PAGE, R)]
    assert f.pt.lookup(0x7EFFFFFFF000).gpa == 42 * PAGE
    assert f.pt.lookup(0x7F0000000000).gpa == 43 * PAGE
    assert f.pt.n_tables == 7


def test_sparse_entries(f: Fixture):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x7F0000000000, PAGE, 47 * PAGE, R)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, PAGE, 47 * PAGE, PAGE, R),
    ]


def test_2m_and_4k(f: Fixture):
    f.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    f.pt.map(0x7F0000000000, HUGE, 47 * HUGE, R)
    assert f.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, HUGE, 47 * HUGE, HUGE, R),
    ]


def test_1g_and_4k(giant: Fixture):
    giant.pt.map(0x400000, PAGE, 42 * PAGE, RW)
    giant.pt.map(0x7F0000000000, GIANT, 47 * GIANT, R)
    assert giant.runs() == [
        (0x400000, PAGE, 42 * PAGE, PAGE, RW),
        (0x7F0000000000, GIANT, 47 * GIANT, GIANT, R),
    ]


def test_split_1g_page(giant: Fixture):
    giant.pt.map(0x7F0000000000, GIANT, 42 * GIANT, R)
    assert giant.pt.unmap(0x7F0000000000 + PAGE, GIANT - 2 * PAGE)
    assert giant.runs() == [
        (0x7F0000000000, PAGE, 42 * GIANT, PAGE, R),
        (0x7F0000000000 + GIANT - PAGE, PAGE, 43 * GIANT - PAGE, PAGE, R),
    ]
    assert giant.pt.n_tables == 5


def test_split_2m_page(f: Fixture):
    f.pt.map(0x7F0000000000, HUGE, 42 * HUGE, R)
    assert f.pt.unmap(0x7F0000000000 + PAGE, HUGE - 2 * PAGE)
    assert f.runs() == [
        (0x7F0000000000, PAGE, 42 * HUGE, PAGE, R),
        (0x7F0000000000 + HUGE - PAGE, PAGE, 43 * HUGE - PAGE, PAGE, R),
    ]


def test_superpage_overlaid_by_misaligned_map_becomes_512_pages(f: Fixture):
    f.pt.map(HUGE, HUGE, 8 * HUGE, RW)
    assert f.pt.map(HUGE, HUGE, 8 * HUGE + PAGE, RW)
    assert f.runs() == [(HUGE, HUGE, 8 * HUGE + PAGE, PAGE, RW)]


def test_giant_page_overlaid_by_2m_aligned_map_becomes_512_superpages(giant: Fixture):
    giant.pt.map(GIANT, GIANT, 8 * GIANT, RW)
    assert giant.pt.map(GIANT, GIANT, 8 * GIANT + HUGE, RW)
    assert giant.runs() == [(GIANT, GIANT, 8 * GIANT + HUGE, HUGE, RW)]


def test_map_uses_the_largest_leaves_that_both_addresses_allow(giant: Fixture):
    end = 2 * GIANT + HUGE + PAGE
    giant.pt.map(GIANT - HUGE - PAGE, end - (GIANT - HUGE - PAGE), 5 * GIANT - HUGE - PAGE, RW)
    sizes = [(length, leaf) for _, length, _, leaf, _ in giant.runs()]
    assert sizes == [(PAGE, PAGE), (HUGE, HUGE), (GIANT, GIANT), (HUGE, HUGE), (PAGE, PAGE)]


@pytest.mark.parametrize(
    ("options", "leaf_bytes"),
    [
        ({}, HUGE),
        ({"giant_pages": True}, GIANT),
        ({"giant_pages": True, "max_leaf_bytes": HUGE}, HUGE),
    ],
)
def test_leaf_size_is_capped_by_the_cpu_and_the_caller(options: dict[str, Any], leaf_bytes: int):
    f = Fixture(**options)
    f.pt.map(GIANT, GIANT, GIANT, RW)
    assert f.runs() == [(GIANT, GIANT, GIANT, leaf_bytes, RW)]


def test_leaf_size_of_4k_is_obeyed():
    f = Fixture(max_leaf_bytes=PAGE)
    f.pt.map(HUGE, HUGE, HUGE, RW)
    assert f.runs() == [(HUGE, HUGE, HUGE, PAGE, RW)]


def test_leaf_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="4 KiB, 2 MiB or 1 GiB"):
        Fixture(max_leaf_bytes=8192)


def test_map_over_identical_changes_nothing(giant: Fixture):
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
def test_map_over_other_flags_or_frames_is_a_change(f: Fixture, length: int):
    f.pt.map(HUGE, length, HUGE, R)
    assert f.pt.map(HUGE, length, HUGE, RW)
    assert f.pt.map(HUGE, length, 4 * HUGE, RW)
    assert [run[2] for run in f.runs()] == [4 * HUGE]


def test_map_into_gaps_is_no_change(f: Fixture):
    f.pt.map(0x3000, PAGE, 0x3000, RW)
    assert not f.pt.map(0x1000, 5 * PAGE, 0x1000, RW)
    assert f.runs() == [(0x1000, 5 * PAGE, 0x1000, PAGE, RW)]


def test_accessed_and_dirty_bits_are_no_difference(f: Fixture):
    plain = RW & ~(PTE_A | PTE_D)
    f.pt.map(0x3000, PAGE, 0x3000, plain)
    assert not f.pt.map(0x3000, PAGE, 0x3000, RW)
    assert not f.pt.protect(0x3000, PAGE, plain)


def test_map_of_a_part_splits_a_superpage(f: Fixture):
    f.pt.map(HUGE, HUGE, 4 * HUGE, R)
    assert f.pt.map(HUGE + PAGE, PAGE, 0x7000, RW)
    assert f.runs() == [
        (HUGE, PAGE, 4 * HUGE, PAGE, R),
        (HUGE + PAGE, PAGE, 0x7000, PAGE, RW),
        (HUGE + 2 * PAGE, HUGE - 2 * PAGE, 4 * HUGE + 2 * PAGE, PAGE, R),
    ]


def test_map_over_a_table_keeps_small_leaves(f: Fixture):
    f.pt.map(HUGE + PAGE, PAGE, HUGE + PAGE, RW)
    assert not f.pt.map(0, 3 * HUGE, 0, RW)
    assert [(r[0], r[3]) for r in f.runs()] == [(0, HUGE), (HUGE, PAGE), (2 * HUGE, HUGE)]


def test_large_leaves_come_back_after_unmap(f: Fixture):
    f.pt.map(HUGE + PAGE, PAGE, HUGE + PAGE, RW)
    f.pt.unmap(HUGE, HUGE)
    f.pt.map(HUGE, HUGE, HUGE, RW)
    assert f.runs() == [(HUGE, HUGE, HUGE, HUGE, RW)]


def test_map_without_access_is_unmap(f: Fixture):
    f.pt.map(0x1000, 3 * PAGE, 0x1000, RW)
    assert f.pt.map(0x2000, PAGE, 0x2000, 0)
    assert not f.pt.map(0x2000, PAGE, 0x2000, 0)
    assert [run[0] for run in f.runs()] == [0x1000, 0x3000]


def test_unmap_of_nothing_is_no_change(f: Fixture):
    assert not f.pt.unmap(0, LOWER_END)
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    assert not f.pt.unmap(0x2000, GIANT - 0x2000)
    assert f.pt.n_tables == 4


def test_unmap_of_everything_leaves_the_root(f: Fixture):
    for gva in (0x1000, HUGE, 512 * GIANT, LOWER_END - PAGE):
        f.pt.map(gva, PAGE, 0x1000, RW)
    assert f.pt.unmap(0, LOWER_END)
    assert f.pt.n_tables == 1
    assert f.pt.is_empty()


def test_emptied_tables_wait_for_recycle(f: Fixture):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    f.pt.unmap(0x1000, PAGE)
    assert f.pt.n_tables == 1
    assert f.allocator.n_allocated == 4, "a CPU may still walk them"
    f.pt.recycle()
    assert f.allocator.n_allocated == 1


def test_table_goes_with_its_last_page_though_unmapped_piecemeal(f: Fixture):
    f.pt.map(HUGE, 512 * PAGE, PAGE, RW)
    for i in range(512):
        assert f.pt.n_tables == 4
        assert f.pt.unmap(HUGE + i * PAGE, PAGE)
    assert f.pt.n_tables == 1


@pytest.mark.parametrize("gva", [0, LOWER_END - PAGE, UPPER_START, TOP - PAGE])
def test_first_and_last_page_of_each_half(f: Fixture, gva: int):
    f.pt.map(gva, PAGE, 0x5000, RW)
    assert f.runs() == [(gva, PAGE, 0x5000, PAGE, RW)]
    assert f.pt.lookup(gva + PAGE - 1).gva == gva
    assert f.pt.unmap(gva, PAGE)
    assert f.pt.is_empty()


def test_both_halves_as_a_whole(f: Fixture):
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
def test_malformed_ranges_are_refused_and_change_nothing(f: Fixture, gva: int, length: int):
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
def test_malformed_frames_are_refused_and_change_nothing(f: Fixture, gpa: int):
    with pytest.raises(RangeError) as e:
        f.pt.map(0x1000, 2 * PAGE, gpa, RW)
    assert e.value.start == gpa
    assert f.pt.n_tables == 1


@pytest.mark.parametrize("flags", [RW | PTE_PS, RW | 0x1000, RW | 1 << 9])
def test_flags_that_are_none_are_refused(f: Fixture, flags: int):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    with pytest.raises(ValueError, match="no flags of a leaf"):
        f.pt.map(0x1000, PAGE, 0x1000, flags)
    with pytest.raises(ValueError, match="no flags of a leaf"):
        f.pt.protect(0x1000, PAGE, flags)
    assert f.runs() == [(0x1000, PAGE, 0x1000, PAGE, RW)]


def test_the_last_frame_can_be_mapped(f: Fixture):
    f.pt.map(0x1000, PAGE, (1 << 52) - PAGE, RW)
    assert f.pt.lookup(0x1000).gpa == (1 << 52) - PAGE


def test_protect_changes_flags_and_keeps_frames(f: Fixture):
    f.pt.map(0x1000, 0x3FF000, 0x1000, RW)
    assert f.pt.protect(0x1000, 0x3FF000, R)
    assert not f.pt.protect(0x1000, 0x3FF000, R)
    assert f.runs() == [
        (0x1000, 0x1FF000, 0x1000, PAGE, R),
        (HUGE, HUGE, HUGE, HUGE, R),
    ]


def test_protect_passes_over_gaps_and_mixed_flags(f: Fixture):
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
def test_protect_keeps_what_breaks_a_run(f: Fixture, odd: int | None):
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


def test_protect_of_a_part_splits_only_if_it_must(giant: Fixture):
    giant.pt.map(GIANT, GIANT, GIANT, RW)
    assert not giant.pt.protect(GIANT + PAGE, PAGE, RW)
    assert giant.pt.n_tables == 2
    assert giant.pt.protect(GIANT + PAGE, PAGE, R)
    assert giant.pt.n_tables == 4
    assert giant.pt.lookup(GIANT + PAGE).flags == R
    assert giant.pt.lookup(GIANT + 2 * PAGE).flags == RW
    assert giant.pt.lookup(GIANT + HUGE).leaf_bytes == HUGE


def test_protect_without_access_is_unmap(f: Fixture):
    f.pt.map(0x1000, PAGE, 0x1000, RW)
    assert f.pt.protect(0x1000, PAGE, 0)
    assert f.pt.is_empty()


def test_lookup_gives_the_leaf_around_an_address(giant: Fixture):
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
def test_lookup_of_nothing_is_none(f: Fixture, gva: int):
    f.pt.map(0x3000, PAGE, 0x9000, RX)
    assert f.pt.lookup(gva) is None


@pytest.mark.parametrize("level", [1, 2, 3])
def test_rights_are_those_of_all_levels_together(f: Fixture, level: int):
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


def test_mappings_of_a_range_are_clipped_to_leaves(f: Fixture):
    f.pt.map(0, 4 * HUGE, 0, RW)
    f.pt.map(UPPER_START, PAGE, 0x1000, RW)
    assert [(r.gva, r.length_bytes) for r in f.pt.mappings(HUGE + 1, 2 * HUGE + 1)] == [
        (HUGE, 2 * HUGE)
    ]
    assert [r.gva for r in f.pt.mappings(LOWER_END, TOP)] == [UPPER_START]
    assert list(f.pt.mappings(LOWER_END, UPPER_START)) == []
    assert list(f.pt.mappings(HUGE, HUGE)) == []


def test_mappings_join_runs_across_tables(f: Fixture):
    f.pt.map(PAGE, 4 * HUGE, HUGE, RW)
    assert f.runs() == [(PAGE, 4 * HUGE, HUGE, PAGE, RW)]


def test_is_empty_looks_at_its_range_only(f: Fixture):
    f.pt.map(0x3000, PAGE, 0x9000, RX)
    assert f.pt.is_empty(0, 0x3000)
    assert f.pt.is_empty(0x4000, GIANT)
    assert not f.pt.is_empty(0x3000, PAGE)
    assert not f.pt.is_empty()


def test_release_gives_every_page_back(f: Fixture):
    f.pt.map(PAGE, 3 * HUGE, PAGE, RW)
    f.pt.map(UPPER_START, PAGE, PAGE, RW)
    f.pt.unmap(PAGE, HUGE)
    f.pt.release()
    f.pt.release()
    assert f.allocator.n_allocated == 0
    assert f.pt.n_tables == 0
    for call in (
        lambda: f.pt.lookup(0x1000),
        lambda: f.pt.map(0x1000, PAGE, 0, RW),
        f.pt.is_empty,
        f.pt.image,
    ):
        with pytest.raises(StateError, match="released"):
            call()


@pytest.mark.parametrize("capacity", range(1, 6))
def test_exhausted_allocator_leaves_tables_in_order(capacity: int, walk_raw: WalkRaw):
    # Needs 6 tables: a PT at each end of the range, on both sides of a 1 GiB boundary.
    f = Fixture(capacity)
    with pytest.raises(ArenaExhaustedError):
        f.pt.map(GIANT - PAGE, 2 * PAGE, 0x3000, RW)
    raw = walk_raw(f.allocator, f.pt.root_gpa)
    assert len(raw.gpas) == f.pt.n_tables == f.allocator.n_allocated
    f.pt.unmap(0, LOWER_END)
    f.pt.recycle()
    assert f.allocator.n_allocated == 1


def test_exhausted_allocator_keeps_a_superpage_whole():
    f = Fixture(4, giant_pages=True)
    f.pt.map(GIANT, GIANT, GIANT, RW)
    f.pt.map(0x1000 * GIANT, GIANT, GIANT, RW)
    for call in (
        lambda: f.pt.unmap(GIANT + PAGE, PAGE),
        lambda: f.pt.protect(GIANT + PAGE, PAGE, R),
    ):
        with pytest.raises(ArenaExhaustedError):
            call()
        assert f.pt.lookup(GIANT + PAGE).flags == RW
    assert f.pt.n_tables == f.allocator.n_allocated


class _WatchedAllocator(MemoryTableAllocator):
    """Looks at the tables whenever a new one is about to be filled."""

    seen: list[int]

    def allocate(self) -> tuple[int, memoryview]:
        if hasattr(self, "watch"):
            self.seen.append(self.watch().gpa)
        return super().allocate()


def test_superpage_stays_until_its_table_is_filled():
    allocator = _WatchedAllocator(16)
    pt = PageTables(allocator, giant_pages=True)
    pt.map(GIANT, GIANT, GIANT, RW)
    allocator.seen = []
    allocator.watch = lambda: pt.lookup(GIANT + PAGE)
    pt.map(GIANT + PAGE, PAGE, 0x7000, RW)
    assert allocator.seen == [GIANT, GIANT], "the PD, then the PT: neither was linked yet"
    assert pt.lookup(GIANT + PAGE).gpa == 0x7000


def test_present_bit_is_what_makes_an_entry(f: Fixture):
    f.pt.map(0x1000, PAGE, 0, PTE_P)
    t = f.pt.lookup(0x1000)
    assert (t.gpa, t.flags) == (0, PTE_P)
    assert not t.flags & PTE_U
