"""`Shootdown`: how CPUs are made to forget translations that page tables do not hold any more.

A KVM that shadows page tables does not see the host's edits, and with nested paging a CPU's own
cache does not either. Two ways work on running vCPUs, without a kick:

    dontneed  madvise(MADV_DONTNEED) on the linear mapping of the frames that were mapped: KVM drops
              whatever leads to them, the file keeps its bytes. 6 us, 0.2 us a page, and whoever
              still uses such a page faults it in again (1 to 4 us)
    zap       a slot that comes and goes: KVM drops everything. 0.1 ms, 45 ns for each page that
              was mapped, 0.6 us for each that is used again

The first for a small part of what is mapped, the second above. The third way, a new root, belongs
to the address space: a table that no CPU has seen needs no shootdown. Which of them work is found
by trying (`shootdown_trial`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.safemem.ffi import drop_pages

if TYPE_CHECKING:
    from kvmmm.platform.kvm.guest_physical import GuestPhysical
    from kvmmm.platform.kvm.shootdown_trial import Proven

MIN_PAGES = 512
"""So many pages are few, however little is mapped: 0.1 ms by dontneed, as long as a zap."""
MIN_RUNS = 32
"""Likewise pieces that are not contiguous in guest-physical addresses."""


class SpaceStatistics:
    """What one address space has cost.

    Attributes:
        n_dontneed: Shootdowns by MADV_DONTNEED.
        n_zaps: Shootdowns by a slot that came and went.
        n_roots: New roots given to its vCPUs.
        n_pages: Pages whose translations were taken away.
    """

    __slots__ = ("n_dontneed", "n_pages", "n_roots", "n_zaps")

    def __init__(self) -> None:
        self.n_dontneed = 0
        self.n_zaps = 0
        self.n_roots = 0
        self.n_pages = 0

    def __repr__(self) -> str:
        return (
            f"<{self.n_dontneed} dontneed, {self.n_zaps} zaps, {self.n_roots} roots, "
            f"{self.n_pages} pages>"
        )


class Shootdown:
    """The two ways that work on leaves. One object serves all spaces of a VM; no state but counts.

    Args:
        physical: The VM's windows.
        proven: What works here.
    """

    __slots__ = ("_physical", "_proven")

    def __init__(self, physical: GuestPhysical, proven: Proven) -> None:
        self._physical = physical
        self._proven = proven

    def max_pages(self) -> int:
        """Return how many pages are dropped one by one; above, everything is."""
        return max(MIN_PAGES, self._physical.n_pages >> 3) if self._proven.dontneed else 0

    def is_small(self, runs: list[tuple[int, int]]) -> bool:
        """Return whether `drop` is the better way; the pages have been counted."""
        return self._proven.dontneed and len(runs) <= MIN_RUNS + (self._physical.n_pages >> 9)

    def drop(self, runs: list[tuple[int, int]]) -> None:
        """Have every vCPU forget what leads to some frames, given as (gpa, length in bytes).

        Preconditions:
            - The tables do not hold any more what is to be forgotten.
        """
        for start, length in merged(runs):
            at, end = start, start + length
            while at < end:
                window = self._physical.window_at(at)
                if window is None:
                    break
                stop = min(end, window.end)
                drop_pages(at + window.delta, stop - at)
                at = stop

    def drop_all(self) -> None:
        """Have every vCPU forget everything; the same otherwise."""
        if self._proven.zap:
            self._physical.zap()
        else:
            self._physical.replace_slots()


def merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return `runs`, ascending, with those joined that touch or overlap."""
    if len(runs) < 2:
        return runs
    ordered = sorted(runs)
    joined = [ordered[0]]
    for gpa, length in ordered[1:]:
        start, before = joined[-1]
        if gpa <= start + before:
            joined[-1] = start, max(before, gpa + length - start)
        else:
            joined.append((gpa, length))
    return joined
