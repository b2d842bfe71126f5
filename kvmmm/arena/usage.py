"""`PageUsage`: which pages of an arena are free, reserved or used. No system calls, no lock.

Three interval maps. Nothing in it grows with the capacity.

    free          free ranges, merged
    references    used ranges with their count, neighbours with equal counts merged
    reservations  reserved ranges, whole, whatever of them is used by now
"""

from __future__ import annotations

from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.ranges import FileRange
from kvmmm.segment import SegmentSet

_HINTS_MAX = 64


class Reservation(FileRange):
    """A range of the arena that is promised to whoever holds this object.

    The object itself is the right: an equal range made by somebody else opens nothing.
    """

    __slots__ = ()


def _merge_free(_start1: int, _end1: int, _value1: bool, _value2: bool) -> bool | None:
    return True


def _merge_equal(_start1: int, _end1: int, count1: int, count2: int) -> int | None:
    return count1 if count1 == count2 else None


class PageUsage:
    """The state of every page in [0, capacity_bytes). Offsets and lengths are multiples of 4 KiB.

    Attributes:
        capacity_bytes: Its size.
        used_bytes: Pages with a reference.
        reserved_bytes: Pages promised by a reservation and not used.
        peak_used_bytes: The highest `used_bytes` so far.
    """

    __slots__ = (
        "_free",
        "_hints",
        "_references",
        "_reservations",
        "capacity_bytes",
        "peak_used_bytes",
        "reservation",
        "reserved_bytes",
        "used_bytes",
    )

    def __init__(self, capacity_bytes: int, used_bytes: int = 0, reserved_bytes: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = used_bytes
        self.reserved_bytes = reserved_bytes
        self.peak_used_bytes = used_bytes
        self._free: SegmentSet[bool] = SegmentSet(_merge_free)
        self._references: SegmentSet[int] = SegmentSet(_merge_equal)
        self._reservations: SegmentSet[Reservation] = SegmentSet()
        free_start = used_bytes + reserved_bytes
        if used_bytes:
            self._references.insert(0, used_bytes, 1)
        # What of it is reserved from the start.
        self.reservation: Reservation | None = None
        if reserved_bytes:
            self.reservation = Reservation(used_bytes, free_start)
            self._reservations.insert(used_bytes, free_start, self.reservation)
        if free_start < capacity_bytes:
            self._free.insert(free_start, capacity_bytes, True)
        # (length, alignment) -> where to look first. See find_fit.
        self._hints: dict[tuple[int, int], int] = {}

    @property
    def free_bytes(self) -> int:
        """Pages that are neither used nor reserved."""
        return self._free.span_bytes

    @property
    def largest_free_bytes(self) -> int:
        """Length of the largest contiguous free range; looks at all of them."""
        return max((end - start for start, end, _ in self._free), default=0)

    def ref_count(self, fo: int) -> int:
        """Return the references on the page at `fo`; 0 when it is not used."""
        return self._references.find_value(fo) or 0

    def is_free(self, start: int, end: int) -> bool:
        """Return whether every page of [start, end) is free."""
        hole = self._free.find(start)
        return hole is not None and end <= hole[1]

    def find_fit(self, length_bytes: int, align_bytes: int, phase_bytes: int) -> int | None:
        """Return where `length_bytes` free bytes begin at fo, fo % align_bytes == phase_bytes.

        First fit, from where the last search of this kind ended or something was freed below; from
        the bottom when that finds nothing. So a search does not pass the same thousands of holes
        that are too small again and again.
        """
        key = (length_bytes, align_bytes)
        hint = self._hints.get(key, 0)
        fo = self._search(hint, self.capacity_bytes, length_bytes, align_bytes, phase_bytes)
        if fo is None and hint:
            fo = self._search(0, hint, length_bytes, align_bytes, phase_bytes)
        if fo is not None:
            if len(self._hints) >= _HINTS_MAX:
                self._hints.clear()
            self._hints[key] = fo + length_bytes
        return fo

    def _search(self, fo: int, limit: int, length: int, align: int, phase: int) -> int | None:
        # First fit that begins in a hole below limit. fo steps from candidate to candidate, over
        # holes in the wrong place as over used pages: at most one step a hole, or one an alignment.
        while fo < limit:
            hole = self._free.lower_bound(fo)
            if hole is None:
                return None
            start, end, _ = hole
            fo = max(fo, start)
            fo += (phase - fo) & (align - 1)
            if fo + length <= end:
                return fo
            if fo < end:
                fo = max(end, fo + align)
        return None

    def take(self, start: int, end: int) -> None:
        """Turn [start, end), all free, into used pages with one reference."""
        self._free.remove(start, end)
        self._references.insert(start, end, 1)
        self._count_used(end - start)

    def take_reserved(self, reservation: Reservation, start: int, end: int) -> bool:
        """Turn [start, end) of a reservation into used pages; False when one is used already.

        Raises:
            StateError: The reservation is not (or no longer) one of this arena.
            RangeError: The range is not inside it.
        """
        if self._reservations.find_value(reservation.start) is not reservation:
            raise StateError(f"{reservation!r} is no reservation of this arena, or not any more")
        if start < reservation.start or reservation.end < end:
            raise RangeError(start, end, f"not inside the reservation {reservation!r}")
        try:
            self._references.insert(start, end, 1)
        except RangeError:
            return False
        self.reserved_bytes -= end - start
        self._count_used(end - start)
        return True

    def _count_used(self, length_bytes: int) -> None:
        self.used_bytes += length_bytes
        self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)

    def reserve(self, start: int, end: int) -> Reservation:
        """Take [start, end), all free, out of the free pages for one owner."""
        reservation = Reservation(start, end)
        self._free.remove(start, end)
        self._reservations.insert(start, end, reservation)
        self.reserved_bytes += end - start
        return reservation

    def unreserve(self, reservation: Reservation) -> None:
        """End a reservation: its unused pages become free, its used ones stay used.

        Raises:
            StateError: It is not (or no longer) one of this arena.
        """
        if self._reservations.find_value(reservation.start) is not reservation:
            raise StateError(f"{reservation!r} is no reservation of this arena, or not any more")
        self._reservations.remove(reservation.start, reservation.end)
        for start, end in self._references.gaps(reservation.start, reservation.end):
            self.reserved_bytes -= end - start
            self._set_free(start, end)

    def add_reference(self, start: int, end: int) -> None:
        """Add one reference to each page of [start, end).

        Raises:
            StateError: A page is not used; nothing changed.
        """
        self._check_used(start, end)
        for s, e, count in self._references.remove(start, end):
            self._references.insert(s, e, count + 1)

    def last_references(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) that one `drop_reference` would make unused.

        Raises:
            StateError: A page is not used.
        """
        self._check_used(start, end)
        return [
            (max(s, start), min(e, end))
            for s, e, count in self._references.segments(start, end)
            if count == 1
        ]

    def drop_reference(self, start: int, end: int) -> None:
        """Drop one reference of each page of [start, end), all used."""
        for s, e, count in self._references.remove(start, end):
            if count > 1:
                self._references.insert(s, e, count - 1)
            else:
                self.used_bytes -= e - s
                self._give_back(s, e)

    def _check_used(self, start: int, end: int) -> None:
        segment = self._references.find(start)
        while segment is not None and segment[1] < end:
            start = segment[1]
            segment = self._references.find(start)
        if segment is None:
            raise StateError(f"the arena page at offset {start:#x} is not in use: freed twice?")

    def _give_back(self, start: int, end: int) -> None:
        # Unused pages go to the reservation that they lie in, or are free.
        for reserved_start, reserved_end, _ in self._reservations.segments(start, end):
            if start < reserved_start:
                self._set_free(start, reserved_start)
                start = reserved_start
            stop = min(end, reserved_end)
            self.reserved_bytes += stop - start
            start = stop
        if start < end:
            self._set_free(start, end)

    def _set_free(self, start: int, end: int) -> None:
        self._free.insert(start, end, True)
        for key, hint in self._hints.items():
            # A piece shorter than its alignment may want another phase than what was freed here:
            # going back for each would pass all the holes between again.
            if start < hint and key[0] >= key[1]:
                self._hints[key] = start

    def check_invariants(self) -> None:
        """Check that the three maps agree with one another and with the sums; for tests.

        Raises:
            AssertionError: They do not.
        """
        for part in (self._free, self._references, self._reservations):
            part.check_invariants()
        reserved_bytes = sum(
            e - s
            for start, end, _ in self._reservations
            for s, e in self._references.gaps(start, end)
        )
        overlap = any(
            next(self._references.segments(start, end), None)
            or next(self._reservations.segments(start, end), None)
            for start, end, _ in self._free
        )
        total = self.free_bytes + self.used_bytes + self.reserved_bytes
        if (
            overlap
            or reserved_bytes != self.reserved_bytes
            or self._references.span_bytes != self.used_bytes
            or total != self.capacity_bytes
        ):
            raise AssertionError(
                f"free {self._free!r}, references {self._references!r}, reservations "
                f"{self._reservations!r}, {self.used_bytes} used, {self.reserved_bytes} reserved"
            )
