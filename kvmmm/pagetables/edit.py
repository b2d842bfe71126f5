"""The three walks that write tables: map, unmap, protect.

Each keeps in `changed` whether a present leaf means something else now, which is when other CPUs
must forget what they cached. Bits that the CPU sets itself (A, D) make no difference.

A superpage of which a part is to change is split: a table of smaller leaves with the same
translation is prepared, changed, and put in its place by one store. The way back does not exist:
where there is a table, smaller leaves are written, never a superpage over it. A CPU that cached the
small ones would hold two sizes of one address otherwise, and may use either (SDM Vol. 3A 4.10.2.3).
So it is `unmap` alone that takes tables out.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvmmm.pagetables.pte import (
    ENTRIES_PER_TABLE,
    HARDWARE_FLAGS,
    LEVEL_SHIFTS,
    PTE_ADDRESS_MASK,
    PTE_P,
    PTE_PS,
    TABLE_FLAGS,
)
from kvmmm.pagetables.walker import Walker, is_clear, leaf_run

if TYPE_CHECKING:
    from kvmmm.pagetables.allocator import TableAllocator

_CLEAR_RUN = memoryview(array("Q", [0]) * ENTRIES_PER_TABLE)
_MEANING = ~HARDWARE_FLAGS


class EditWalk(Walker):
    """What the three have in common: `changed`, new tables, splitting.

    Attributes:
        changed: Whether a present leaf was removed or means something else now.
        n_new_tables: Tables that this walk added.
    """

    __slots__ = ("changed", "n_new_tables")

    def __init__(self, allocator: TableAllocator) -> None:
        super().__init__(allocator)
        self.changed = False
        self.n_new_tables = 0

    def descend_into_new(
        self,
        entries: memoryview,
        level: int,
        index: int,
        leaf: int,
        bounds: tuple[int, int],
    ) -> None:
        """Put a table in the place of `entries[index]`, with `bounds` of it walked.

        Args:
            entries: The table above the new one.
            level: Its level.
            index: Of the absent entry or superpage that the new table replaces.
            leaf: The superpage whose translation the new table begins with; 0 for an empty table.
            bounds: [start, stop), guest-virtual: what the walk is to do below.
        """
        gpa, child = self.allocator.allocate()
        if leaf:
            child[:] = _split(leaf, level)
        try:
            self.walk(child, level - 1, *bounds)
        except BaseException:
            # An allocation further down failed. What is mapped so far stays, and is reachable.
            if is_clear(child):
                self.allocator.free(gpa)
            else:
                self._link(entries, index, gpa)
            raise
        self._link(entries, index, gpa)

    def _link(self, entries: memoryview, index: int, gpa: int) -> None:
        # The table is complete before the CPU can see it.
        entries[index] = gpa | TABLE_FLAGS
        self.n_new_tables += 1


class MapWalk(EditWalk):
    """Maps the range to gva + `delta`."""

    __slots__ = ("_delta", "_flags")

    def __init__(
        self, allocator: TableAllocator, top_leaf_level: int, delta: int, flags: int
    ) -> None:
        self.allocator = allocator
        self.top_run_level = top_leaf_level
        self.changed = False
        self.n_new_tables = 0
        self._delta = delta
        self._flags = flags

    def visit(self, entries: memoryview, level: int, first: int, count: int, gva: int) -> None:
        """Write leaves."""
        leaf = self._leaf(level, gva)
        if count == 1:
            old = entries[first]
            if old & PTE_P and (old ^ leaf) & _MEANING:
                self.changed = True
            entries[first] = leaf
            return
        run = leaf_run(leaf, 1 << LEVEL_SHIFTS[level], count)
        place = entries[first : first + count]
        if not self.changed and not is_clear(place):
            self.changed = any(
                old & PTE_P and (old ^ new) & _MEANING
                for old, new in zip(place.tolist(), run, strict=True)
            )
        place[:] = run

    def part(self, entries: memoryview, level: int, index: int, start: int, stop: int) -> None:
        """Go down through a new table, unless a superpage already says the same."""
        old = entries[index]
        if old:
            span_bytes = 1 << LEVEL_SHIFTS[level]
            if not (old ^ self._leaf(level, start & -span_bytes)) & _MEANING:
                return
            if stop - start == span_bytes:
                # All of it goes, to an address where no superpage fits: nothing to take over.
                self.changed = True
                old = 0
        self.descend_into_new(entries, level, index, old, (start, stop))

    def _leaf(self, level: int, gva: int) -> int:
        return gva + self._delta | self._flags | (PTE_PS if level > 1 else 0)


class UnmapWalk(EditWalk):
    """Clears the range, and takes out tables that it empties.

    Attributes:
        retired: gpas of the tables taken out, which a CPU may still walk.
    """

    __slots__ = ("retired",)

    def __init__(self, allocator: TableAllocator) -> None:
        super().__init__(allocator)
        self.retired: list[int] = []

    def visit(self, entries: memoryview, level: int, first: int, count: int, gva: int) -> None:  # noqa: ARG002
        """Clear leaves."""
        place = entries[first : first + count]
        if not is_clear(place):
            place[:] = _CLEAR_RUN[:count]
            self.changed = True

    def part(self, entries: memoryview, level: int, index: int, start: int, stop: int) -> None:
        """Split a superpage; nothing is there to do for an absent entry."""
        old = entries[index]
        if old:
            self.descend_into_new(entries, level, index, old, (start, stop))

    def left(self, entries: memoryview, index: int, gpa: int, child: memoryview) -> None:
        """Take out the table below, if that was its last entry."""
        if self.changed and is_clear(child):
            entries[index] = 0
            self.retired.append(gpa)


class ProtectWalk(EditWalk):
    """Gives the present leaves of the range other flags."""

    __slots__ = ("_flags",)

    def __init__(self, allocator: TableAllocator, flags: int) -> None:
        super().__init__(allocator)
        self._flags = flags

    def visit(self, entries: memoryview, level: int, first: int, count: int, gva: int) -> None:  # noqa: ARG002
        """Rewrite leaves."""
        place = entries[first : first + count]
        if is_clear(place):
            return
        span_bytes = 1 << LEVEL_SHIFTS[level]
        flags = self._flags | (PTE_PS if level > 1 else 0)
        old = place[0]
        if old & PTE_P and place.tobytes() == leaf_run(old, span_bytes, count).tobytes():
            # The usual case, without a loop: every leaf continues the first one.
            new = old & PTE_ADDRESS_MASK | flags
            self.changed |= bool((old ^ new) & _MEANING)
            place[:] = leaf_run(new, span_bytes, count)
            return
        leaves = place.tolist()
        mixed = [e & PTE_ADDRESS_MASK | flags if e & PTE_P else e for e in leaves]
        self.changed |= any((a ^ b) & _MEANING for a, b in zip(leaves, mixed, strict=True))
        place[:] = array("Q", mixed)

    def part(self, entries: memoryview, level: int, index: int, start: int, stop: int) -> None:
        """Split a superpage, unless it has these flags already."""
        old = entries[index]
        if old and (old & ~PTE_ADDRESS_MASK ^ self._flags ^ PTE_PS) & _MEANING:
            self.descend_into_new(entries, level, index, old, (start, stop))


def _split(leaf: int, level: int) -> memoryview:
    # The 512 leaves of the level below that translate as `leaf` does.
    if level == 2:
        leaf &= ~PTE_PS
    return leaf_run(leaf, 1 << LEVEL_SHIFTS[level - 1], ENTRIES_PER_TABLE)
