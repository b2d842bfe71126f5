"""`Operations`: what the host does to the region while it is stamped. Each method is one round.

What a method returns goes into the history.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError, MmError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.advice import MADV_DONTNEED
from tests.hammer.cells import ABSENT, FILE, FILE_COPY, KINDS, MAPPED, N_CELLS, PARKED, Cells
from tests.hammer.guest import MAGIC, PAGE
from tests.hammer.watch import Violation, say

if TYPE_CHECKING:
    import random

_POPULATE_MAX_STRIDE = 64 << 10
_FILE_START = KINDS.index(FILE)


class Operations:
    """One operation a call, on a range that chance gives."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.machine: Any = cells.machine
        self.mm = cells.mm
        self.rng: random.Random = cells.rng
        self._pins: list[Any] = []

    def range(self) -> tuple[int, int]:
        """Most often a few cells, sometimes all."""
        rng = self.rng
        length = rng.choice((1, 1, 2, 3, 5, 8, 16, N_CELLS)) if rng.random() < 0.9 else N_CELLS
        i = rng.randrange(N_CELLS - length + 1)
        return i, i + length

    def span(self, i: int, j: int) -> tuple[int, int]:
        """Address and length."""
        return self.cells.addr(i), (j - i) * self.cells.stride

    def run(self, **wanted: Any) -> tuple[int, int] | None:
        """A stretch of a random range in one state, or None."""
        runs = self.cells.runs(*self.range(), **wanted)
        return self.rng.choice(runs) if runs else None

    # ---- vmas come and go ----

    def unmap(self) -> object:
        cells = self.cells
        i, j = self.range()
        runs = cells.runs(i, j, state=PARKED)
        if runs:
            return None  # it is elsewhere
        cells.thaw(i, j)
        with cells.dropping(f"munmap of cells {i}..{j}"):
            self.mm.munmap(*self.span(i, j))
        gone = cells.runs(i, j, state=MAPPED)
        cells.state[i:j] = [ABSENT] * (j - i)
        for run in gone:
            cells.poison_in_place(*run)
        return i, j

    def map(self) -> object:
        cells = self.cells
        i, j = self.range()
        if cells.runs(i, j, state=PARKED):
            return None
        cells.thaw(i, j)
        cells.clean_in_place(i, j)
        populate = self.rng.random() < 0.2 and cells.stride <= _POPULATE_MAX_STRIDE
        with cells.dropping(f"mmap over cells {i}..{j}"):
            cells.map(i, j, populate=populate)
        return i, j, populate

    def map_absent(self) -> object:
        """So that something is there most of the time."""
        cells = self.cells
        mapped = cells.runs(0, N_CELLS, state=ABSENT)
        for i, j in mapped:
            cells.clean_in_place(i, j)
            cells.map(i, j)
        return mapped

    def park(self) -> object:
        """Move cells to where nobody looks."""
        cells = self.cells
        found = self.run(state=MAPPED, same=True)
        if found is None:
            return None
        i, j = found
        addr, length = self.span(i, j)
        cells.thaw(i, j)
        new_addr = self.machine.park + i * cells.stride
        try:
            self.mm.mremap(addr, length, length, may_move=True, new_addr=new_addr)
        except MmError as e:
            cells.freeze_again(i, j)
            return f"{found}: {e}"
        cells.state[i:j] = [PARKED] * (j - i)
        cells.freeze(i, j, "moved away by mremap")
        return found

    def unpark(self) -> object:
        cells = self.cells
        runs = cells.runs(0, N_CELLS, state=PARKED, same=True)
        if not runs:
            return None
        i, j = self.rng.choice(runs)
        addr, length = self.span(i, j)
        cells.thaw(i, j)
        new_addr = self.machine.region + i * cells.stride
        try:
            self.mm.mremap(addr, length, length, may_move=True, new_addr=new_addr)
        except MmError as e:
            cells.freeze_again(i, j)
            return f"{i, j}: {e}"
        cells.state[i:j] = [MAPPED] * (j - i)
        cells.freeze_again(i, j)
        return i, j

    # ---- permissions, contents ----

    def protect(self) -> object:
        found = self.run(state=MAPPED)
        if found is None:
            return None
        i, j = found
        perms = self.rng.choice((0, READ, READ, READ_WRITE, READ_WRITE))
        self.cells.thaw(i, j)
        self.mm.mprotect(*self.span(i, j), perms)
        self.cells.perms[i:j] = [perms] * (j - i)
        self.cells.freeze_again(i, j)
        return i, j, perms

    def allow(self) -> object:
        """All of it may be written."""
        cells = self.cells
        for i, j in cells.runs(0, N_CELLS, state=MAPPED):
            cells.thaw(i, j)
            self.mm.mprotect(*self.span(i, j), READ_WRITE)
            cells.perms[i:j] = [READ_WRITE] * (j - i)
        return None

    def forget(self) -> object:
        found = self.run(state=MAPPED)
        if found is None:
            return None
        self.cells.thaw(*found)
        with self.cells.dropping(f"MADV_DONTNEED of cells {found}"):
            self.mm.madvise(*self.span(*found), MADV_DONTNEED)
        self.cells.freeze_again(*found)
        return found

    def invalidate(self) -> object:
        """As a mappable does: what backs it is asked for again."""
        found = self.run(state=MAPPED)
        if found is None:
            return None
        addr, length = self.span(*found)
        self.mm.invalidate(AddrRange(addr, addr + length), private=False)
        return found

    def zero(self) -> object:
        """The host writes, too."""
        found = self.run(state=MAPPED, perms=READ_WRITE)
        if found is None:
            return None
        with self.cells.dropping(f"zero_out of cells {found}"):
            for c in range(*found):
                try:
                    self.mm.zero_out(self.cells.addr(c), PAGE)
                except GuestFaultError:
                    if KINDS[c] not in {FILE, FILE_COPY}:
                        raise
        return found

    def read(self) -> object:
        """The host reads what the guest does."""
        found = self.run(state=MAPPED)
        if found is None:
            return None
        for c in range(*found):
            if not self.cells.perms[c]:
                continue
            try:
                word = int.from_bytes(self.mm.read(self.cells.addr(c), 8), "little")
            except GuestFaultError:
                if KINDS[c] not in {FILE, FILE_COPY}:
                    raise
                continue
            if word and word >> 32 != MAGIC << 16 | c:
                raise Violation(f"copy_in found {say(word)} in cell {c}")
        return found

    def pin(self) -> object:
        """Somebody holds frames for a while."""
        if self._pins and self.rng.random() < 0.5:
            for _ in range(self.rng.randrange(len(self._pins) + 1)):
                self._pins.pop().release()
            return "released"
        found = self.run(state=MAPPED, perms=READ_WRITE)
        if found is None:
            return None
        with self.cells.dropping(f"pin of cells {found}"):
            for c in range(*found):
                try:
                    self._pins.append(self.mm.pin_frames(self.cells.addr(c), PAGE, READ_WRITE))
                except GuestFaultError:
                    if KINDS[c] not in {FILE, FILE_COPY}:
                        raise
        return found

    # ---- the file's end ----

    def truncate(self) -> object:
        """Somebody cuts the file short, or makes it longer; and tells us, or does not."""
        cells, file = self.cells, self.machine.backing.file
        size = self.rng.randrange(_FILE_START, N_CELLS + 1) * cells.stride
        size = min(size + self.rng.choice((0, 0, PAGE // 2)), file.capacity_bytes)
        cells.thaw(_FILE_START, N_CELLS)
        cells.check()
        is_told = self.rng.random() < 0.5
        with cells.dropping(f"the file's end at {size:#x}"):
            if is_told:
                file.truncate(size)
            else:
                os.ftruncate(file.fd, size)
        cells.forget_behind(size)
        cells.freeze_again(_FILE_START, N_CELLS)
        return f"{size:#x}", is_told

    def revalidate(self) -> object:
        self.cells.thaw(_FILE_START, N_CELLS)
        with self.cells.dropping("revalidate"):
            cut = self.machine.backing.file.revalidate()
        self.cells.freeze_again(_FILE_START, N_CELLS)
        return cut

    # ---- the vCPUs ----

    def pause(self) -> object:
        """Nobody makes a step."""
        with self.machine.vm.paused():
            before = [stamper.turn for stamper in self.machine.stampers]
            time.sleep(0.0005)
            after = [stamper.turn for stamper in self.machine.stampers]
        if before != after:
            raise Violation(f"vCPUs turned while they were paused: {before}, {after}")

    def stop(self) -> object:
        """One is taken out of its run, and runs again."""
        self.rng.choice(self.machine.stampers).vcpu.stop()
        return None

    def wait(self) -> object:
        """The guest alone drops frames: it copies on write what a child gave up."""
        with self.cells.dropping("a fault"):
            time.sleep(0.0005)
        return None

    def end(self) -> None:
        """Let go of the pins."""
        while self._pins:
            self._pins.pop().release()
