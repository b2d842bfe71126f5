"""MappingSet against a model: for each page of the mappable, the set of who maps it where."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.mapping_set import MappingSet
from tests.memmap.fake_space import FakeSpace

PAGE = 4096
PAGES = 24
OFFSETS = st.integers(0, PAGES - 1)
LENGTHS = st.integers(1, 8)
SPACES = st.integers(0, 2)
# Few addresses, so that the same mapping comes back in parts.
SHIFTS = st.integers(0, 2)


def runs(pages: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page * PAGE:
            found[-1] = found[-1][0], (page + 1) * PAGE
        else:
            found.append((page * PAGE, (page + 1) * PAGE))
    return found


class MappingMachine(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.mappings = MappingSet()
        self.spaces = [FakeSpace() for _ in range(3)]
        # offset page -> {(space, address page, writable)}
        self.model: list[set[tuple[int, int, bool]]] = [set() for _ in range(PAGES)]

    @rule(
        adds=st.booleans(),
        who=SPACES,
        first=OFFSETS,
        length=LENGTHS,
        shift=SHIFTS,
        writable=st.booleans(),
    )
    def change(
        self, adds: bool, who: int, first: int, length: int, shift: int, writable: bool
    ) -> None:
        last = min(first + length, PAGES)
        at = first + 100 * (shift + 1)
        ar = AddrRange(at * PAGE, (at + last - first) * PAGE)
        changed = set()
        for page in range(first, last):
            mapping = who, page + 100 * (shift + 1), writable
            before = bool(self.model[page])
            (self.model[page].add if adds else self.model[page].discard)(mapping)
            if bool(self.model[page]) != before:
                changed.add(page)
        call = self.mappings.add_mapping if adds else self.mappings.remove_mapping
        answer = call(self.spaces[who], ar, first * PAGE, writable=writable)
        got = {page for fr in answer for page in range(fr.start // PAGE, fr.end // PAGE)}
        assert got == changed
        assert [fr.start for fr in answer] == sorted(fr.start for fr in answer)

    @rule(first=OFFSETS, length=LENGTHS)
    def invalidate(self, first: int, length: int) -> None:
        last = min(first + length, PAGES)
        for space in self.spaces:
            space.invalidated.clear()
        self.mappings.invalidate(first * PAGE, last * PAGE, private=False)
        for who, space in enumerate(self.spaces):
            pages = {
                addr
                for page in range(first, last)
                for owner, addr, _ in self.model[page]
                if owner == who
            }
            assert runs(pages) == sorted(space.invalidated)

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "mappings"):
            self.mappings.check_invariants()
            assert bool(self.mappings) == any(self.model)


def test_model():
    run_state_machine_as_test(
        MappingMachine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None)
    )
