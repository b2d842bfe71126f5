from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.hostarch.ranges import AddrRange, FileRange

SMALL = st.lists(st.integers(0, 24), min_size=2, max_size=2).map(lambda p: AddrRange(*sorted(p)))
NOT_EMPTY = SMALL.filter(bool)


def units(r: AddrRange) -> set[int]:
    return set(range(r.start, r.end))


@pytest.mark.parametrize(
    ("start", "end"), [(2, 1), (-1, 5), (-2, -1), (0, ADDRESS_LIMIT + 1), (ADDRESS_LIMIT + 1,) * 2]
)
def test_malformed(start: int, end: int):
    with pytest.raises(RangeError) as e:
        AddrRange(start, end)
    assert (e.value.start, e.value.end) == (start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, ADDRESS_LIMIT), (ADDRESS_LIMIT,) * 2])
def test_extremes(start: int, end: int):
    r = AddrRange(start, end)
    assert r.length_bytes == end - start
    assert bool(r) == (start != end)


def test_of_length():
    assert FileRange.of_length(0x1000, 0x2000) == FileRange(0x1000, 0x3000)
    for start, length in ((ADDRESS_LIMIT - 1, 2), (5, -1)):
        with pytest.raises(RangeError):
            AddrRange.of_length(start, length)


@pytest.mark.parametrize(
    ("start", "end", "aligned"),
    [(0, 0, True), (0x1000, 0x3000, True), (0x1001, 0x3000, False), (0x1000, 0x2FFF, False)],
)
def test_is_page_aligned(start: int, end: int, aligned: bool):
    assert AddrRange(start, end).is_page_aligned == aligned


@given(SMALL)
def test_units(r: AddrRange):
    assert r.length_bytes == len(units(r))
    assert bool(r) == bool(units(r))
    assert {unit for unit in range(-1, 26) if unit in r} == units(r)


@given(NOT_EMPTY, NOT_EMPTY)
def test_relations(a: AddrRange, b: AddrRange):
    assert a.covers(b) == (units(b) <= units(a))
    assert a.overlaps(b) == b.overlaps(a) == bool(units(a) & units(b))


@given(SMALL, SMALL)
def test_intersect(a: AddrRange, b: AddrRange):
    both = a.intersect(b)
    assert units(both) == units(a) & units(b)
    assert a.covers(both)


@given(SMALL, st.sampled_from([1, 2, 4, 8]))
def test_aligned_out(r: AddrRange, align: int):
    out = r.aligned_out(align)
    assert out.covers(r)
    assert out.start % align == out.end % align == 0
    assert r.start - out.start < align
    assert out.end - r.end < align


def test_aligned_out_at_the_top():
    top = AddrRange(ADDRESS_LIMIT - 5, ADDRESS_LIMIT - 1)
    assert top.aligned_out(4096) == AddrRange(ADDRESS_LIMIT - 4096, ADDRESS_LIMIT)


def test_results_keep_the_type():
    r = FileRange(0x1000, 0x3000)
    assert type(r.intersect(AddrRange(0, 0x2000))) is FileRange
    assert type(r.intersect(AddrRange(0, 1))) is FileRange
    assert type(r.aligned_out(1 << 21)) is FileRange


def test_equality_and_hash():
    assert AddrRange(1, 2) == AddrRange(1, 2)
    assert AddrRange(1, 2) != AddrRange(1, 3)
    assert len({AddrRange(1, 2), AddrRange(1, 2), AddrRange(2, 2)}) == 2
    # A guest address is no file offset, whatever the numbers.
    assert AddrRange(1, 2) != FileRange(1, 2)
    assert AddrRange(1, 2) != (1, 2)


def test_repr():
    assert repr(AddrRange(0x1000, 0x2000)) == "[0x1000, 0x2000)"


def test_slots():
    for r in (AddrRange(1, 2), FileRange(1, 2)):
        assert not hasattr(r, "__dict__")
