"""`PageWalk` over tables that are mapped, protected, split, forked, given up: against the models.

And under edits: what nobody changes is found whole by walks without the GIL, while tables around
and above it come, go, are filled with junk and become others.
"""

from __future__ import annotations

import threading
from random import Random
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import PTE_NX, PTE_U, PTE_W, flags_of
from kvmmm.pagetables.walk import walk_of
from tests.pagetables.test_fork_model import ForkMachine, Space
from tests.pagetables.test_tables_model import ANCHORS, GIANT, HUGE, LOWER_END, PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

_ANY = 1 << 52
_HVA = 1 << 53
_LENGTHS = [1, 8, PAGE, 3 * PAGE, HUGE + PAGE, 3 * GIANT, LOWER_END]


def _expected(space: Space, addr: int, n: int, access: int) -> tuple[int, int] | None:
    hva, got = 0, 0
    for gva, length, gpa, flags in space.model.mapped(addr, min(addr + n, LOWER_END)):
        needed = PTE_U | (PTE_W if access & WRITE else 0)
        if flags & needed != needed or (access & EXECUTE and flags & PTE_NX):
            break
        if gva != addr + got or (got and _HVA + gpa != hva + got):
            break
        hva = hva if got else _HVA + gpa
        got += length
    return (hva, got) if got else None


class WalkMachine(ForkMachine):
    @initialize()
    def look(self) -> None:
        self.random = Random(5)

    def _check(self, space: Space, addr: int, n: int, access: int) -> None:
        walk = walk_of(space.pt, 0, _ANY, _HVA)
        assert walk.find(addr, n, access) == _expected(space, addr, n, access)

    @rule(
        which=st.integers(0, 3), anchor=st.sampled_from(ANCHORS[:-2]),
        skew=st.integers(-9000, 9000), n=st.sampled_from(_LENGTHS),
        access=st.sampled_from([READ, WRITE, READ_WRITE, EXECUTE]),
    )  # fmt: skip
    def find(self, which: int, anchor: int, skew: int, n: int, access: int) -> None:
        addr = min(max(anchor + skew, 0), LOWER_END - 1)
        self._check(self._space(which), addr, n, access)

    @invariant()
    def what_is_mapped_is_found(self) -> None:
        for space in getattr(self, "spaces", ()):
            for gva, length, _, _ in space.model.mapped(0, LOWER_END):
                for addr in (gva, gva + length // 2 + 5, gva + length - 1, max(gva - 1, 0)):
                    for access in (READ, WRITE, EXECUTE):
                        self._check(space, addr, self.random.choice(_LENGTHS), access)


def test_walks_equal_the_models() -> None:
    case = WalkMachine.TestCase
    case.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
    case().runTest()


class Editors:
    """Tables with a part that stays, and edits of all kinds around it.

    What stays are the pages of [START, START + LENGTH): in 4 KiB leaves, tables full of them, the
    last ones together with pages that change.
    """

    START = 5 * GIANT - 20 * HUGE - 100 * PAGE
    LENGTH = 40 * HUGE + 200 * PAGE
    FRAME = 64 * GIANT

    def __init__(self) -> None:
        self.allocator = MemoryTableAllocator(1024)
        self.pt = PageTables(self.allocator, giant_pages=True)
        self.rw = flags_of(READ_WRITE, user=True)
        self.pt.map(self.START, self.LENGTH, self.FRAME + PAGE, self.rw)
        self.walk = walk_of(self.pt, 0, _ANY, _HVA)
        self.random = Random(7)

    def _around(self) -> tuple[int, int]:
        """A range that begins or ends where the part that stays does not reach."""
        length = self.random.choice([PAGE, 3 * PAGE, 60 * PAGE, HUGE, 3 * HUGE, GIANT])
        skew = self.random.choice([0, PAGE, HUGE - 5 * PAGE])
        if self.random.random() < 0.5:
            return self.START + self.LENGTH + skew, length
        return self.START - length - skew, length

    def edit(self) -> None:
        pt, random = self.pt, self.random
        gva, length = self._around()
        kind = random.choice([0, 0, 0, 1, 1, 2, 3])
        if kind == 0:
            gpa = gva % GIANT + random.choice([GIANT, HUGE, PAGE])
            pt.map(gva, min(length, 3 * HUGE), gpa, self.rw)
        elif kind == 1:
            pt.unmap(gva, length)
        elif kind == 2:
            pt.protect(gva, length, flags_of(READ, user=True))
        else:
            child = PageTables(self.allocator, giant_pages=True)
            pt.fork_into(child)
            if random.random() < 0.5:
                # Now the other one is the last holder of what this one copies.
                pt.unmap(gva, length)
            child.release()
        self.walk.drain()
        pt.recycle(zapped=True)


def test_what_nobody_changes_is_found_while_tables_change(scaled: Callable[[int], int]) -> None:
    editors = Editors()
    start, length, frame = editors.START, editors.LENGTH, editors.FRAME + PAGE
    wrong: list[object] = []
    n_found = [0, 0]
    done = threading.Event()

    def look(which: int) -> None:
        random = Random(which)
        while not done.is_set() and not wrong:
            skip = random.choice([0, 0, 5, random.randrange(length)])
            found = editors.walk.find(start + skip, length - skip, READ)
            if found != (_HVA + frame + skip, length - skip):
                wrong.append((skip, found))
            n_found[which] += 1

    threads = [threading.Thread(target=look, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        n_edits, n_tables = 0, set()
        while n_edits < scaled(4000) or (min(n_found) < 100 and not wrong):
            editors.edit()
            n_edits += 1
            n_tables.add(editors.pt.root_gpa)
    finally:
        done.set()
        for thread in threads:
            thread.join(20)
    assert not wrong
    assert len(n_tables) > 2, "roots were replaced, and used again"
