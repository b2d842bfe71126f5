"""`PageWalk` without KVM: what it finds, what it refuses, and how far frames lie side by side."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.hostarch.access import EXECUTE, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import (
    LEVEL_SHIFTS,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    TABLE_FLAGS,
    flags_of,
)
from kvmmm.pagetables.walk import walk_of

if TYPE_CHECKING:
    from kvmmm.safemem.ffi import PageWalk

PAGE, HUGE, GIANT, TOP = 1 << 12, 1 << 21, 1 << 30, 1 << 47
HVA = 1 << 53
"""Host address of frame 0; nothing is touched there."""
R, RW = flags_of(READ, user=True), flags_of(READ_WRITE, user=True)
RX = flags_of(READ_EXECUTE, user=True)
ACCESSES = (READ, WRITE, READ_WRITE, EXECUTE, READ_EXECUTE)


class Walked:
    """Tables and a walk of them over all frames there can be."""

    def __init__(self, **options: object) -> None:
        self.pt = PageTables(MemoryTableAllocator(64), giant_pages=True, **options)  # type: ignore[arg-type]
        self.walk = walk_of(self.pt, 0, 1 << 52, HVA)

    def find(self, addr: int, n_bytes: int = 1, access: int = READ) -> tuple[int, int] | None:
        """Guest-physical address, and bytes."""
        found = self.walk.find(addr, n_bytes, access)
        return found and (found[0] - HVA, found[1])


@pytest.fixture
def w() -> Walked:
    return Walked()


class TestPath:
    """One address, entries made by hand."""

    def _entries(self, w: Walked, leaf_level: int, addr: int) -> list[tuple[memoryview, int]]:
        """The entries on the way to `addr`, from the root down: (table, index)."""
        allocator = w.pt._allocator
        table = allocator.entries(w.pt.root_gpa)
        path = []
        for level in range(4, leaf_level - 1, -1):
            path.append((table, addr >> LEVEL_SHIFTS[level] & 511))
            if level > leaf_level:
                gpa, below = allocator.allocate()
                table[path[-1][1]] = gpa | TABLE_FLAGS
                table = below
        return path

    @pytest.mark.parametrize("leaf_level", [1, 2, 3])
    @pytest.mark.parametrize("bit", [PTE_P, PTE_U, PTE_W, PTE_NX])
    def test_every_level_must_permit(self, leaf_level: int, bit: int):
        for at_level in range(leaf_level, 5):
            w = Walked()
            addr = TOP - (3 << 39) + 0x12_3456_7890
            path = self._entries(w, leaf_level, addr)
            table, index = path[-1]
            ps = PTE_PS if leaf_level > 1 else 0
            table[index] = 5 << 30 | ps | PTE_P | PTE_U | PTE_W
            where = 5 << 30 | addr & (1 << LEVEL_SHIFTS[leaf_level]) - 1
            assert [w.find(addr, 1, access) for access in ACCESSES] == [(where, 1)] * 5
            table, index = path[4 - at_level]
            table[index] ^= bit
            refused = {PTE_W: WRITE, PTE_NX: EXECUTE}.get(bit, -1)
            assert [w.find(addr, 1, access) for access in ACCESSES] == [
                None if access & refused else (where, 1) for access in ACCESSES
            ]

    def test_a_leaf_in_the_root_is_none(self, w: Walked):
        w.pt._allocator.entries(w.pt.root_gpa)[0] = RW | PTE_PS
        assert w.find(0x1000) is None

    @pytest.mark.parametrize("level", [2, 3])
    def test_pat_of_a_superpage_is_no_address(self, w: Walked, level: int):
        table, index = self._entries(w, level, 0)[-1]
        span = 1 << LEVEL_SHIFTS[level]
        for i in range(2):
            table[index + i] = 7 * GIANT + i * span | 1 << 12 | RW | PTE_PS
        assert w.find(0x1234, 2 * span) == (7 * GIANT + 0x1234, 2 * span - 0x1234)

    def test_pat_of_a_page_is_no_size(self, w: Walked):
        table, index = self._entries(w, 1, 0)[-1]
        table[index] = 0x5000 | RW | PTE_PS
        assert w.find(0x10, PAGE) == (0x5010, PAGE - 0x10)

    def test_ignored_bits_are_ignored(self, w: Walked):
        for table, index in self._entries(w, 1, 0):
            table[index] |= 0x7FF << 52 | 0xE00
        table[index] |= 0x5000 | RW
        assert w.find(0, PAGE) == (0x5000, PAGE)


class TestRefused:
    def test_what_is_not_the_user_half(self, w: Walked):
        for addr in (TOP - PAGE, (1 << 64) - PAGE):
            w.pt.map(addr, PAGE, 0x5000, RW)
        assert w.find(TOP - PAGE, 2 * PAGE) == (0x5000, PAGE)
        assert w.find((1 << 64) - PAGE) is None
        assert w.find((1 << 64) - 1, (1 << 64) - 1) is None
        for addr in (TOP, TOP + 5, 1 << 48, 1 << 63):
            assert w.find(addr) is None

    def test_fixed_slots(self):
        inner = Walked()
        inner.pt.map(0, GIANT, GIANT, RW)
        inner.pt.map(1 << 39, GIANT, 2 * GIANT, RW)
        link = inner.pt._allocator.entries(inner.pt.root_gpa)[0]
        pt = PageTables(inner.pt._allocator, fixed={1: link}, giant_pages=True)
        walk = walk_of(pt, 0, 1 << 52, HVA)
        pt.map((1 << 39) - GIANT, GIANT, 0, RW)
        assert walk.find(1 << 39, 8, READ) is None
        # The frames go on there, but nobody looks.
        assert walk.find((1 << 39) - 8, 16, READ) == (HVA + GIANT - 8, 8)

    def test_frames_outside_the_window(self, w: Walked):
        w.pt.map(0, 4 * HUGE, GIANT, RW)
        tables = w.pt._allocator
        first = min(tables._live)
        walk = walk_of(w.pt, first, GIANT + HUGE + 3 * PAGE - first, HVA + first)
        assert walk.find(HUGE, 4 * HUGE, READ) == (HVA + GIANT + HUGE, 3 * PAGE)
        assert walk.find(HUGE + 3 * PAGE - 1, 8, READ) == (HVA + GIANT + HUGE + 3 * PAGE - 1, 1)
        assert walk.find(HUGE + 3 * PAGE, 8, READ) is None
        w.pt.map(0, PAGE, first - PAGE, RW)
        w.pt.map(PAGE, PAGE, first, RW)
        assert walk.find(0, 2 * PAGE, READ) is None
        assert walk.find(PAGE, 2 * PAGE, READ) == (HVA + first, PAGE)

    def test_a_link_out_of_the_window_is_not_followed(self, w: Walked):
        w.pt.map(0, PAGE, 0x5000, RW)
        allocator = w.pt._allocator
        table, gpa = allocator.entries(w.pt.root_gpa), w.pt.root_gpa
        gpas = sorted(allocator._live)
        for _ in range(3):
            link = table[0]
            for wild in (gpas[0] - PAGE, gpas[-1] + PAGE, 0, 1 << 51, 0xF_FFFF_FFFF_F000):
                table[0] = wild | TABLE_FLAGS
                walk = walk_of(w.pt, gpas[0], gpas[-1] + PAGE - gpas[0], HVA)
                assert walk.find(0, 8, READ) is None
            table[0] = link
            gpa = link & -PAGE
            table = allocator.entries(gpa)
        # Neither is the root, where that lies elsewhere.
        assert walk_of(w.pt, 0, gpas[0], HVA).find(0, 8, READ) is None

    def test_no_bytes(self, w: Walked):
        w.pt.map(0, PAGE, 0x5000, RW)
        assert w.find(0, 0) is None

    @pytest.mark.parametrize(
        "args", [(-1, 1, 1), (1 << 64, 1, 1), (0, -1, 1), (0, 1, -1), (0, 1), (0, 1, 1, 1)]
    )
    def test_arguments(self, w: Walked, args: tuple[int, ...]):
        with pytest.raises((OverflowError, TypeError)):
            w.walk.find(*args)  # type: ignore[arg-type,call-arg]

    @pytest.mark.parametrize("args", [(0, 0, PAGE, 0), (8, 5, PAGE, 0), (8, 0, 5, 0)])
    def test_windows(self, w: Walked, args: tuple[int, ...]):
        with pytest.raises(ValueError, match="whole pages"):
            type(w.walk)(*args)


class TestSideBySide:
    def test_over_tables_and_leaf_sizes(self, w: Walked):
        # 4 KiB leaves, 2 MiB leaves, a 1 GiB leaf, and the same back.
        start, n = GIANT - HUGE - 5 * PAGE, GIANT + 2 * HUGE + 10 * PAGE
        w.pt.map(start, n, start + 4 * GIANT, RW)
        assert {run.leaf_bytes for run in w.pt.mappings()} == {PAGE, HUGE, GIANT}
        for addr in (start, start + 0x123, start + 5 * PAGE, GIANT + 7, start + n - 1):
            assert w.find(addr, 1 << 40) == (addr + 4 * GIANT, start + n - addr)
            assert w.find(addr, 1) == (addr + 4 * GIANT, 1)
        w.pt.protect(GIANT + HUGE, PAGE, R)
        assert w.find(start, 1 << 40, WRITE) == (start + 4 * GIANT, GIANT + HUGE - start)
        assert w.find(start, 1 << 40) == (start + 4 * GIANT, n)
        w.pt.unmap(GIANT + HUGE, PAGE)
        assert w.find(start, 1 << 40) == (start + 4 * GIANT, GIANT + HUGE - start)

    def test_over_root_entries(self, w: Walked):
        w.pt.map((1 << 39) - HUGE, 2 * HUGE, GIANT, RW)
        assert w.find((1 << 39) - HUGE + 1, GIANT) == (GIANT + 1, 2 * HUGE - 1)

    def test_a_page_that_others_do_not_follow(self, w: Walked):
        frames = [3, 4, 6, 7, 8, 7]
        for i, frame in enumerate(frames):
            w.pt.map(i * PAGE, PAGE, frame * PAGE, RW)
        assert [w.find(i * PAGE, 8 * PAGE) for i in range(7)] == [
            (3 * PAGE, 2 * PAGE), (4 * PAGE, PAGE), (6 * PAGE, 3 * PAGE), (7 * PAGE, 2 * PAGE),
            (8 * PAGE, PAGE), (7 * PAGE, PAGE), None,
        ]  # fmt: skip

    @given(st.data())
    def test_random_pages(self, data: st.DataObject):
        """The last pages of one table and the first ones of the next, few frames and rights."""
        w = Walked()
        base = 512 * PAGE - 4 * PAGE
        kinds = st.tuples(st.integers(-1, 1), st.sampled_from([0, R, RW, RW, RX, PTE_P | PTE_W]))
        pages = data.draw(st.lists(kinds, min_size=8, max_size=8))
        for i, (skew, flags) in enumerate(pages):
            w.pt.map(base + i * PAGE, PAGE, (100 + i + skew) * PAGE, flags)
        for access in ACCESSES:
            addr = base + data.draw(st.integers(0, 8 * PAGE - 1))
            n = data.draw(st.integers(1, 10 * PAGE))
            assert w.find(addr, n, access) == _slow_find(pages, addr - base, n, access)


def _slow_find(
    pages: list[tuple[int, int]], offset: int, n: int, access: int
) -> tuple[int, int] | None:
    gpa, got = -1, 0
    for i in range(offset // PAGE, 8):
        skew, flags = pages[i]
        at = max(offset, i * PAGE)
        here = (100 + i + skew) * PAGE + at % PAGE
        may = flags & PTE_U and not (access & WRITE and not flags & PTE_W)
        may = may and not (access & EXECUTE and flags & PTE_NX)
        if not may or (got and here != gpa + got):
            break
        gpa = gpa if got else here
        got += PAGE - at % PAGE
    return (gpa, min(got, n)) if got else None


class TestLife:
    def test_released_tables_are_not_walked(self, w: Walked):
        w.pt.map(0, PAGE, 0x5000, RW)
        w.pt.release()
        assert w.find(0) is None

    def test_a_closed_walk_finds_nothing(self, w: Walked):
        w.pt.map(0, PAGE, 0x5000, RW)
        w.walk.close()
        w.walk.close()
        assert w.find(0) is None

    def test_the_struct_lives_as_long_as_the_walk(self, w: Walked):
        struct = w.pt._c
        before = sys.getrefcount(struct)
        walks: list[PageWalk] = [walk_of(w.pt, 0, GIANT, HVA) for _ in range(3)]
        assert sys.getrefcount(struct) == before + 3
        del walks[1:]
        assert sys.getrefcount(struct) == before + 1
        walks.clear()
        assert sys.getrefcount(struct) == before

    def test_nobody_is_inside(self, w: Walked):
        w.pt.map(0, PAGE, 0x5000, RW)
        w.find(0)
        assert w.walk.n_inside == 0
        w.walk.drain()
