from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ_EXECUTE, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.dump import render_mappings
from kvmmm.pagetables.pte import flags_of

if TYPE_CHECKING:
    from tests.pagetables.conftest import WalkRaw

RW = flags_of(READ_WRITE, user=True)
RX = flags_of(READ_EXECUTE, user=True)


def boot_tables(allocator: MemoryTableAllocator) -> PageTables:
    pt = PageTables(allocator)
    pt.map(0x1000, 0x3FFFF000, 0x1000, RW)
    pt.map(0x200000, 0x1000, 0x200000, RX)
    pt.map(0xFFFF800000000000, 0x3000, 0x7000, RW)
    return pt


def test_from_image_maps_the_same_wherever_the_tables_lie(walk_raw: WalkRaw):
    first = boot_tables(MemoryTableAllocator(16))
    other = MemoryTableAllocator(16, base_gpa=0xABC000)
    second = PageTables.from_image(other, first.image())
    assert render_mappings(second) == render_mappings(first)
    assert second.n_tables == first.n_tables == other.n_allocated
    assert len(walk_raw(other, second.root_gpa).gpas) == second.n_tables


def test_image_is_a_copy(walk_raw: WalkRaw):
    allocator = MemoryTableAllocator(32)
    first = boot_tables(allocator)
    text = render_mappings(first)
    image = first.image()
    first.unmap(0x1000, 0x100000)
    second = PageTables.from_image(allocator, image)
    second.map(0x5000, 0x1000, 0x9000, RX)
    second.release()
    third = PageTables.from_image(allocator, image)
    assert render_mappings(third) == text
    walk_raw(allocator, third.root_gpa)


def test_image_holds_no_addresses_of_tables():
    pt = boot_tables(MemoryTableAllocator(16, base_gpa=0xABC000))
    image = pt.image()
    assert len(image.links) == pt.n_tables - 1
    assert all(image.contents[table][index] == 0 for table, index, _ in image.links)


def test_from_image_can_be_edited_and_released():
    allocator = MemoryTableAllocator(16)
    pt = PageTables.from_image(allocator, boot_tables(MemoryTableAllocator(16)).image())
    assert pt.unmap(0x400000, 0x1000)
    assert pt.lookup(0x400000) is None
    assert pt.lookup(0x401000).gpa == 0x401000
    pt.release()
    assert allocator.n_allocated == 0


def test_from_image_without_pages_enough_keeps_none():
    image = boot_tables(MemoryTableAllocator(16)).image()
    allocator = MemoryTableAllocator(4)
    with pytest.raises(ArenaExhaustedError):
        PageTables.from_image(allocator, image)
    assert allocator.n_allocated == 0
