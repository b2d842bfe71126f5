"""`Children`: forks of the hammered space, whose bytes stay what they were at the fork."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.access import READ, READ_WRITE
from tests.hammer.cells import ANONYMOUS, KINDS, MAPPED, N_CELLS, Cells
from tests.hammer.guest import PAGE, POISON
from tests.hammer.watch import Violation, difference

if TYPE_CHECKING:
    import random

_MAX = 3


class Child:
    """One fork. No vCPU runs in it.

    Attributes:
        bytes: What its cells hold, by cell; those of anonymous memory that it had a frame for.
            (Copies of a file's pages come and go with the file's end.)
        perms: By cell; only those that it still maps.
    """

    def __init__(self, mm: Any, space: Any, cells: Cells, parent: Child | None) -> None:
        self.mm = mm
        self.space = space
        self.cells = cells
        self.bytes: dict[int, bytes] = {}
        self.perms: dict[int, int] = (
            {c: cells.perms[c] for c in range(N_CELLS) if cells.state[c] == MAPPED}
            if parent is None
            else dict(parent.perms)
        )
        self.look()

    def addr(self, cell: int) -> int:
        return int(self.cells.machine.region + cell * self.cells.stride)

    def page(self, cell: int) -> bytes | None:
        with self.mm.active_lock:
            found = self.mm.pmas.find(self.addr(cell))
            if found is None or not found[2].private:
                return None
            fo = self.addr(cell) + found[2].delta
            return bytes(self.cells.arena.view[fo : fo + PAGE])

    def look(self) -> None:
        """Note what is there, as soon as can be."""
        n_cells, stride = KINDS.count(ANONYMOUS), self.cells.stride
        view = self.cells.arena.view
        with self.mm.active_lock:
            for start, end, pma in self.mm.pmas.segments(self.addr(0), self.addr(n_cells)):
                if not pma.private:
                    continue
                first = -(-max(start - self.addr(0), 0) // stride)
                for addr in range(self.addr(first), end, stride):
                    fo = addr + pma.delta
                    self.bytes[(addr - self.addr(0)) // stride] = bytes(view[fo : fo + PAGE])

    def check(self) -> None:
        for c, before in self.bytes.items():
            now = self.page(c)
            if now != before:
                what = "is gone" if now is None else difference(before, now)
                raise Violation(f"cell {c} of a child changed behind its back: {what}")

    def close(self) -> None:
        self.mm.close()
        self.space.release()


class Children:
    """What the host does to them; rounds like those of `Operations`."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.machine: Any = cells.machine
        self.rng: random.Random = cells.rng
        self.alive: list[Child] = []
        self.n_forks = 0

    def fork(self) -> object:
        if len(self.alive) >= _MAX:
            return self.close()
        parent = self.rng.choice(self.alive) if self.alive and self.rng.random() < 0.3 else None
        mm = parent.mm if parent is not None else self.cells.mm
        space = self.machine.new_space()
        with self.cells.dropping("fork"):
            forked = mm.fork(space)
        self.alive.append(Child(forked, space, self.cells, parent))
        self.n_forks += 1
        return "a grandchild" if parent is not None else None

    def check(self) -> object:
        for child in self.alive:
            child.check()
        return None

    def poison(self) -> object:
        """What the child writes is its own affair."""
        found = self._cells_of_one(READ_WRITE)
        if found is None:
            return None
        child, chosen = found
        for c in chosen:
            child.mm.copy_out(child.addr(c), POISON)
            child.bytes[c] = POISON
        return self.alive.index(child), chosen

    def unmap(self) -> object:
        found = self._cells_of_one(None)
        if found is None:
            return None
        child, chosen = found
        with self.cells.dropping(f"a child's munmap of cells {chosen}", child.mm):
            for c in chosen:
                child.mm.munmap(child.addr(c), self.cells.stride)
                del child.perms[c]
                child.bytes.pop(c, None)
        return self.alive.index(child), chosen

    def protect(self) -> object:
        found = self._cells_of_one(None)
        if found is None:
            return None
        child, chosen = found
        perms = self.rng.choice((READ, READ_WRITE))
        for c in chosen:
            child.mm.mprotect(child.addr(c), self.cells.stride, perms)
            child.perms[c] = perms
        return self.alive.index(child), chosen, perms

    def close(self) -> object:
        if not self.alive:
            return None
        child = self.alive.pop(self.rng.randrange(len(self.alive)))
        child.check()
        with self.cells.dropping("a child's end", child.mm):
            child.close()
        return None

    def _cells_of_one(self, perms: int | None) -> tuple[Child, list[int]] | None:
        if not self.alive:
            return None
        child = self.rng.choice(self.alive)
        fitting = [
            c
            for c, has in child.perms.items()
            if c in child.bytes and perms in (None, has)
        ]
        chosen = sorted(self.rng.sample(fitting, min(len(fitting), self.rng.choice((1, 2, 8)))))
        return (child, chosen) if chosen else None

    def end(self) -> None:
        while self.alive:
            self.close()
