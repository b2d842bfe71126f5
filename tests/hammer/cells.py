"""`Cells`: what the host knows of the region, and what it holds on to while it changes it.

    cells    0 .. 39   private anonymous memory
            40 .. 47   shared anonymous memory
            48 .. 55   a file of the host, mapped shared
            56 .. 63   the same, mapped privately

A cell of shared memory or of the file keeps its frame when it is unmapped: then the frame itself is
poisoned, until it is mapped again.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from tests.hammer.guest import PAGE, POISON
from tests.hammer.watch import Graveyard, Still, Violation, difference, page_of, say

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from kvmmm.mm import MemoryManager

ANONYMOUS, SHARED, FILE, FILE_COPY = "anonymous", "shared", "file", "file copy"
KINDS = [ANONYMOUS] * 40 + [SHARED] * 8 + [FILE] * 8 + [FILE_COPY] * 8
PRIVATE = {ANONYMOUS, FILE_COPY}
N_CELLS = len(KINDS)
_BURY_ALL_BYTES = 64 * PAGE

# What a cell is, besides its permissions.
ABSENT, MAPPED, PARKED = "absent", "mapped", "parked"


class Cells:
    """The region of one memory manager.

    Attributes:
        perms: By cell, while it is mapped or parked.
        state: By cell.
    """

    def __init__(self, machine: Any, rng: random.Random) -> None:
        self.machine = machine
        self.mm: MemoryManager = machine.mm
        self.arena = machine.arena
        self.stride = machine.stride_bytes
        self.backing = machine.backing
        self.rng = rng
        self.perms = [0] * N_CELLS
        self.state = [ABSENT] * N_CELLS
        self.graveyard = Graveyard(self.arena)
        self._stills: dict[int, Still] = {}
        # (file, offset) of what was poisoned where it stays.
        self._poisoned: dict[int, tuple[Any, int]] = {}

    def addr(self, cell: int) -> int:
        start = self.machine.park if self.state[cell] == PARKED else self.machine.region
        return int(start + cell * self.stride)

    def runs(self, i: int, j: int, *, same: bool = False, **wanted: Any) -> list[tuple[int, int]]:
        """Stretches of [i, j) in one state; `same`: in every respect, as one vma is."""
        found: list[tuple[int, int]] = []
        before: object = None
        for c in range(i, j):
            fits = all(getattr(self, name)[c] == value for name, value in wanted.items())
            key = (self.state[c], self.perms[c], KINDS[c]) if same else fits
            if fits and found and found[-1][1] == c and key == before:
                found[-1] = found[-1][0], c + 1
            elif fits:
                found.append((c, c + 1))
            before = key
        return found

    # ---- still ----

    def freeze(self, i: int, j: int, why: str) -> None:
        """From now on nobody writes to these."""
        with self.mm.active_lock:
            for c in range(i, j):
                found = self.mm.pmas.find(self.addr(c))
                if found is not None:
                    self._stills[c] = Still(found[2].file, self.addr(c) + found[2].delta, why)

    def freeze_again(self, i: int, j: int) -> None:
        """Whatever of these may not be written."""
        for c in range(i, j):
            if self.state[c] == PARKED:
                self.freeze(c, c + 1, "moved away by mremap")
            elif self.state[c] == MAPPED and not self.perms[c] & WRITE:
                self.freeze(c, c + 1, "write-protected")

    def thaw(self, i: int, j: int) -> None:
        """Nobody has until now; what comes next may."""
        for c in range(i, j):
            still = self._stills.pop(c, None)
            if still is not None:
                try:
                    still.check()
                finally:
                    still.let_go()

    def check(self) -> None:
        for still in self._stills.values():
            still.check()
        self.graveyard.check()
        for c, (file, fo) in self._poisoned.items():
            now = page_of(file, fo)
            if now != POISON:
                raise Violation(
                    f"cell {c}, {KINDS[c]} memory that is not mapped, was written: "
                    + difference(POISON, now)
                )

    # ---- what is not mapped, and not freed either ----

    def poison_in_place(self, i: int, j: int) -> None:
        """Poison the frames of cells that have just been unmapped."""
        for c in range(i, j):
            offset = c * self.stride
            if KINDS[c] == SHARED:
                page = FileRange(offset, offset + PAGE)
                found, _ = self.backing.shared.translate(page, page, READ)
                if found:
                    fo = offset + found[0].offset - found[0].start
                    self.arena.view[fo : fo + PAGE] = POISON
                    self._poisoned[c] = self.arena, fo
            elif KINDS[c] == FILE and offset + PAGE <= self.backing.file.size_bytes:
                os.pwrite(self.backing.file.fd, POISON, offset)
                self._poisoned[c] = self.backing.file, offset

    def clean_in_place(self, i: int, j: int) -> None:
        """Zero them again: they will be mapped."""
        self.check()
        for c in range(i, j):
            file, fo = self._poisoned.pop(c, (None, 0))
            if file is self.arena:
                file.view[fo : fo + PAGE] = bytes(PAGE)
            elif file is not None:
                os.pwrite(file.fd, bytes(PAGE), fo)

    def forget_behind(self, size_bytes: int) -> None:
        """The file ends there now: what was poisoned behind is gone."""
        for c in list(self._poisoned):
            start = c * self.stride
            if KINDS[c] == FILE and start + PAGE > size_bytes:
                file, _ = self._poisoned.pop(c)
                if start < size_bytes:
                    os.pwrite(file.fd, bytes(size_bytes - start), start)

    # ---- frames that are dropped ----

    @contextmanager
    def dropping(self, why: str, mm: MemoryManager | None = None) -> Iterator[None]:
        """Bury what loses its last reference within.

        Half of the time it never gets there: we hold one, so that nothing is punched. Else it is
        allocated again at once.
        """
        is_held = self.rng.random() < 0.5
        with (mm or self.mm).active_lock:
            held = [
                pma.file_range(start, end)
                for start, end, pma in (mm or self.mm).pmas
                if pma.private
            ]
            if is_held:
                self.arena.inc_ref_many(held)
        try:
            yield
        finally:
            for fr in held:
                self._take(fr, why, is_held=is_held)
            self.graveyard.give_back()

    def _take(self, fr: FileRange, why: str, *, is_held: bool) -> None:
        if is_held:
            with self.arena._lock:
                dropped = self.arena._usage.last_references(fr.start, fr.end)
        else:
            with self.arena._lock:
                dropped = list(self.arena._usage.free.ranges.segments(fr.start, fr.end))
            dropped = [self._again(max(s, fr.start), min(e, fr.end)) for s, e, *_ in dropped]
        at = fr.start
        for start, end in dropped:
            if is_held and at < start:
                self.arena.dec_ref(FileRange(at, start))
            self._bury(start, end, why)
            at = end
        if is_held and at < fr.end:
            self.arena.dec_ref(FileRange(at, fr.end))

    def _again(self, start: int, end: int) -> tuple[int, int]:
        if self.machine.fills and start < end:
            self._check_junk(start, end)
        try:
            self.arena.allocate(end - start, at=start)
        except ArenaExhaustedError:
            return start, start  # a vCPU's fault was faster
        return start, end

    def _check_junk(self, start: int, end: int) -> None:
        with self.arena._lock:
            is_free = self.arena._usage.free.covers(start, end)
            now = bytes(self.arena.view[start:end]) if is_free else b""
        if now.strip(b"\xdb"):
            at = start + next(i for i, byte in enumerate(now) if byte != 0xDB)
            word = int.from_bytes(now[at - start & -8 :][:8], "little")
            raise Violation(f"the frame at {at & -PAGE:#x}, freed, was written: {say(word)}")

    def _bury(self, start: int, end: int, why: str) -> None:
        # All of it, or, of much, what the guest can have touched.
        if end - start <= _BURY_ALL_BYTES:
            if start < end:
                self.graveyard.bury(FileRange(start, end), why)
            return
        at = start
        first = start + -start % self.stride
        for fo in range(first, end, self.stride):
            if at < fo:
                self.arena.dec_ref(FileRange(at, fo))
            at = fo + PAGE
            self.graveyard.bury(FileRange(fo, at), why)
        if at < end:
            self.arena.dec_ref(FileRange(at, end))

    # ---- mapping ----

    def map(self, i: int, j: int, *, populate: bool = False) -> None:
        """Map [i, j) anew, over whatever is there."""
        for c, stop in self._kinds(i, j):
            addr, length = self.machine.region + c * self.stride, (stop - c) * self.stride
            kind = KINDS[c]
            mappable = {SHARED: self.backing.shared, ANONYMOUS: None}.get(kind, self.backing.file)
            self.mm.mmap(
                length, READ_WRITE, addr=addr, fixed=True, replace=True, mappable=mappable,
                private=kind in PRIVATE, offset=c * self.stride if mappable is not None else 0,
                populate=populate,
            )  # fmt: skip
        self.state[i:j] = [MAPPED] * (j - i)
        self.perms[i:j] = [READ_WRITE] * (j - i)

    @staticmethod
    def _kinds(i: int, j: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for c in range(i, j):
            if found and KINDS[found[-1][0]] == KINDS[c]:
                found[-1] = found[-1][0], c + 1
            else:
                found.append((c, c + 1))
        return found

    def end(self) -> None:
        """Let go of stills and graves."""
        for still in self._stills.values():
            still.let_go()
        self._stills.clear()
        self.graveyard.give_back(0)
