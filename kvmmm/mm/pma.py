"""pmas: which frames back an address, and what may be done with them now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import ANY_ACCESS, WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.memmap.file import File
    from kvmmm.mm.manager import MemoryManager


class Pma:
    """Frames behind a range of addresses; it holds one reference on each.

    Immutable and without addresses, so that halves of a split pma share it.

    need_cow and private tell whose the frames are:

        private, not need_cow    this mm's alone (or pinned)
        private, need_cow        shared with a relative since a fork
        neither                  a shared file's
        need_cow, not private    a file's, mapped privately: copied before it is written

    Attributes:
        file: What holds them.
        delta: File offset minus address, the same all over the pma.
        translate_perms: Accesses that the translation is good for.
        effective_perms: What a CPU may do: the vma's, without WRITE while need_cow.
        max_perms: What a debugger may do; the same rule.
        need_cow: A write must copy first.
        private: The frames are anonymous memory of this mm and its relatives, in the arena.
    """

    __slots__ = (
        "delta", "effective_perms", "file", "max_perms", "need_cow", "private", "translate_perms",
    )  # fmt: skip

    def __init__(
        self, file: File, delta: int, effective_perms: int, max_perms: int = ANY_ACCESS, *,
        translate_perms: int = ANY_ACCESS, need_cow: bool = False, private: bool = True,
    ) -> None:  # fmt: skip
        self.file = file
        self.delta = delta
        self.translate_perms = translate_perms
        self.need_cow = need_cow
        self.private = private
        allowed = translate_perms & ~WRITE if need_cow else translate_perms
        self.effective_perms = effective_perms & allowed
        self.max_perms = max_perms & allowed

    def file_range(self, start: int, end: int) -> FileRange:
        """Return the frames behind [start, end)."""
        return FileRange(start + self.delta, end + self.delta)

    def allowing(self, effective_perms: int, max_perms: int, *, need_cow: bool) -> Pma:
        """Return the same frames under other rules."""
        return Pma(
            self.file, self.delta, effective_perms, max_perms,
            translate_perms=self.translate_perms, need_cow=need_cow, private=self.private,
        )  # fmt: skip

    def moved(self, by: int) -> Pma:
        """Return the same frames for addresses that are `by` higher (mremap)."""
        return Pma(
            self.file, self.delta - by, self.effective_perms, self.max_perms,
            translate_perms=self.translate_perms, need_cow=self.need_cow, private=self.private,
        )  # fmt: skip

    def __repr__(self) -> str:
        kind = ("private" if self.private else "file") + (" cow" if self.need_cow else "")
        return f"<pma {kind} {self.effective_perms:o} {self.delta:+#x}>"


def _merge(_start: int, _end: int, left: Pma, right: Pma) -> Pma | None:
    if left is right or (
        left.file is right.file
        and left.delta == right.delta
        and left.effective_perms == right.effective_perms
        and left.max_perms == right.max_perms
        and left.translate_perms == right.translate_perms
        and left.need_cow == right.need_cow
        and left.private == right.private
    ):
        return left
    return None


def new_pma_set() -> SegmentSet[Pma]:
    """Return an empty set of pmas, by guest address."""
    return SegmentSet(merge=_merge)


class Removal:
    """What one operation takes away: collected first, done at the end and in the one safe order.

    A frame must not be reachable after its last reference is gone. So copies lose sight of it first
    (`settle`: whoever is still copying is waited for), then CPUs, by one call for all ranges (one
    shootdown); references go last.

        removal = Removal()
        try:
            ...   # change pmas, under active_lock
        finally:
            removal.run(mm)
    """

    __slots__ = ("drops", "n_settled", "ranges")

    def __init__(self) -> None:
        self.ranges: list[AddrRange] = []
        self.n_settled = 0
        self.drops: list[tuple[File, FileRange]] = []

    def unmap(self, start: int, end: int) -> None:
        """Have no CPU use a translation in [start, end); adjacent ranges become one."""
        if len(self.ranges) > self.n_settled and self.ranges[-1].end == start:
            start = self.ranges.pop().start
        self.ranges.append(AddrRange(start, end))

    def drop(self, start: int, end: int, pma: Pma) -> None:
        """Drop the reference of the pma that was at [start, end)."""
        self.drops.append((pma.file, pma.file_range(start, end)))

    def settle(self, mm: MemoryManager) -> None:
        """Have no copy use what was there; for who then maps something else over it.

        Preconditions:
            - active_lock is held.
        """
        mirror = mm.mirror
        for ar in self.ranges[self.n_settled :]:
            mm.forget(ar.start, ar.end)
            if mirror is not None:
                mirror.unmap(ar.start, ar.end)
        self.n_settled = len(self.ranges)

    def replaced(self, start: int, end: int) -> None:
        """Note that `map_file` has put something else into all of [start, end); it is settled."""
        ranges = self.ranges
        if len(ranges) == 1 and start <= ranges[0].start and ranges[0].end <= end:
            ranges.clear()
        else:
            self.ranges = [ar for ar in ranges if not (start <= ar.start and ar.end <= end)]
        self.n_settled = len(self.ranges)

    def run(self, mm: MemoryManager) -> None:
        """Do it.

        Preconditions:
            - active_lock is held.
        """
        if self.ranges:
            self.settle(mm)
            mm.address_space.unmap(self.ranges)
            self.ranges = []
            self.n_settled = 0
        while self.drops:
            file, fr = self.drops.pop()
            file.dec_ref(fr)
