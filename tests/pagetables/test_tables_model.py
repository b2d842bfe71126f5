"""`PageTables` against a model that remembers the calls and nothing else.

What an address translates to is decided by the last calls that covered it; between two neighbouring
ends of calls all pages fare alike, so a look at each piece says everything, of 1 GiB as of 4 KiB.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmmm.hostarch.access import ANY_ACCESS, READ, READ_EXECUTE, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PAGE = 1 << 12
HUGE = 1 << 21
GIANT = 1 << 30
LOWER_END = 0x0000_8000_0000_0000
UPPER_START = 0xFFFF_8000_0000_0000
TOP = 1 << 64

# One of them more often than the others, so that calls meet.
ANCHORS = [2 * HUGE] * 4 + [0, GIANT, 512 * GIANT, LOWER_END, UPPER_START, TOP]
FLAGS = st.sampled_from(
    [
        flags_of(READ, user=True),
        flags_of(READ_WRITE, user=True),
        flags_of(READ_EXECUTE, user=True),
        flags_of(ANY_ACCESS, user=False),
    ]
)


@st.composite
def ranges(draw: Callable[..., Any]) -> tuple[int, int]:
    """A start and a length, 4 KiB to 2 GiB, near a boundary of some level, in one half."""
    anchor = draw(st.sampled_from(ANCHORS))
    unit = draw(st.sampled_from([PAGE, PAGE, HUGE, GIANT]))
    start = anchor + draw(st.integers(-2, 2)) * unit + draw(st.integers(-1, 1)) * PAGE
    length = draw(st.integers(1, 2 if unit == GIANT else 3)) * unit
    length += draw(st.sampled_from([0, 0, -PAGE, PAGE]))
    low, high = (UPPER_START, TOP) if anchor >= UPPER_START else (0, LOWER_END)
    start = min(max(start, low), high - PAGE)
    return start, max(PAGE, min(length, high - start))


@st.composite
def maps(draw: Callable[..., Any]) -> tuple[int, int, int]:
    """A range and a frame for it: congruent modulo 1 GiB or 2 MiB, or (short ones) neither."""
    gva, length = draw(ranges())
    unit = draw(st.sampled_from([GIANT, HUGE] if length > 8 * HUGE else [GIANT, HUGE, PAGE]))
    return gva, length, gva % unit + unit * draw(st.integers(0, 3))


def joined(leaves: Iterable[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """(gva, length, gpa, flags) with neighbours joined, whatever their leaf size."""
    runs: list[tuple[int, int, int, int]] = []
    for gva, length, gpa, flags in leaves:
        if runs:
            before, n, frame, given = runs[-1]
            if before + n == gva and frame + n == gpa and given == flags:
                runs[-1] = before, n + length, frame, given
                continue
        runs.append((gva, length, gpa, flags))
    return runs


class Model:
    def __init__(self) -> None:
        # (start, end, gpa or None to keep the frame, flags or 0 for none), in order.
        self.calls: list[tuple[int, int, int | None, int]] = []

    def at(self, gva: int) -> tuple[int, int] | None:
        """The gpa and flags of one address."""
        flags = None
        for start, end, gpa, given in reversed(self.calls):
            if start <= gva < end:
                if not given:
                    return None
                flags = given if flags is None else flags
                if gpa is not None:
                    return gpa + gva - start, flags
        return None

    def pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        ends = {x for a, b, _, _ in self.calls for x in (a, b) if start < x < end}
        return list(pairwise(sorted(ends | {start, end})))

    def mapped(self, start: int = 0, end: int = TOP) -> list[tuple[int, int, int, int]]:
        return joined(
            (a, b - a, *here)
            for a, b in self.pieces(start, end)
            if (here := self.at(a)) is not None
        )


class PageTablesMachine(RuleBasedStateMachine):
    walk_raw: ClassVar[Callable[..., Any]]
    n_tables_needed: ClassVar[Callable[..., Any]]

    @initialize(
        giant=st.booleans(),
        max_leaf_bytes=st.sampled_from([HUGE, GIANT, GIANT]),
        live=st.booleans(),
    )
    def start(self, *, giant: bool, max_leaf_bytes: int, live: bool) -> None:
        self.options = {"giant_pages": giant, "max_leaf_bytes": max_leaf_bytes, "live": live}
        self.allocator = MemoryTableAllocator(512)
        self.pt = PageTables(self.allocator, **self.options)
        self.model = Model()

    @rule(what=maps(), flags=FLAGS)
    def map(self, what: tuple[int, int, int], flags: int) -> None:
        gva, length, gpa = what
        old = self.model.mapped(gva, gva + length)
        changed = any(r != (r[0], r[1], gpa + r[0] - gva, flags) for r in old)
        assert self.pt.map(gva, length, gpa, flags) == changed
        self.model.calls.append((gva, gva + length, gpa, flags))

    @rule(what=ranges())
    def unmap(self, what: tuple[int, int]) -> None:
        gva, length = what
        changed = bool(self.model.mapped(gva, gva + length))
        assert self.pt.is_empty(gva, length) != changed
        assert self.pt.unmap(gva, length) == changed
        self.model.calls.append((gva, gva + length, None, 0))

    @rule(zapped=st.booleans())
    def recycle(self, *, zapped: bool) -> None:
        self.pt.recycle(zapped=zapped)
        assert not zapped or not self.pt.n_quarantined

    @rule(what=ranges(), flags=FLAGS)
    def protect(self, what: tuple[int, int], flags: int) -> None:
        gva, length = what
        changed = any(r[3] != flags for r in self.model.mapped(gva, gva + length))
        assert self.pt.protect(gva, length, flags) == changed
        self.model.calls.append((gva, gva + length, None, flags))

    @rule()
    def adopt(self) -> None:
        self.pt.recycle(zapped=True)
        self.pt = PageTables.adopt(
            self.allocator, self.pt.root_gpa, self.pt.n_tables, **self.options
        )

    @invariant()
    def tables_are_no_more_than_needed_and_map_what_was_asked(self) -> None:
        raw = type(self).walk_raw(self.allocator, self.pt.root_gpa)
        n_tables = len(raw.gpas)
        assert self.pt.n_tables == n_tables == type(self).n_tables_needed(raw.leaves)
        assert self.allocator.n_allocated == n_tables + self.pt.n_quarantined
        expected = self.model.mapped()
        assert joined(raw.leaves) == expected
        assert joined((r.gva, r.length_bytes, r.gpa, r.flags) for r in self.pt.mappings()) == (
            expected
        )
        for leaf in (*raw.leaves[:2], *raw.leaves[-2:]):
            t = self.pt.lookup(leaf.gva + leaf.length_bytes - 1)
            assert t is not None
            assert (t.gva, t.leaf_bytes, t.gpa, t.flags) == leaf

    @invariant()
    def lookups_agree_at_both_ends_of_every_piece(self) -> None:
        for start, end in self.model.pieces(0, TOP):
            for gva in (start, end - 1):
                expected = self.model.at(gva)
                t = self.pt.lookup(gva)
                assert (t and (t.gpa + gva - t.gva, t.flags)) == expected

    def teardown(self) -> None:
        if not hasattr(self, "pt"):
            return
        self.pt.unmap(0, LOWER_END)
        self.pt.unmap(UPPER_START, TOP - UPPER_START)
        self.pt.recycle(zapped=True)
        assert self.pt.n_tables == self.allocator.n_allocated == 1
        self.pt.release(zapped=True)
        assert self.allocator.n_allocated == 0


def test_tables_equal_the_model(
    walk_raw: Callable[..., Any], n_tables_needed: Callable[..., Any]
) -> None:
    PageTablesMachine.walk_raw = staticmethod(walk_raw)
    PageTablesMachine.n_tables_needed = staticmethod(n_tables_needed)
    case = PageTablesMachine.TestCase
    case.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
    case().runTest()
