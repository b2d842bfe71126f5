"""SegmentSet: the scenarios of gVisor's pkg/segment/test, and the ends of the address space."""

from __future__ import annotations

import random

import pytest

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.segment import SegmentSet

N = 8000


def equal_values(_start1: int, _end1: int, value1: int, value2: int) -> int | None:
    return value1 if value1 == value2 else None


def running_values(start1: int, end1: int, value1: int, value2: int) -> int | None:
    # As a pma: the value is an offset that runs with the address.
    return value1 if value1 + (end1 - start1) == value2 else None


def split_running(start: int, _end: int, value: int, at: int) -> tuple[int, int]:
    return value, value + (at - start)


def shuffled(n: int) -> list[int]:
    order = list(range(n))
    random.Random(n).shuffle(order)
    return order


def check_every(step: int, i: int, s: SegmentSet[int], count: int) -> None:
    assert len(s) == count
    s.check_invariants()
    if i % step == 0:
        assert all(value == start + 100_000 for start, _, value in s)


def test_add_random():
    s: SegmentSet[int] = SegmentSet()
    for i, start in enumerate(shuffled(N)):
        s.insert(start, start + 1, start + 100_000)
        check_every(500, i, s, i + 1)
    assert list(s) == [(i, i + 1, i + 100_000) for i in range(N)]


def test_remove_random():
    s: SegmentSet[int] = SegmentSet()
    for start in range(N):
        s.insert(start, start + 1, start + 100_000)
    for i, start in enumerate(shuffled(N)):
        assert s.remove(start, start + 1) == [(start, start + 1, start + 100_000)]
        check_every(500, i, s, N - 1 - i)
    assert not s
    assert s.span_bytes == 0


def test_add_random_with_merge():
    length = 10
    s: SegmentSet[int] = SegmentSet(running_values, split_running)
    for i in shuffled(N):
        s.insert(i * length, (i + 1) * length, i * length)
    assert list(s) == [(0, N * length, 0)]
    s.check_invariants()


def test_remove_half_random_with_merge():
    s: SegmentSet[int] = SegmentSet(running_values, split_running)
    s.insert(0, N, 0)
    gone = shuffled(N)[: N // 2]
    for at in gone:
        assert s.remove(at, at + 1) == [(at, at + 1, at)]
    s.check_invariants()
    left = sorted(set(range(N)) - set(gone))
    assert [unit for start, end, _ in s for unit in range(start, end)] == left
    assert all(value == start for start, _, value in s)
    assert all(s.find(end) is None for _, end, _ in s)


def test_remove_across_many_blocks():
    s: SegmentSet[int] = SegmentSet()
    for i in range(N):
        s.insert(2 * i, 2 * i + 1, i)
    assert s.remove(301, 2 * N - 301) == [(2 * i, 2 * i + 1, i) for i in range(151, N - 150)]
    s.check_invariants()
    assert len(s) == 151 + 150
    assert s.remove(0, 2 * N) == [(2 * i, 2 * i + 1, i) for i in (*range(151), *range(N - 150, N))]
    assert not list(s)


def test_mutate_across_many_blocks():
    s: SegmentSet[int] = SegmentSet()
    for i in range(N):
        s.insert(2 * i, 2 * i + 1, 0)
    s.mutate(100, 2 * N - 100, lambda start, _end, value: value + start)
    assert [v for _, _, v in s] == [0] * 50 + [2 * i for i in range(50, N - 50)] + [0] * 50
    s.check_invariants()


def test_drained_blocks_grow_together():
    s: SegmentSet[int] = SegmentSet()
    for i in range(N):
        s.insert(i, i + 1, i)
    for i in range(N):
        if i % 100:
            s.remove(i, i + 1)
    s.check_invariants()
    assert len(s) == N // 100
    assert s.block_count <= 2


@pytest.mark.parametrize(
    ("inserted", "want"),
    [
        ([(1000, 1100), (1100, 1200)], (1000, 1200)),
        ([(1100, 1200), (1000, 1100)], (1000, 1200)),
        ([(1000, 1100), (1200, 1300), (1100, 1200)], (1000, 1300)),
    ],
)
def test_merge(inserted: list[tuple[int, int]], want: tuple[int, int]):
    s: SegmentSet[int] = SegmentSet(equal_values)
    for start, end in inserted:
        s.insert(start, end, 7)
    assert list(s) == [(*want, 7)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((100, 200), [(100, 200)]),
        ((50, 200), [(50, 100), (100, 200)]),
        ((100, 250), [(100, 200), (200, 250)]),
        ((50, 250), [(50, 100), (100, 200), (200, 250)]),
    ],
)
def test_isolate(before: tuple[int, int], after: list[tuple[int, int]]):
    s: SegmentSet[int] = SegmentSet(running_values, split_running)
    s.insert(*before, before[0])
    s.isolate(100, 200)
    assert list(s) == [(start, end, start) for start, end in after]
    s.check_invariants()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        ([(100, 200, 0)], [(100, 200, 1)]),
        (
            [(50, 150, 0), (150, 250, 2)],
            [(50, 100, 0), (100, 150, 1), (150, 200, 3), (200, 250, 2)],
        ),
        ([(0, 100, 1), (100, 200, 0), (200, 300, 1)], [(0, 300, 1)]),
    ],
)
def test_mutate_range(before: list[tuple[int, int, int]], after: list[tuple[int, int, int]]):
    s: SegmentSet[int] = SegmentSet(equal_values)
    for piece in before:
        s.insert(*piece)
    s.mutate(100, 200, lambda _s, _e, value: value + 1)
    assert list(s) == after


def test_failed_mutate_changes_nothing():
    s: SegmentSet[int] = SegmentSet(equal_values)
    s.insert(0, 300, 1)
    with pytest.raises(ZeroDivisionError):
        s.mutate(100, 200, lambda start, _end, _value: 1 // (start - 100))
    assert list(s) == [(0, 300, 1)]


@pytest.mark.parametrize(
    ("start", "end"), [(5, 5), (6, 5), (-1, 5), (0, ADDRESS_LIMIT + 1), (15, 25), (5, 40)]
)
def test_refused_insert_changes_nothing(start: int, end: int):
    s: SegmentSet[int] = SegmentSet(equal_values)
    s.insert(10, 20, 1)
    s.insert(30, 40, 1)
    with pytest.raises(RangeError) as e:
        s.insert(start, end, 1)
    assert (e.value.start, e.value.end) == (start, end)
    assert list(s) == [(10, 20, 1), (30, 40, 1)]
    s.check_invariants()


def test_whole_address_space():
    s: SegmentSet[str] = SegmentSet()
    s.insert(0, ADDRESS_LIMIT, "all")
    assert s.find(ADDRESS_LIMIT - 1) == (0, ADDRESS_LIMIT, "all")
    assert s.find(-1) is None
    assert list(s.gaps()) == []
    s.remove(0x1000, ADDRESS_LIMIT - 0x1000)
    assert list(s.gaps()) == [(0x1000, ADDRESS_LIMIT - 0x1000)]
    assert s.span_bytes == 0x2000


def test_empty_range_touches_nothing():
    s: SegmentSet[int] = SegmentSet()
    s.insert(0, 10, 1)
    assert s.remove(5, 5) == []
    assert s.remove(7, 5) == []
    assert list(s.segments(5, 5)) == []
    assert list(s) == [(0, 10, 1)]


def test_repr():
    s: SegmentSet[int] = SegmentSet()
    s.insert(0x1000, 0x2000, 7)
    assert repr(s) == "SegmentSet([0x1000, 0x2000)=7)"
    s.insert(ADDRESS_LIMIT - 1, ADDRESS_LIMIT, 8)
    assert repr(s).endswith(", [0xffffffffffffffff, 0x10000000000000000)=8)")


def test_repr_of_a_set_inside_itself():
    s: SegmentSet[object] = SegmentSet()
    s.insert(0, 1, s)
    assert repr(s) == "SegmentSet([0x0, 0x1)=SegmentSet(...))"


@pytest.mark.parametrize("top", [ADDRESS_LIMIT, ADDRESS_LIMIT - 4])
def test_segments_at_the_top(top: int):
    # Every operation once where an end, or the address after a segment, may be 2**64.
    s: SegmentSet[int] = SegmentSet(running_values, split_running, block_max=2)
    for start in (top - 8, top - 2, top - 6, top - 4):
        s.insert(start, start + 2, start)
    assert list(s) == [(top - 8, top, top - 8)]
    s.isolate(top - 3, top)
    s.mutate(top - 3, top - 1, lambda _s, _e, value: value + 100)
    assert [value - start for start, _, value in s] == [0, 100, 0]
    assert s.lower_bound(top - 1) == s.prev_segment(ADDRESS_LIMIT) == (top - 1, top, top - 1)
    assert s.next_segment(top - 2) == (top - 1, top, top - 1)
    assert s.next_segment(top) is None
    assert s.remove(top - 2, top) == [(top - 2, top - 1, top + 98), (top - 1, top, top - 1)]
    assert s.find_gap(ADDRESS_LIMIT - 1) == (top - 2, ADDRESS_LIMIT)
    assert list(s.gaps(top - 8)) == [(top - 2, ADDRESS_LIMIT)]
    s.check_invariants()


@pytest.mark.parametrize("addr", [-(1 << 70), -1, ADDRESS_LIMIT, 1 << 70])
def test_addresses_outside(addr: int):
    s: SegmentSet[int] = SegmentSet()
    s.insert(0, 4, 1)
    s.insert(ADDRESS_LIMIT - 4, ADDRESS_LIMIT, 2)
    first, last = list(s)
    assert s.find(addr) is s.find_value(addr) is s.find_gap(addr) is None
    assert s.lower_bound(addr) == s.next_segment(addr) == (first if addr < 0 else None)
    assert s.prev_segment(addr) == (None if addr < 0 else last)
    assert list(s.segments(addr)) == ([first, last] if addr < 0 else [])
    assert list(s.segments(0, addr)) == ([] if addr < 0 else [first, last])
    s.isolate(addr, addr)
    s.merge_range(addr, addr)
    assert list(s) == [first, last]
    assert s.remove(min(addr, 0), max(addr, 0)) == ([] if addr < 0 else [first, last])


class TestMoveFit:
    """An allocator's usual case: a piece of a free segment becomes a used one."""

    def build(self) -> tuple[SegmentSet[bool], SegmentSet[int]]:
        free: SegmentSet[bool] = SegmentSet(SegmentSet.merge_equal)
        used: SegmentSet[int] = SegmentSet(SegmentSet.merge_equal)
        free.insert(0x1000, 0x9000, True)
        free.insert(0x10000, 0x20000, True)
        return free, used

    def test_the_first_place_that_fits(self):
        free, used = self.build()
        assert free.move_fit(used, 1, 0, 0x2000, 0x1000, 0) == 0x1000
        assert free.move_fit(used, 1, 0x3000, 0x1000, 0x4000, 0x3000) == 0x3000
        assert list(used) == [(0x1000, 0x4000, 1)]
        assert list(free) == [(0x4000, 0x9000, True), (0x10000, 0x20000, True)]
        free.check_invariants()
        used.check_invariants()

    def test_inside_a_segment(self):
        free, used = self.build()
        assert free.move_fit(used, 1, 0, 0x1000, 0x4000, 0x2000) == 0x2000
        assert list(free)[:2] == [(0x1000, 0x2000, True), (0x3000, 0x9000, True)]

    @pytest.mark.parametrize(
        "neighbours", [(), (0x0, 0x1000), (0x9000, 0x10000), (0x500000, 0x501000)]
    )
    @pytest.mark.parametrize("start", range(0x1000, 0x9000, 0x1000))
    def test_as_an_insertion_and_a_removal(self, start: int, neighbours: tuple[int, ...]):
        for end in range(start + 0x1000, 0xA000, 0x1000):
            for count in (1, 2):  # merges with a neighbour, or does not
                sets = self.build(), self.build()
                for _, used in sets:
                    if neighbours:
                        used.insert(*neighbours, count)
                (free, used), (other_free, other_used) = sets
                assert free.move_fit(used, 1, start, end - start, 0x1000, 0) == start
                other_used.insert(start, end, 1)
                other_free.remove(start, end)
                assert list(free) == list(other_free)
                assert list(used) == list(other_used)
                assert free.span_bytes == other_free.span_bytes
                assert used.span_bytes == other_used.span_bytes
                free.check_invariants()
                used.check_invariants()

    @pytest.mark.parametrize(
        ("hint", "length", "align", "phase"),
        [
            (0, 0x9000, 0x1000, 0),  # too long for the first, and others are not tried
            (0x8000, 0x2000, 0x1000, 0),  # too little behind the hint
            (0, 0x1000, 0x10000, 0xA000),  # no such phase in it
            (0x20000, 0x1000, 0x1000, 0),  # nothing behind
            (0, 0, 0x1000, 0),
            (0, 0x1000, 0x3000, 0),
            (2**64 - 1, 0x1000, 0x1000, 0),
        ],
    )
    def test_nothing_changes_where_it_does_not_fit(
        self, hint: int, length: int, align: int, phase: int
    ):
        free, used = self.build()
        before = list(free)
        assert free.move_fit(used, 1, hint, length, align, phase) is None
        assert list(free) == before
        assert not used

    def test_what_is_used_already_is_an_error(self):
        free, used = self.build()
        used.insert(0x1000, 0x2000, 7)
        before = list(free)
        with pytest.raises(RangeError):
            free.move_fit(used, 1, 0, 0x1000, 0x1000, 0)
        assert list(free) == before
        assert list(used) == [(0x1000, 0x2000, 7)]

    def test_only_between_two_sets(self):
        free, _ = self.build()
        with pytest.raises(TypeError):
            free.move_fit(free, True, 0, 0x1000, 0x1000, 0)
