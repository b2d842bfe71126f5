"""SegmentSet against a model of single units."""

from __future__ import annotations

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

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.segment import SegmentSet

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

    block_max = 256

    @initialize(kind=st.sampled_from(["plain", "equal", "merge_equal", "running"]))
    def make(self, kind: str) -> None:
        self.kind = kind
        merge = {
            "plain": None,
            "equal": equal_values,
            "merge_equal": SegmentSet.merge_equal,
            "running": running_values,
        }[kind]
        split = split_running if kind == "running" else None
        self.set: SegmentSet[int] = SegmentSet(merge, split, block_max=self.block_max)
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

    @rule(
        where=ranges,
        length=st.integers(1, 12),
        align=st.sampled_from([1, 2, 4, 8]),
        top_down=st.booleans(),
    )
    def look_for_large_gap(
        self, where: tuple[int, int], length: int, align: int, top_down: bool
    ) -> None:
        start, end = where
        places = [
            at
            for at in range(start, end - length + 1)
            if at % align == 0 and not any(u in self.units for u in range(at, at + length))
        ]
        found = self.set.find_large_gap(start, end, length, align_bytes=align, top_down=top_down)
        assert found == (places[-1 if top_down else 0] if places else None)

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


@pytest.mark.parametrize("block_max", [2, 4, 256])
def test_model(block_max: int):
    machine = type("Machine", (SegmentSetMachine,), {"block_max": block_max})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=100, stateful_step_count=50, deadline=None),
    )
