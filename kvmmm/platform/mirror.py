"""The mirror: guest memory in the host's own address space, at the guest's own distances.

In a window of a GiB an address of the guest is an address of the host by one addition, and the
host's MMU translates. What it costs is VMAs: a run of pages that the kernel cannot merge with its
neighbours is one, the gap behind it another, and the whole process has only vm.max_map_count of
them; at that limit malloc and new threads fail. So the mirror is a cache with a budget.

    map_run ──► over budget? ── evict the oldest ──► mmap ──► populate what is wanted
    a copy ──► bits in C ──► the window (nothing here is asked)
    removal ──► forget ──► everybody drains ──► unmap

Source: gVisor platform.AddressSpaceIO; mmap(2), madvise(2), vm.max_map_count in sysctl/vm.rst.
"""

# ruff: noqa: FURB136, PLR1730 - a call of min() costs more than an if, on the way of a first touch
from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import AddressSpaceIOUnavailableError
from kvmmm.hostarch.access import WRITE
from kvmmm.hostarch.addr import GIANT_PAGE_BYTES, PAGE_BYTES, page_up
from kvmmm.safemem.ffi import MirrorWindow

if TYPE_CHECKING:
    from collections.abc import Callable

_BUDGET_MOST = 16384
_BUDGET_LEAST = 64  # fewer than that do not matter, where all are scarce
_VMAS_MOST = 4  # what one run may add
_MAX_MAP_COUNT_USUAL = 65530

# More ranges than that are looked through for what is gone.
_RUNS_LEAST = 1024

# A read fault maps 16 pages, each as quickly as MADV_POPULATE_READ does. A write fault maps one,
# so that entries made before are six times cheaper; but the call takes as long as a few.
_POPULATE_LEAST_BYTES = 4 * PAGE_BYTES

_GIANT_PAGE_SHIFT = 30

# Facts of the host, asked once: VMAs that all mirrors together may use, and whether
# MADV_POPULATE_READ is known (Linux 5.14).
_process_budget = 0
_can_populate = True


def process_budget_vmas() -> int:
    """Return how many VMAs the mirrors of this process may use together."""
    global _process_budget  # noqa: PLW0603  one answer for the process
    if not _process_budget:
        try:
            with open("/proc/sys/vm/max_map_count", encoding="ascii") as f:  # noqa: PTH123  pathlib is slow to import
                limit = int(f.read())
        except (OSError, ValueError):
            limit = _MAX_MAP_COUNT_USUAL
        _process_budget = min(_BUDGET_MOST, limit // 4)
    return _process_budget


class Mirror(MirrorWindow):
    """The mirror of one mm: runs of its pmas, the oldest of which give way to new ones.

    Nothing in here is needed to be right: whatever is not resident is found by another way. Except
    for `find` everything is called with the mm's active_lock held. In a forked process of the host
    it goes on working, on the same guest memory.

    Args:
        max_addr: Exclusive end of the guest's addresses.
        drain: Waits until every copy has left that began before. Called after runs are forgotten
            and before they are unmapped.
        budget_vmas: VMAs for this mirror alone; None: what `process_budget_vmas` leaves.

    Attributes:
        n_evictions: Ranges evicted so far for want of VMAs.
        n_stuck: Ranges forgotten that the kernel would not unmap.
    """

    __slots__ = (
        "_budget_vmas",
        "_drain",
        "_n_runs_most",
        "_runs",
        "_shares",
        "n_evictions",
        "n_stuck",
    )

    def __init__(
        self, max_addr: int, drain: Callable[[], None], *, budget_vmas: int | None = None
    ) -> None:
        super().__init__(max_addr)
        self._drain = drain
        self._shares = budget_vmas is None
        self._budget_vmas = process_budget_vmas() if budget_vmas is None else budget_vmas
        # Start -> end of what was mapped, the oldest first. What is mapped lies in one of them, or
        # in several; in some there may be nothing any more.
        self._runs: dict[int, int] = {}
        self._n_runs_most = _RUNS_LEAST
        self.n_evictions = 0
        self.n_stuck = 0

    def map_run(
        self, start: int, end: int, fd: int, fo: int, perms: int, wanted: tuple[int, int]
    ) -> None:
        """Map a run of pages, and let copies in; replaces what was there.

        An mmap costs the same whatever its length, so give it all that lies side by side in the
        file. Of a run in several GiB only those are mapped that `wanted` touches. When it returns,
        the first page of that is resident; where the budget is tiny, maybe not all of the others.

        Args:
            start: Guest address, 4 KiB aligned.
            end: Exclusive end, 4 KiB aligned.
            fd: Of the file.
            fo: The file offset at `start`, in bytes.
            perms: What copies may do there: READ, WRITE bits, not none.
            wanted: The range that the copy is about to touch: its page-table entries are made now
                where that is cheaper than faults.

        Raises:
            AddressSpaceIOUnavailableError: There are no VMAs for it, or the host refused.
        """
        if start >> _GIANT_PAGE_SHIFT == end - 1 >> _GIANT_PAGE_SHIFT:
            self._map_piece(start, end, fd, fo, perms)
        else:
            # Downwards: should one piece cost another its place, it is not where the copy begins.
            low = max(start, wanted[0] & -GIANT_PAGE_BYTES)
            at = min(end, (wanted[1] + GIANT_PAGE_BYTES - 1) & -GIANT_PAGE_BYTES)
            while low < at:
                stop = at
                at = max(low, (stop - 1) & -GIANT_PAGE_BYTES)
                self._map_piece(at, stop, fd, fo + at - start, perms)
        if perms & WRITE and _can_populate:
            low, high = wanted[0] & -PAGE_BYTES, wanted[1] + PAGE_BYTES - 1 & -PAGE_BYTES
            if low < start:
                low = start
            if high > end:
                high = end
            if high - low >= _POPULATE_LEAST_BYTES:
                self._populate(low, high)

    def unmap(self, start: int, end: int) -> None:
        """Take a range away, after copies in it have left: what is there is not reachable any more.

        Never fails. Where the process has no VMA left, all of the windows that the range touches
        are emptied, which is always possible; should that fail as well, the range stays mapped but
        no copy finds it (`n_stuck`). A range out of the middle of a run makes two of it, and so may
        cost another run its place.
        """
        self._take_away(start, end)
        excess = self._excess(0)
        if excess > 0:
            self._evict(max(excess, self._budget_vmas >> 3))

    def release(self) -> None:
        """Unmap everything. Idempotent; no copy is inside and none will come."""
        super().release()
        self._runs.clear()

    def _map_piece(self, start: int, end: int, fd: int, fo: int, perms: int) -> None:
        # After a copy has had the caches for itself: hence few calls.
        n_more = self.vmas_needed(start)
        if self.n_vmas + n_more > self._budget_vmas or (
            self._shares and self.n_vmas_of_process + n_more > _process_budget
        ):
            self._make_room(n_more)
        while True:
            try:
                self.map(start, end, fd, fo, perms)
                break
            except OSError as e:
                if e.errno != errno.ENOMEM or not self._give_way():
                    raise AddressSpaceIOUnavailableError(
                        f"cannot mirror [{start:#x}, {end:#x}): {e.strerror}"
                    ) from e
        runs = self._runs
        was = runs.pop(start, 0)
        runs[start] = was if was > end else end
        if len(runs) > self._n_runs_most:
            self._runs = {at: to for at, to in self._runs.items() if self.victim(at, to)}
            self._n_runs_most = 2 * len(self._runs) + _RUNS_LEAST

    def _populate(self, start: int, end: int) -> None:
        global _can_populate  # noqa: PLW0603  a fact of the host
        found = self.find(start, end - start, WRITE)
        if found is None:
            return
        try:
            self.populate(start, start + page_up(found[1]))
        except OSError as e:
            # EINVAL: the kernel does not know how. Whatever else it is, the copy will find it.
            _can_populate = e.errno != errno.EINVAL

    # ---- eviction -------------------------------------------------------------------------

    def _make_room(self, n_vmas: int) -> None:
        # Evicting an eighth at a time pays for the wait for copies, which is the same for one.
        while (excess := self._excess(n_vmas)) > 0:
            if not self._evict(max(excess, self._budget_vmas >> 3)):
                raise AddressSpaceIOUnavailableError(
                    f"the mirrors have {self.n_vmas_of_process} VMAs, this one {self.n_vmas}"
                )

    def _excess(self, n_vmas: int) -> int:
        excess = self.n_vmas + n_vmas - self._budget_vmas
        if self._shares:
            excess = max(excess, self.n_vmas_of_process + n_vmas - process_budget_vmas())
        return excess

    def _give_way(self) -> bool:
        # The process ran out of VMAs, whoever took them: from now on have a quarter fewer.
        quarter = self.n_vmas >> 2
        few = min(self._budget_vmas, _BUDGET_LEAST)
        self._budget_vmas = max(min(self._budget_vmas, self.n_vmas - quarter), few)
        return self._evict(quarter + _VMAS_MOST)

    def _evict(self, n_vmas: int) -> bool:
        # Unmap the oldest runs until about n_vmas are free; whether there was any.
        victims: dict[tuple[int, int], None] = {}
        while self._runs and n_vmas > 0:
            start = next(iter(self._runs))
            found = self.victim(start, self._runs.pop(start))
            if found is not None and found[:2] not in victims:
                victims[found[:2]] = None
                n_vmas -= found[2]
        if not victims:
            return False
        for start, end in victims:
            self.forget(start, end)
        self._drain()
        for start, end in victims:
            self._take_away(start, end)
        self.n_evictions += len(victims)
        return True

    def _take_away(self, start: int, end: int) -> None:
        try:
            self.clear(start, end)
        except OSError:
            self._clear_windows(start, end)

    def _clear_windows(self, start: int, end: int) -> None:
        low = start & -GIANT_PAGE_BYTES
        high = min((end + GIANT_PAGE_BYTES - 1) & -GIANT_PAGE_BYTES, self.max_addr)
        self.forget(low, high)
        self._drain()
        try:
            self.clear_windows(low, high)
        except OSError:
            self.n_stuck += 1
