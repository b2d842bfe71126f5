"""The tables below one root, and what a walk in C needs of Python: new ones, copies, their ends.

    absent   a chain of empty tables, down to where the leaf goes, is linked by one store
    split    the same, but each table begins as what the superpage says
    detached everything on the path down to some level becomes a copy that no CPU has seen, with a
             new root above it; only then may present entries above level 1 be changed
    removed  an empty table is parked at its place; a dropped one loses a link

Why it is so, and what happens to tables afterwards, is in the package comment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.pagetables.pte import (
    LEVEL_SHIFTS,
    PTE_ADDRESS_MASK,
    PTE_W,
    ROOT_LEVEL,
    TABLE_FLAGS,
)
from kvmmm.pagetables.share import links
from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from kvmmm.pagetables.allocator import TableAllocator

_CHANGED, _REMOVED, _STOP_MASK = (
    lib.KVMMM_PT_CHANGED, lib.KVMMM_PT_REMOVED, lib.KVMMM_PT_STOP_MASK,
)  # fmt: skip
_ABSENT, _SPLIT, _DETACHED = lib.KVMMM_PT_ABSENT, lib.KVMMM_PT_SPLIT, lib.KVMMM_PT_DETACHED
_DROPPED, _LEVEL_MASK = lib.KVMMM_PT_DROPPED, lib.KVMMM_PT_LEVEL_MASK


class TableTree:
    """Tables, without an opinion on what they map.

    Attributes:
        root_gpa: Guest-physical address of the PML4: what belongs into CR3.
        n_tables: Tables reachable now, the root and shared ones included; 0 once released.
    """

    __slots__ = (
        "_allocator", "_c", "_left", "_parked", "_replaced", "_shares", "_stale", "n_tables",
        "root_gpa",
    )  # fmt: skip

    def _set_up(self, allocator: TableAllocator, root_gpa: int, *, live: bool) -> None:
        self._allocator = allocator
        self._shares = allocator.shares
        # The walk: struct kvmmm_pt.
        self._c: Any = ffi.new("struct kvmmm_pt *")
        self._c.hva_delta = allocator.table_hva_delta
        self._c.live = live
        self.root_gpa = self._c.root_gpa = root_gpa
        self.n_tables = 1
        # Not reachable any more, but CPUs may be on their way until `recycle`: tables replaced by
        # copies; and (gpa, level) of links given up to tables that others may hold.
        self._replaced: list[int] = []
        self._left: list[tuple[int, int]] = []
        # No CPU uses these, but KVM may remember what they held.
        self._stale: list[int] = []
        # Empty tables, by level and place: what they cover, in units of it.
        self._parked: dict[tuple[int, int], int] = {}

    def _finish(self, done: int) -> bool:
        # All that a walk did not do by itself. Returns whether anything changed.
        c = self._c
        changed = done & _CHANGED
        while done > _CHANGED:
            if done & _REMOVED:
                self._take_removed()
            why = done & _STOP_MASK
            if why == _DETACHED:
                self._detach(c.level, c.at)
            elif why in {_ABSENT, _SPLIT}:
                self._link_new(c.level - 1, c.leaf_level, c.at, c.entry)
            elif not why:
                break
            done = lib.kvmmm_pt_resume(c)
            changed |= done & _CHANGED
        return bool(changed)

    def _link_new(self, top: int, bottom: int, at: int, leaf: int) -> None:
        # Put a chain of tables, levels `top` to `bottom`, in the place of the entry that stopped
        # the walk: `leaf`, 0 if it is absent. CPUs see all of it at once, or nothing.
        c = self._c
        levels = range(top, bottom - 1, -1)
        gpas = self._take(levels, at)
        above = leaf
        for n, level in enumerate(levels):
            if above:
                lib.kvmmm_pt_split(c, gpas[n], above, level + 1)
            if level > bottom:
                entries = self._allocator.entries(gpas[n])
                index = at >> LEVEL_SHIFTS[level] & 511
                above = entries[index]
                entries[index] = gpas[n + 1] | TABLE_FLAGS
            if leaf:
                # The superpage stood in a table that no CPU knows, so these are not known either.
                c.fresh[level] = gpas[n]
        lib.kvmmm_pt_store(c.link, gpas[0] | TABLE_FLAGS)
        self.n_tables += len(gpas)

    def _take(self, levels: range, at: int) -> list[int]:
        # Empty tables for `at`, one a level: those parked there first. All of them or none.
        places = [(level, at >> LEVEL_SHIFTS[level + 1]) for level in levels]
        new: list[int] = []
        try:
            for place in places:
                if place not in self._parked:
                    new.append(self._allocator.allocate()[0])  # noqa: PERF401 - see below
        except BaseException:
            for gpa in new:
                self._allocator.free(gpa)
            raise
        fresh = iter(new)
        return [
            self._parked.pop(place) if place in self._parked else next(fresh) for place in places
        ]

    def _detach(self, bottom: int, at: int) -> None:
        # Make every table on the path to `at`, from the root to level `bottom`, one that no CPU
        # has seen and that is this space's alone. If tables run out, what is done is in order.
        c = self._c
        gpa, is_shared = self.root_gpa, False
        above: memoryview | None = None
        index = 0
        for level in range(ROOT_LEVEL, bottom - 1, -1):
            if is_shared or (c.live and c.fresh[level] != gpa):
                gpa = self._copy(gpa, level, share=is_shared)
                if above is None:
                    self.root_gpa = c.root_gpa = gpa
                else:
                    above[index] = gpa | TABLE_FLAGS
                c.fresh[level] = gpa
            above = self._allocator.entries(gpa)
            index = at >> LEVEL_SHIFTS[level] & 511
            is_shared = not above[index] & PTE_W
            gpa = above[index] & PTE_ADDRESS_MASK

    def _copy(self, gpa: int, level: int, *, share: bool) -> int:
        new_gpa, entries = self._allocator.allocate()
        lib.kvmmm_pt_copy(self._c, new_gpa, gpa, share)
        if share:
            with self._shares.lock:
                for below in links(entries.tolist(), level):
                    self._shares.add_locked(below)
            self._left.append((gpa, level))
        else:
            self._replaced.append(gpa)
        return new_gpa

    def _take_removed(self) -> None:
        c = self._c
        for n in range(c.n_removed):
            word, at = c.removed[n], c.removed_at[n]
            gpa, level = word & PTE_ADDRESS_MASK, word & _LEVEL_MASK
            if word & _DROPPED:
                self._left.append((gpa, level))
                self.n_tables -= lib.kvmmm_pt_count(c, gpa, level)
            else:
                self._parked[level, at >> LEVEL_SHIFTS[level + 1]] = gpa
                self.n_tables -= 1
        c.n_removed = 0

    def _drop(self, gpa: int, level: int) -> None:
        # Give up one link to a table; with the last one it goes, and its own links with it.
        with self._shares.lock:
            is_last = self._shares.drop_locked(gpa)
        if is_last:
            for below in links(self._allocator.entries(gpa).tolist(), level):
                self._drop(below, level - 1)
            self._stale.append(gpa)

    def _settle(self) -> None:
        # No CPU uses what was replaced or left.
        self._stale += self._replaced
        self._replaced.clear()
        for gpa, level in self._left:
            self._drop(gpa, level)
        self._left.clear()

    def _unpark(self) -> None:
        # Parked tables may not come back: their places are no longer this space's alone.
        self._replaced += self._parked.values()
        self._parked.clear()

    def _free_stale(self) -> None:
        # KVM has forgotten everything.
        with self._shares.lock:
            self._stale += self._shares.orphans
            self._shares.orphans.clear()
        while self._stale:
            self._allocator.free(self._stale.pop())
