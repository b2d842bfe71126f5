"""SegmentSet against a model of single units, and the scenarios of gVisor's pkg/segment/test."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmmm import segment
from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.segment import SegmentSet

N = 8000
SPACE = 32


def equal_values(_start1: int, _end1: int, value1: int, value2: int) -> int | None:
    return value1 if value1 == value2 else None


def running_values(start1: int, end1: int, value1: int, value2: int) -> int | None:
    # As a pma: the value is an offset that runs with the address.
    return value1 if value1 + (end1 - start1) == value2 else None


def split_running(start: int, _end: int, value: int, at: int) -> tuple[int, int]:
    return value, value + (at - start)


class SegmentSetMachine(RuleBasedStateMachine):
    """The model: the value of every unit, and where segments start.

    Units of one segment have equal values, or running ones (start + unit) with kind "running".
    """

    @initialize(kind=st.sampled_from(["plain", "equal", "running"]))
    def make(self, kind: str) -> None:
        self.kind = kind
        merge = {"plain": None, "equal": equal_values, "running": running_values}[kind]
        self.set: SegmentSet[int] = SegmentSet(merge, split_running if kind == "running" else None)
        self.step = 1 if kind == "running" else 0
        self.units: dict[int, int] = {}
        self.starts: set[int] = set()

    def segments_of_model(self) -> list[tuple[int, int, int]]:
        segments: list[tuple[int, int, int]] = []
        for unit in sorted(self.units):
            if unit in self.starts:
                segments.append((unit, unit + 1, self.units[unit]))
            else:
                start, _, value = segments[-1]
                segments[-1] = (start, unit + 1, value)
        return segments

    def merge_boundaries(self, start: int, end: int) -> None:
        for at in range(start, end + 1):
            if (
                self.kind != "plain"
                and at in self.units
                and at - 1 in self.units
                and self.units[at] == self.units[at - 1] + self.step
            ):
                self.starts.discard(at)

    def cut(self, *boundaries: int) -> None:
        self.starts |= {at for at in boundaries if at in self.units}

    ranges = st.tuples(st.integers(0, SPACE - 1), st.integers(1, 12)).map(
        lambda t: (t[0], t[0] + t[1])
    )

    @rule(where=ranges, value=st.integers(0, 2))
    def insert(self, where: tuple[int, int], value: int) -> None:
        start, end = where
        if any(unit in self.units for unit in range(start, end)):
            with pytest.raises(RangeError) as e:
                self.set.insert(start, end, value)
            assert (e.value.start, e.value.end) == where
            return
        if self.kind == "running":
            value += start
        self.set.insert(start, end, value)
        for unit in range(start, end):
            self.units[unit] = value + (unit - start) * self.step
        self.starts.add(start)
        self.merge_boundaries(start, start)
        self.merge_boundaries(end, end)

    @rule(where=ranges)
    def remove(self, where: tuple[int, int]) -> None:
        start, end = where
        self.cut(*where)
        want = [s for s in self.segments_of_model() if start <= s[0] < end]
        assert self.set.remove(start, end) == want
        for unit in range(start, end):
            self.units.pop(unit, None)
            self.starts.discard(unit)

    @rule(where=ranges)
    def isolate(self, where: tuple[int, int]) -> None:
        self.set.isolate(*where)
        self.cut(*where)

    @rule(where=ranges, by=st.integers(-1, 1))
    def mutate(self, where: tuple[int, int], by: int) -> None:
        self.set.mutate(*where, lambda _s, _e, value: value + by)
        self.cut(*where)
        for unit in range(*where):
            if unit in self.units:
                self.units[unit] += by
        self.merge_boundaries(*where)

    @rule(where=ranges)
    def merge_range(self, where: tuple[int, int]) -> None:
        self.set.merge_range(*where)
        self.merge_boundaries(*where)

    @precondition(lambda self: len(self.units) > SPACE // 2)
    @rule()
    def clear(self) -> None:
        self.set.clear()
        self.units.clear()
        self.starts.clear()

    @rule(where=ranges)
    def look_at_range(self, where: tuple[int, int]) -> None:
        start, end = where
        model = self.segments_of_model()
        assert list(self.set.segments(start, end)) == [
            s for s in model if s[0] < end and start < s[1]
        ]
        uncovered = {u for gap in self.set.gaps(start, end) for u in range(*gap)}
        assert uncovered == set(range(start, end)) - set(self.units)

    @rule(addr=st.integers(0, SPACE + 12))
    def look_at_address(self, addr: int) -> None:
        model = self.segments_of_model()
        found = next((s for s in model if s[0] <= addr < s[1]), None)
        assert self.set.find(addr) == found
        assert self.set.find_value(addr) == (found[2] if found else None)
        assert self.set.lower_bound(addr) == next((s for s in model if addr < s[1]), None)
        assert self.set.next_segment(addr) == next((s for s in model if addr <= s[0]), None)
        before = next((s for s in reversed(model) if s[1] <= addr), None)
        assert self.set.prev_segment(addr) == before
        after = next((s for s in model if addr < s[0]), None)
        gap = before[1] if before else 0, after[0] if after else ADDRESS_LIMIT
        assert self.set.find_gap(addr) == (None if found else gap)

    @invariant()
    def same_as_model(self) -> None:
        if hasattr(self, "set"):
            model = self.segments_of_model()
            assert list(self.set) == model
            assert len(self.set) == len(model)
            assert self.set.span_bytes == len(self.units)
            self.set.check_invariants()


@pytest.mark.parametrize(("block_max", "block_min"), [(4, 2), (512, 64)])
def test_model(monkeypatch: pytest.MonkeyPatch, block_max: int, block_min: int):
    monkeypatch.setattr(segment, "_BLOCK_MAX", block_max)
    monkeypatch.setattr(segment, "_BLOCK_MIN", block_min)
    run_state_machine_as_test(
        SegmentSetMachine,
        settings=settings(max_examples=100, stateful_step_count=50, deadline=None),
    )


def shuffled(n: int) -> list[int]:
    order = list(range(n))
    random.Random(n).shuffle(order)
    return order


def check_every(step: int, i: int, s: SegmentSet[int], count: int) -> None:
    assert len(s) == count
    if i % step == 0:
        s.check_invariants()
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
    assert len(s._blocks) <= 2


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


def test_damage_is_found():
    s: SegmentSet[int] = SegmentSet()
    s.insert(0, 10, 1)
    s.insert(20, 30, 1)
    s._blocks[0][1][0] = 25
    with pytest.raises(AssertionError, match="block at 0x0"):
        s.check_invariants()


def test_repr():
    s: SegmentSet[int] = SegmentSet()
    s.insert(0x1000, 0x2000, 7)
    assert repr(s) == "SegmentSet([0x1000, 0x2000)=7)"
