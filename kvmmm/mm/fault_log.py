"""`FaultLog`: where faults fell, and how many, for whoever wants to look at it."""

from __future__ import annotations

from typing import NamedTuple

from kvmmm.hostarch.access import EXECUTE, WRITE

_PAGE_SHIFT = 12
_READ, _WRITE, _EXECUTE = range(3)
_KIND_BITS = 2


class FaultPlace(NamedTuple):
    """Faults in one place.

    Attributes:
        start: Guest address: a page, or what pages were united to.
        end: One past its last byte.
        reads, writes, executes: How many, by what the guest wanted.
    """

    start: int
    end: int
    reads: int
    writes: int
    executes: int

    @property
    def faults(self) -> int:
        """All of them."""
        return self.reads + self.writes + self.executes


class FaultLog:
    """Counts of faults by page and access. Of bounded size: pages are united when they get many.

    To have one kept: `mm.fault_log = FaultLog()`; a fork gives the child one of its own. Guarded by
    the mm's active_lock.

    Args:
        max_counts: Beyond so many counts places become twice as large.

    Attributes:
        max_counts: See there.
        place_bytes: How large a place is now, a power of two.
    """

    __slots__ = ("_counts", "_shift", "max_counts")

    def __init__(self, max_counts: int = 1 << 15) -> None:
        self.max_counts = max_counts
        self._shift = _PAGE_SHIFT
        # Place number and kind of access -> how many.
        self._counts: dict[int, int] = {}

    @property
    def place_bytes(self) -> int:
        """See the class."""
        return 1 << self._shift

    def note(self, addr: int, access: int) -> None:
        """Count one fault.

        Args:
            addr: Guest address.
            access: What the guest wanted; counted as `Counters` does.
        """
        kind = _WRITE if access & WRITE else _EXECUTE if access & EXECUTE else _READ
        key = addr >> self._shift << _KIND_BITS | kind
        counts = self._counts
        counts[key] = counts.get(key, 0) + 1
        while len(counts) > self.max_counts:
            counts = self._unite()

    def _unite(self) -> dict[int, int]:
        united: dict[int, int] = {}
        for key, count in self._counts.items():
            place = key >> _KIND_BITS + 1 << _KIND_BITS | key & (1 << _KIND_BITS) - 1
            united[place] = united.get(place, 0) + count
        self._shift += 1
        self._counts = united
        return united

    def places(self) -> list[FaultPlace]:
        """Return the places with faults, ascending."""
        by_place: dict[int, list[int]] = {}
        for key, count in self._counts.items():
            by_place.setdefault(key >> _KIND_BITS, [0, 0, 0])[key & 3] += count
        return [
            FaultPlace(place << self._shift, place + 1 << self._shift, *by_place[place])
            for place in sorted(by_place)
        ]

    def __repr__(self) -> str:
        n_faults = sum(self._counts.values())
        return f"<FaultLog {n_faults} faults, in places of {self.place_bytes >> 10} KiB>"
