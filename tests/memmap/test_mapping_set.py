"""MappingSet: what is newly mapped, what no longer, and who is told to forget what."""

from __future__ import annotations

import pytest

from kvmmm.errors import RangeError
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.memmap.mapping_set import MappingSet
from tests.memmap.fake_space import FakeSpace

LIMIT = 1 << 64


class Harness:
    """One set and one space; hexadecimal numbers as in the scenarios."""

    def __init__(self) -> None:
        self.mappings = MappingSet()
        self.space = FakeSpace()

    def add(
        self, start: int, end: int, offset: int, *, writable: bool = True
    ) -> list[tuple[int, int]]:
        fresh = self.mappings.add_mapping(
            self.space, AddrRange(start, end), offset, writable=writable
        )
        self.mappings.check_invariants()
        return [(fr.start, fr.end) for fr in fresh]

    def remove(
        self, start: int, end: int, offset: int, *, writable: bool = True
    ) -> list[tuple[int, int]]:
        gone = self.mappings.remove_mapping(
            self.space, AddrRange(start, end), offset, writable=writable
        )
        self.mappings.check_invariants()
        return [(fr.start, fr.end) for fr in gone]

    def invalidate(self, start: int, end: int) -> list[tuple[int, int]]:
        self.space.invalidated.clear()
        self.mappings.invalidate(start, end, private=False)
        return sorted(self.space.invalidated)


@pytest.fixture
def h() -> Harness:
    return Harness()


def test_add_remove_mapping(h: Harness):
    assert h.add(0x10000, 0x12000, 0x1000) == [(0x1000, 0x3000)]
    assert h.add(0x20000, 0x21000, 0x2000) == []
    assert h.add(0x30000, 0x31000, 0x4000) == [(0x4000, 0x5000)]
    assert h.add(0x12000, 0x15000, 0x3000) == [(0x3000, 0x4000), (0x5000, 0x6000)]
    assert h.remove(0x10000, 0x11000, 0x1000) == [(0x1000, 0x2000)]
    assert h.remove(0x20000, 0x21000, 0x2000) == []
    assert h.remove(0x11000, 0x15000, 0x2000) == [(0x2000, 0x4000), (0x5000, 0x6000)]
    assert h.remove(0x30000, 0x31000, 0x4000) == [(0x4000, 0x5000)]
    assert not h.mappings


def test_invalidate_whole(h: Harness):
    h.add(0x10000, 0x11000, 0)
    assert h.invalidate(0, 0x1000) == [(0x10000, 0x11000)]


def test_invalidate_partial(h: Harness):
    h.add(0x10000, 0x13000, 0)
    assert h.invalidate(0x1000, 0x2000) == [(0x11000, 0x12000)]


def test_invalidate_multiple(h: Harness):
    h.add(0x10000, 0x11000, 0)
    h.add(0x20000, 0x21000, 0x2000)
    assert h.invalidate(0, 0x3000) == [(0x10000, 0x11000), (0x20000, 0x21000)]


def test_invalidate_overlapping():
    mappings, ms1, ms2 = MappingSet(), FakeSpace(), FakeSpace()
    mappings.add_mapping(ms1, AddrRange(0x10000, 0x12000), 0, writable=True)
    mappings.add_mapping(ms2, AddrRange(0x20000, 0x22000), 0x1000, writable=True)
    mappings.invalidate(0x1000, 0x2000, private=True)
    assert ms1.invalidated == [(0x11000, 0x12000)]
    assert ms2.invalidated == [(0x20000, 0x21000)]
    assert ms1.private == ms2.private == [True]


def test_mixed_writable(h: Harness):
    assert h.add(0x10000, 0x12000, 0x1000) == [(0x1000, 0x3000)]
    assert h.add(0x20000, 0x22000, 0x2000, writable=False) == [(0x3000, 0x4000)]
    assert h.remove(0x20000, 0x21000, 0x2000, writable=True) == []
    assert h.invalidate(0x2000, 0x3000) == [(0x11000, 0x12000), (0x20000, 0x21000)]
    assert h.remove(0x20000, 0x21000, 0x2000, writable=False) == []
    assert h.remove(0x11000, 0x12000, 0x2000, writable=True) == [(0x2000, 0x3000)]
    assert h.remove(0x10000, 0x12000, 0x1000, writable=False) == []
    assert h.remove(0x10000, 0x12000, 0x1000, writable=True) == [(0x1000, 0x2000)]
    assert h.remove(0x21000, 0x22000, 0x3000, writable=False) == [(0x3000, 0x4000)]
    assert not h.mappings


def test_one_range_of_addresses_is_one_call(h: Harness):
    h.add(0x10000, 0x14000, 0)
    h.add(0x80000, 0x81000, 0x1000, writable=False)  # cuts the offsets in three
    assert h.invalidate(0, LIMIT) == [(0x10000, 0x14000), (0x80000, 0x81000)]


def test_same_offset_at_two_addresses_of_one_space(h: Harness):
    assert h.add(0x10000, 0x11000, 0x5000) == [(0x5000, 0x6000)]
    assert h.add(0x11000, 0x12000, 0x5000) == []
    assert h.invalidate(0, LIMIT) == [(0x10000, 0x11000), (0x11000, 0x12000)]
    assert h.remove(0x10000, 0x11000, 0x5000) == []
    assert h.remove(0x11000, 0x12000, 0x5000) == [(0x5000, 0x6000)]


def test_offsets_reach_to_the_end_of_64_bits(h: Harness):
    assert h.add(0x1000, 0x2000, LIMIT - 0x1000) == [(LIMIT - 0x1000, LIMIT)]
    assert h.invalidate(LIMIT - 0x1000, LIMIT) == [(0x1000, 0x2000)]
    with pytest.raises(RangeError):
        h.add(0x1000, 0x3000, LIMIT - 0x1000)


@pytest.mark.parametrize(
    ("start", "end", "offset"), [(1, 0x1000, 0), (0, 0x1001, 0), (0, 0x1000, 5), (0, 0, 0)]
)
def test_whole_pages_only(h: Harness, start: int, end: int, offset: int):
    for change in (h.add, h.remove):
        with pytest.raises(RangeError, match="whole pages"):
            change(start, end, offset)
    assert not h.mappings


def test_damage_is_found(h: Harness):
    h.mappings._mappings.insert(0, 0x1000, frozenset())
    with pytest.raises(AssertionError):
        h.mappings.check_invariants()
    assert "MappingSet" in repr(h.mappings)


def test_ranges_are_file_ranges(h: Harness):
    fresh = h.mappings.add_mapping(h.space, AddrRange(0, 0x1000), 0, writable=True)
    assert fresh == [FileRange(0, 0x1000)]
