from __future__ import annotations

from kvmmm.hostarch.access import READ_EXECUTE, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.dump import render_mappings, render_walk
from kvmmm.pagetables.pte import flags_of


def tables() -> tuple[MemoryTableAllocator, PageTables]:
    allocator = MemoryTableAllocator(16, base_gpa=0x10000)
    pt = PageTables(allocator)
    pt.map(0x200000, 0x1000, 0x200000, flags_of(READ_EXECUTE, user=True))
    pt.map(0x400000, 0x400000, 0x400000, flags_of(READ_WRITE, user=True))
    pt.map(0xFFFFFFFFFFFFF000, 0x1000, 0x9000, flags_of(READ_WRITE, user=False))
    return allocator, pt


def test_render_mappings_is_one_line_a_run():
    assert render_mappings(tables()[1]).splitlines() == [
        "0x0000000000200000-0x0000000000201000 -> 0x200000  4K r-x U",
        "0x0000000000400000-0x0000000000800000 -> 0x400000  2M rw- U",
        "0xfffffffffffff000-0x10000000000000000 -> 0x9000  4K rw- S",
    ]


def test_render_mappings_of_empty_tables_is_empty():
    assert render_mappings(PageTables(MemoryTableAllocator(1))) == ""


def test_render_walk_shows_every_level_down_to_the_leaf():
    allocator, pt = tables()
    assert render_walk(allocator, pt.root_gpa, 0x600123).splitlines() == [
        "0x10000[  0] = 0x0000000000011027  PML4E 0x11000 table P W U A",
        "0x11000[  0] = 0x0000000000012027  PDPTE 0x12000 table P W U A",
        "0x12000[  3] = 0x80000000006000e7  PDE 0x600000 2M P W U A D NX",
    ]


def test_render_walk_ends_at_an_absent_entry():
    allocator, pt = tables()
    lines = render_walk(allocator, pt.root_gpa, 0x201000).splitlines()
    assert len(lines) == 4
    assert lines[3].endswith("PTE absent")
