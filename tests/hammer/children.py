"""`Children`: forks of the hammered space, whose bytes stay what they were at the fork."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.access import READ, READ_WRITE
from tests.hammer.cells import ANONYMOUS, KINDS, MAPPED, N_CELLS, Cells
from tests.hammer.guest import PAGE, POISON, TURN_BITS
from tests.hammer.watch import Violation, difference, say

if TYPE_CHECKING:
    import random

_MAX = 3
_HOPPER = 1
"""The vCPU that is moved to children."""


class Child:
    """One fork.

    Attributes:
        bytes: What its cells hold, by cell; those of anonymous memory that it had a frame for.
            (Copies of a file's pages come and go with the file's end.)
        perms: By cell; only those that it still maps.
        is_inhabited: A vCPU is in it, or was: then its bytes are not looked at.
    """

    def __init__(self, mm: Any, space: Any, cells: Cells, parent: Child | None) -> None:
        self.mm = mm
        self.space = space
        self.cells = cells
        self.is_inhabited = False
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
        self.n_forks = self.n_hops = 0
        # The one that the hopper is in; what it wrote to the parent before it left.
        self._home: Child | None = None

    def fork(self) -> object:
        if len(self.alive) >= _MAX:
            return self.close()
        parent = self.rng.choice(self.alive) if self.alive and self.rng.random() < 0.3 else None
        mm = parent.mm if parent is not None else self.cells.mm
        space = self.machine.new_space()
        with self.cells.dropping("fork"):
            child = Child(mm.fork(space), space, self.cells, parent)
        self.alive.append(child)
        if self.machine.hops:
            self._keep_private(child)
        self.n_forks += 1
        return "a grandchild" if parent is not None else None

    def check(self) -> None:
        for child in self.alive:
            child.check()
        self.look_around()

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
        if child is self._home:
            self.hop_back()
        with self.cells.dropping("a child's end", child.mm):
            child.close()
        return None

    # ---- a vCPU in a child ----

    @staticmethod
    def _keep_private(child: Child) -> None:
        # What is stamped there must not be seen by the parent.
        first, end = KINDS.count(ANONYMOUS), N_CELLS
        child.mm.munmap(child.addr(first), child.addr(end) - child.addr(first))
        for c in range(first, end):
            child.perms.pop(c, None)

    def hop(self) -> object:
        """Move the hopper to a child, or back."""
        if self._home is not None:
            return self.hop_back()
        if not self.alive:
            return None
        child = self.rng.choice(self.alive)
        child.check()
        for c, page in child.bytes.items():
            if page == POISON:
                child.mm.zero_out(child.addr(c), PAGE, ignore_permissions=True)
        child.is_inhabited = True
        child.bytes.clear()
        in_handler = self.rng.random() < 0.5
        self.machine.hop(_HOPPER, child.mm, child.space, in_handler=in_handler)
        self._home = child
        self._left_in_turn = self.machine.stampers[_HOPPER].turn
        self.n_hops += 1
        return self.alive.index(child), in_handler

    def hop_back(self) -> object:
        """Move the hopper to the parent."""
        self.look_around()
        in_handler = self.rng.random() < 0.5
        self.machine.hop(_HOPPER, self.machine.mm, self.machine.space, in_handler=in_handler)
        self._home = None
        return "back", in_handler

    def look_around(self) -> None:
        """Nobody's stamps are where he is not."""
        if self._home is None:
            return
        mm = self.cells.mm
        with mm.active_lock:
            for c in range(KINDS.count(ANONYMOUS)):
                addr = self.cells.addr(c)
                found = mm.pmas.find(addr)
                if found is None:
                    continue
                fo = addr + found[2].delta
                for word in struct.unpack("<3Q", self.cells.arena.view[fo : fo + 24]):
                    vcpu, turn = word >> TURN_BITS & 3, word & (1 << TURN_BITS) - 1
                    if vcpu == _HOPPER and turn > self._left_in_turn:
                        raise Violation(
                            f"in cell {c} of the parent stands {say(word)}, who left it in turn "
                            f"{self._left_in_turn}"
                        )

    def _cells_of_one(self, perms: int | None) -> tuple[Child, list[int]] | None:
        if not self.alive:
            return None
        child = self.rng.choice(self.alive)
        if child.is_inhabited and perms is not None:
            return None
        fitting = [
            c
            for c, has in child.perms.items()
            if perms in (None, has) and (child.is_inhabited or c in child.bytes)
        ]
        chosen = sorted(self.rng.sample(fitting, min(len(fitting), self.rng.choice((1, 2, 8)))))
        return (child, chosen) if chosen else None

    def end(self) -> None:
        """Let go of all; no vCPU runs any more."""
        while self.alive:
            self.alive.pop().close()
