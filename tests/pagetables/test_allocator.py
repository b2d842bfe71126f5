from __future__ import annotations

import pytest

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.pagetables import MemoryTableAllocator


def test_allocate_gives_zeroed_pages_at_ascending_addresses():
    allocator = MemoryTableAllocator(2, base_gpa=0x8000)
    for gpa in (0x8000, 0x9000):
        got, entries = allocator.allocate()
        assert got == gpa
        assert entries.format == "Q"
        assert entries.tolist() == [0] * 512
    assert allocator.n_allocated == 2


def test_entries_is_the_same_memory():
    allocator = MemoryTableAllocator(1)
    gpa, entries = allocator.allocate()
    entries[511] = 7
    assert allocator.entries(gpa)[511] == 7


def test_freed_page_is_junk_and_zeroed_again_when_reused():
    buffer = bytearray(4096)
    allocator = MemoryTableAllocator(1, buffer=buffer)
    gpa, entries = allocator.allocate()
    entries[0] = 1
    allocator.free(gpa)
    assert set(buffer) == {0xDB}
    assert allocator.allocate()[1].tolist() == [0] * 512


def test_exhausted_allocator_raises():
    allocator = MemoryTableAllocator(1)
    allocator.allocate()
    with pytest.raises(ArenaExhaustedError) as e:
        allocator.allocate()
    assert e.value.capacity_bytes == 4096


@pytest.mark.parametrize("call", ["entries", "free"])
def test_unknown_table_raises(call: str):
    allocator = MemoryTableAllocator(2)
    gpa, _ = allocator.allocate()
    with pytest.raises(StateError, match="no page table"):
        getattr(allocator, call)(gpa + 4096)
    allocator.free(gpa)
    with pytest.raises(StateError, match="no page table"):
        getattr(allocator, call)(gpa)
