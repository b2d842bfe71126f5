"""Page tables forked from each other, against a model each.

After every step: each space maps what its model says; nothing that two spaces reach can be written
through either; links are counted right; no page is lost; and what a CPU, or a KVM that shadows the
tables, may remember stands as it was, but for what may be edited in place.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmmm.errors import RangeError
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import PTE_P, PTE_W
from tests.pagetables.test_tables_model import FLAGS, LOWER_END, TOP, Model, joined, maps, ranges

if TYPE_CHECKING:
    from collections.abc import Iterator

_ADDRESS = 0xFFFFFFFFFF000
_FIXED = {511: 0xDEAD_BEEF_0000 | PTE_P}
_FIXED_START = TOP - (1 << 39)
_WHICH = st.integers(0, 3)


class ForkModel(Model):
    """A model whose whole space may lose W; `calls` may hold -1 for flags, which says so."""

    def at(self, gva: int) -> tuple[int, int] | None:
        here: tuple[int, int] | None = None
        for start, end, gpa, flags in self.calls:
            if not start <= gva < end:
                continue
            if flags == -1:
                here = here and (here[0], here[1] & ~PTE_W)
            elif gpa is not None:
                here = gpa + gva - start, flags
            elif not flags:
                here = None
            else:
                here = here and (here[0], flags)
        return here

    def fork(self) -> ForkModel:
        self.calls.append((0, TOP, None, -1))
        child = ForkModel()
        child.calls = list(self.calls)
        return child


class Space:
    def __init__(self, pt: PageTables, model: ForkModel) -> None:
        self.pt = pt
        self.model = model


class Table:
    """A table as found by walking, and whether some way to it has W on every link."""

    def __init__(self, level: int, entries: list[int]) -> None:
        self.level = level
        self.entries = entries
        self.is_writable = False
        self.spaces: set[int] = set()

    def links(self) -> Iterator[tuple[int, int]]:
        if self.level > 1:
            for i, entry in enumerate(self.entries):
                if entry & 0x81 == 1 and not (self.level == 4 and i in _FIXED):
                    yield entry & _ADDRESS, entry & PTE_W


class ForkMachine(RuleBasedStateMachine):
    @initialize(giant=st.booleans(), live=st.booleans())
    def start(self, *, giant: bool, live: bool) -> None:
        self.options = {"giant_pages": giant, "live": live, "fixed": _FIXED}
        self.allocator = MemoryTableAllocator(2048)
        self.spaces = [Space(PageTables(self.allocator, **self.options), ForkModel())]
        self.tables: dict[int, Table] = {}
        self.waiting: dict[int, list[int]] = {}

    def _space(self, which: int) -> Space:
        return self.spaces[which % len(self.spaces)]

    def _is_fixed(self, gva: int, length: int) -> bool:
        return gva + length > _FIXED_START

    @rule(which=_WHICH, what=maps(), flags=FLAGS)
    def map(self, which: int, what: tuple[int, int, int], flags: int) -> None:
        space = self._space(which)
        gva, length, gpa = what
        if self._is_fixed(gva, length):
            with pytest.raises(RangeError, match="511"):
                space.pt.map(gva, length, gpa, flags)
            return
        old = space.model.mapped(gva, gva + length)
        changed = any(r != (r[0], r[1], gpa + r[0] - gva, flags) for r in old)
        assert space.pt.map(gva, length, gpa, flags) == changed
        space.model.calls.append((gva, gva + length, gpa, flags))

    @rule(which=_WHICH, what=ranges() | st.just((0, LOWER_END)))
    def unmap(self, which: int, what: tuple[int, int]) -> None:
        space = self._space(which)
        gva, length = what
        if self._is_fixed(gva, length):
            with pytest.raises(RangeError, match="511"):
                space.pt.unmap(gva, length)
            return
        changed = bool(space.model.mapped(gva, gva + length))
        assert space.pt.unmap(gva, length) == changed
        space.model.calls.append((gva, gva + length, None, 0))

    @rule(which=_WHICH, what=ranges(), flags=FLAGS)
    def protect(self, which: int, what: tuple[int, int], flags: int) -> None:
        space = self._space(which)
        gva, length = what
        if self._is_fixed(gva, length):
            return
        changed = any(r[3] != flags for r in space.model.mapped(gva, gva + length))
        assert space.pt.protect(gva, length, flags) == changed
        space.model.calls.append((gva, gva + length, None, flags))

    @precondition(lambda self: len(self.spaces) < 4)
    @rule(which=_WHICH, used=st.booleans())
    def fork(self, which: int, *, used: bool) -> None:
        space = self._space(which)
        child = PageTables(self.allocator, **self.options)
        if used:
            child.map(0, 4096, 0, PTE_P)
            child.unmap(0, 4096)
        before = space.pt.root_gpa
        n_shared = space.pt.fork_into(child)
        assert (space.pt.root_gpa != before) == bool(n_shared)
        assert bool(n_shared) == bool(space.model.mapped())
        self.spaces.append(Space(child, space.model.fork()))

    @rule(which=_WHICH, zapped=st.booleans())
    def recycle(self, which: int, *, zapped: bool) -> None:
        pt = self._space(which).pt
        pt.recycle(zapped=zapped)
        if zapped:
            assert not pt.n_quarantined
            self.waiting.clear()

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(which=_WHICH, zapped=st.booleans())
    def release(self, which: int, *, zapped: bool) -> None:
        space = self._space(which)
        space.pt.release(zapped=zapped)
        self.spaces.remove(space)
        if zapped:
            self.waiting.clear()

    @invariant()
    def spaces_map_what_their_models_say(self) -> None:
        for space in self.spaces:
            expected = space.model.mapped()
            assert expected == joined(
                (r.gva, r.length_bytes, r.gpa, r.flags) for r in space.pt.mappings()
            )
            for gva, length, gpa, flags in expected:
                t = space.pt.lookup(gva + length - 1)
                assert t is not None
                assert (t.gpa + gva + length - 1 - t.gva, t.flags) == (gpa + length - 1, flags)

    def _walk(self) -> dict[int, Table]:
        tables: dict[int, Table] = {}

        def visit(gpa: int, level: int, space: int, *, writable: bool) -> None:
            table = tables.get(gpa)
            if table is None:
                table = tables[gpa] = Table(level, self.allocator.entries(gpa).tolist())
            assert table.level == level
            table.is_writable |= writable
            table.spaces.add(space)
            for below, w in table.links():
                visit(below, level - 1, space, writable=writable and bool(w))

        for n, space in enumerate(self.spaces):
            visit(space.pt.root_gpa, 4, n, writable=True)
            assert space.pt.n_tables == sum(n in t.spaces for t in tables.values())
            for gpa, level in space.pt._left:
                # Still counted, and CPUs may still be there.
                visit(gpa, level, -1 - n, writable=False)
        return tables

    @invariant()
    def nothing_shared_is_writable_and_links_are_counted(self) -> None:
        tables = self._walk()
        counts = Counter(below for t in tables.values() for below, _ in t.links())
        for space in self.spaces:
            counts.update(gpa for gpa, _ in space.pt._left)
        assert self.allocator.shares.counts == {g: n for g, n in counts.items() if n > 1}
        for t in tables.values():
            assert not t.is_writable or sum(n >= 0 for n in t.spaces) <= 1
            assert t.level == 4 or any(t.entries), "an empty table was kept"

    @invariant()
    def what_others_may_remember_stays(self) -> None:
        tables = self._walk()
        waiting: list[int] = list(self.allocator.shares.orphans)
        parked: set[int] = set()
        for space in self.spaces:
            pt = space.pt
            waiting += [*pt._stale, *pt._replaced, *pt._parked.values()]
            parked.update(pt._parked.values())
        assert len(set(waiting)) == len(waiting)
        assert not tables.keys() & set(waiting)
        assert self.allocator.n_allocated == len(tables) + len(waiting), "no page is lost"
        now = {gpa: self.allocator.entries(gpa).tolist() for gpa in waiting}
        for gpa, entries in self.waiting.items():
            if gpa in now:
                assert now[gpa] == entries, "a page that waits was written"
        self.waiting = now
        live = self.options["live"]
        for gpa, before in self.tables.items():
            after = tables.get(gpa)
            if after is None:
                continue
            if not before.is_writable and not after.is_writable:
                assert before.entries == after.entries, "a shared table was written"
            if not live or before.level == 1:
                continue
            for old, new in zip(before.entries, after.entries, strict=True):
                # Absent entries may be filled; a link to an emptied table may go.
                assert old in (0, new) or (
                    not new and old & _ADDRESS in parked | set(waiting) and not old & 0x80
                )
        self.tables = tables

    def teardown(self) -> None:
        if not hasattr(self, "spaces"):
            return
        for space in self.spaces:
            space.pt.release()
        PageTables(self.allocator).release(zapped=True)
        assert not self.allocator.n_allocated
        assert not self.allocator.shares.counts


def test_forked_tables_equal_their_models() -> None:
    case = ForkMachine.TestCase
    case.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
    case().runTest()
