"""AddrRangeSeq: scenarios of gVisor's addr_range_seq_test.go, named after them, and a model."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import MAX_BYTES, AddrRangeSeq, truncated_addr_range_seq

Pairs = list[tuple[int, int]]

TABLES: dict[str, Pairs] = {
    "nothing": [],
    "one empty range": [(0x10, 0x10)],
    "one byte": [(0x10, 0x11)],
    "two bytes": [(0x10, 0x12)],
    "two ranges": [(0x10, 0x11), (0x20, 0x22)],
    "empty ones in between": [
        (0x10, 0x10), (0x20, 0x20), (0x30, 0x33), (0x40, 0x44), (0x50, 0x50), (0x60, 0x60),
        (0x70, 0x77), (0x80, 0x88), (0x90, 0x90), (0xA0, 0xA0),
    ],
}  # fmt: skip


def seq_of(pairs: Pairs) -> AddrRangeSeq:
    return AddrRangeSeq(AddrRange(*pair) for pair in pairs)


def check_by_tails(seq: AddrRangeSeq, wanted: Pairs) -> None:
    left = sum(end - start for start, end in wanted)
    assert list(seq) == [AddrRange(*pair) for pair in wanted]
    for i, (start, end) in enumerate(wanted):
        assert not seq.is_empty
        assert (seq.n_ranges, seq.n_bytes) == (len(wanted) - i, left)
        assert seq.head == AddrRange(start, end)
        seq = seq.tail
        left -= end - start
    assert (seq.is_empty, seq.n_ranges, seq.n_bytes) == (True, 0, 0)


def unpacked(seq: AddrRangeSeq) -> Pairs:
    numbers = struct.iter_unpack("=QQ", seq.packed)
    return [(start, start + length_bytes) for start, length_bytes in numbers]


@pytest.mark.parametrize("pairs", TABLES.values(), ids=TABLES)
def test_tail_iteration(pairs: Pairs):
    check_by_tails(seq_of(pairs), pairs)


@pytest.mark.parametrize("pairs", TABLES.values(), ids=TABLES)
def test_drop_single_byte_iteration(pairs: Pairs):
    heads: Pairs = []
    for start, end in pairs:
        heads += [(at, end) for at in range(start, max(end, start + 1))]
    left = sum(end - start for start, end in pairs)
    seq = seq_of(pairs)
    for start, end in heads:
        assert seq.n_bytes == left
        assert seq.head == AddrRange(start, end)
        seq = seq.drop_first(1 if start < end else 0)
        left -= start < end
    assert seq.is_empty
    assert seq.n_bytes == left == 0


def test_drop_first_empty():
    assert AddrRangeSeq().drop_first(1) == AddrRangeSeq()
    assert AddrRangeSeq().drop_first(0).is_empty


def test_take_first_empty():
    assert AddrRangeSeq().take_first(1) == AddrRangeSeq()
    assert AddrRangeSeq().take_first(0).is_empty


def test_take_first():
    pairs = [
        (0x10, 0x11), (0x20, 0x22), (0x30, 0x30), (0x40, 0x44), (0x50, 0x55), (0x60, 0x60),
        (0x70, 0x77),
    ]  # fmt: skip
    check_by_tails(
        seq_of(pairs).take_first(5),
        [
            (0x10, 0x11), (0x20, 0x22), (0x30, 0x30), (0x40, 0x42), (0x50, 0x50), (0x60, 0x60),
            (0x70, 0x70),
        ],
    )  # fmt: skip


def test_more_bytes_than_a_count_can_say():
    half = AddrRange(0, 1 << 62)
    rest = AddrRange(7, 7 + MAX_BYTES - (1 << 62))
    assert AddrRangeSeq([half, rest]).n_bytes == MAX_BYTES
    for ranges in ([half, half], [half, rest, AddrRange(5, 6)], [AddrRange(0, ADDRESS_LIMIT)]):
        with pytest.raises(RangeError, match="more than can be counted"):
            AddrRangeSeq(ranges)


def test_dropping_more_than_there_is_leaves_no_ranges():
    """Also none of length 0; dropping all there is keeps those behind it."""
    seq = seq_of([(1, 3), (8, 8), (9, 9)])
    assert seq.drop_first(3).is_empty
    assert list(seq.drop_first(2)) == [AddrRange(8, 8), AddrRange(9, 9)]
    assert list(seq.drop_first(2).drop_first(0)) == [AddrRange(9, 9)]


def test_refused():
    seq = seq_of([(1, 3)])
    for refused in (seq.drop_first, seq.take_first):
        with pytest.raises(RangeError):
            refused(-1)
    for name in ("head", "tail"):
        with pytest.raises(IndexError):
            getattr(AddrRangeSeq(), name)


def test_equality_hash_and_text():
    seq = seq_of([(0x10, 0x12), (0x20, 0x21)])
    assert seq.drop_first(1) == seq_of([(0x11, 0x12), (0x20, 0x21)])
    assert len({seq, seq_of([(0x10, 0x12), (0x20, 0x21)]), seq.tail}) == 2
    assert seq != [AddrRange(0x10, 0x12), AddrRange(0x20, 0x21)]
    assert repr(seq.take_first(2)) == "[[0x10, 0x12), [0x20, 0x20)]"


RANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 9)).map(lambda p: AddrRange(p[0], p[0] + p[1])),
    max_size=6,
)
CUTS = st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=8)


def dropped(model: list[range], n_bytes: int) -> list[range]:
    """As the words of the specification say it, on ranges of Python."""
    if n_bytes > sum(map(len, model)):
        return []
    while model and len(model[0]) <= n_bytes:
        n_bytes -= len(model[0])
        model = model[1:]
        if not n_bytes:
            return model
    return [model[0][n_bytes:], *model[1:]] if model else []


def taken(model: list[range], n_bytes: int) -> list[range]:
    found = []
    for one in model:
        found.append(one[:n_bytes])
        n_bytes -= len(found[-1])
    return found


@given(RANGES, CUTS)
def test_model(ranges: list[AddrRange], cuts: list[tuple[bool, int]]):
    seq = AddrRangeSeq(ranges)
    model = [range(ar.start, ar.end) for ar in ranges]
    for is_drop, n_bytes in cuts:
        before = list(seq)
        new = seq.drop_first(n_bytes) if is_drop else seq.take_first(n_bytes)
        assert list(seq) == before  # it is immutable
        seq, model = new, (dropped if is_drop else taken)(model, n_bytes)
        pairs = [(one.start, one.stop) for one in model]
        check_by_tails(seq, pairs)
        assert unpacked(seq) == pairs
        assert seq.packed is seq.packed  # made once


@given(RANGES, CUTS)
def test_packed_is_what_iteration_gives(ranges: list[AddrRange], cuts: list[tuple[bool, int]]):
    """In every order of asking: derived from what has been packed, and from what has not."""
    seq = AddrRangeSeq(ranges)
    for is_drop, n_bytes in cuts:
        seq = seq.drop_first(n_bytes) if is_drop else seq.take_first(n_bytes)
    assert unpacked(seq) == [(ar.start, ar.end) for ar in seq]


def test_packed_at_the_end_of_all_addresses():
    """2**64 itself is no 64-bit number; only a range without bytes can be there."""
    last = ADDRESS_LIMIT - 1
    seq = AddrRangeSeq([AddrRange(last, ADDRESS_LIMIT), AddrRange(ADDRESS_LIMIT, ADDRESS_LIMIT)])
    assert seq.packed == struct.pack("=4Q", last, 1, last, 0)
    assert seq.tail.packed == struct.pack("=2Q", last, 0)
    assert AddrRangeSeq().packed == AddrRangeSeq().drop_first(7).packed == b""
    with pytest.raises(AttributeError, match="unpacked"):
        _ = AddrRangeSeq().unpacked  # type: ignore[attr-defined]


@given(RANGES, st.data())
def test_truncated(ranges: list[AddrRange], data: st.DataObject):
    seq = AddrRangeSeq(ranges)
    rest = seq
    for _ in range(data.draw(st.integers(0, max(len(ranges) - 1, 0)))):
        rest = rest.tail
    if rest.is_empty:
        return
    end = data.draw(st.integers(0, rest.head.end))
    cut = truncated_addr_range_seq(seq, rest, end)
    n_before = seq.n_ranges - rest.n_ranges
    wanted = ranges[:n_before]
    for i, ar in enumerate(ranges[n_before:]):
        stop = max(end, ar.start) if i == 0 else ar.start
        wanted.append(AddrRange(ar.start, stop))
    assert list(cut) == wanted
