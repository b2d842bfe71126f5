"""`PageUsage`: which pages of an arena are free, reserved or used. No system calls, no lock.

Three interval maps. Nothing in it grows with the capacity.

    free          free ranges, merged
    references    used ranges with their count, neighbours with equal counts merged
    reservations  reserved ranges, whole, whatever of them is used by now
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.arena.free_space import FreeSpace
from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.ranges import FileRange
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from collections.abc import Iterable


class Reservation(FileRange):
    """A range of the arena that is promised to whoever holds this object.

    The object itself is the right: an equal range made by somebody else opens nothing.
    """

    __slots__ = ()


def _unused(fo: int) -> StateError:
    return StateError(f"the arena page at offset {fo:#x} is not in use: freed twice?")


def _joined(ranges: Iterable[FileRange]) -> list[tuple[int, int]]:
    # The same ranges, each united with the one before that it continues: what a fork passes.
    joined: list[tuple[int, int]] = []
    start = end = -1
    for fr in ranges:
        if fr.start == end:
            end = fr.end
            continue
        if start < end:
            joined.append((start, end))
        start, end = fr.start, fr.end
    if start < end:
        joined.append((start, end))
    return joined


class PageUsage:
    """The state of every page in [0, capacity_bytes). Offsets and lengths are multiples of 4 KiB.

    Attributes:
        capacity_bytes: Its size.
        used_bytes: Pages with a reference.
        reserved_bytes: Pages promised by a reservation and not used.
        peak_used_bytes: The highest `used_bytes` so far.
        free: The pages that are neither used nor reserved.
        reservation: The one that it began with.
    """

    __slots__ = (
        "_references",
        "_reservations",
        "capacity_bytes",
        "free",
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
        self._references: SegmentSet[int] = SegmentSet(SegmentSet.merge_equal)
        self._reservations: SegmentSet[Reservation] = SegmentSet()
        free_start = used_bytes + reserved_bytes
        if used_bytes:
            self._references.insert(0, used_bytes, 1)
        self.reservation: Reservation | None = None
        if reserved_bytes:
            self.reservation = Reservation(used_bytes, free_start)
            self._reservations.insert(used_bytes, free_start, self.reservation)
        self.free = FreeSpace(free_start, capacity_bytes)

    @property
    def free_bytes(self) -> int:
        """Pages that are neither used nor reserved."""
        return self.free.ranges.span_bytes

    def ref_count(self, fo: int) -> int:
        """Return the references on the page at `fo`; 0 when it is not used."""
        return self._references.find_value(fo) or 0

    def ref_counts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return (start, end, references) of the parts of [start, end) that are used, in order."""
        return [
            (max(s, start), min(e, end), count)
            for s, e, count in self._references.segments(start, end)
        ]

    def take_fit(self, length_bytes: int, align_bytes: int, phase_bytes: int) -> int | None:
        """Turn free pages into used ones where the last search says; None: look for others.

        The usual case of `find_fit` and `take`, in one call of C.
        """
        free = self.free
        hints = free.hints
        key = (length_bytes, align_bytes)
        hint = hints.get(key)
        if hint is None:
            return None
        fo = free.ranges.move_fit(self._references, 1, hint, length_bytes, align_bytes, phase_bytes)
        if fo is not None:
            hints[key] = fo + length_bytes
            used_bytes = self.used_bytes = self.used_bytes + length_bytes
            if self.peak_used_bytes < used_bytes:  # noqa: PLR1730 - a call of max() costs more
                self.peak_used_bytes = used_bytes
        return fo

    def take(self, start: int, end: int) -> None:
        """Turn [start, end), all free, into used pages with one reference."""
        self.free.ranges.remove(start, end)
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
        used_bytes = self.used_bytes = self.used_bytes + length_bytes
        self.peak_used_bytes = max(self.peak_used_bytes, used_bytes)

    def reserve(self, start: int, end: int) -> Reservation:
        """Take [start, end), all free, out of the free pages for one owner."""
        reservation = Reservation(start, end)
        self.free.ranges.remove(start, end)
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
            self.free.add(start, end)

    def add_references(self, ranges: Iterable[FileRange]) -> None:
        """Add one reference to each page of each range; two for a page that lies in two.

        Raises:
            StateError: A page is not used; nothing changed.
        """
        joined = _joined(ranges)
        for start, end in joined:
            self._check_used(start, end)
        references = self._references
        for start, end in joined:
            for s, e, count in references.remove(start, end):
                references.insert(s, e, count + 1)

    def first_shared(self, start: int, end: int) -> int | None:
        """Return where the first page with more than one reference lies in [start, end).

        Raises:
            StateError: A page before that is not used.
        """
        fo = start
        while fo < end:
            segment = self._references.find(fo)
            if segment is None:
                raise _unused(fo)
            if segment[2] > 1:
                return fo
            fo = segment[1]
        return None

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

    def drop_shared(self, start: int, end: int) -> bool:
        """Drop one reference of each page of [start, end) if all have equally many, and several.

        The usual case after a copy on write: nothing becomes unused.
        """
        segment = self._references.find(start)
        if segment is None or segment[2] < 2 or segment[1] < end:
            return False
        self._references.remove(start, end)
        self._references.insert(start, end, segment[2] - 1)
        return True

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
            raise _unused(start)

    def _give_back(self, start: int, end: int) -> None:
        # Unused pages go to the reservation that they lie in, or are free.
        for reserved_start, reserved_end, _ in self._reservations.segments(start, end):
            if start < reserved_start:
                self.free.add(start, reserved_start)
                start = reserved_start
            stop = min(end, reserved_end)
            self.reserved_bytes += stop - start
            start = stop
        if start < end:
            self.free.add(start, end)

    def check_invariants(self) -> None:
        """Check that the three maps agree with one another and with the sums; for tests.

        Raises:
            AssertionError: They do not.
        """
        for part in (self.free.ranges, self._references, self._reservations):
            part.check_invariants()
        reserved_bytes = sum(
            e - s
            for start, end, _ in self._reservations
            for s, e in self._references.gaps(start, end)
        )
        overlap = any(
            next(self._references.segments(start, end), None)
            or next(self._reservations.segments(start, end), None)
            for start, end, _ in self.free.ranges
        )
        total = self.free_bytes + self.used_bytes + self.reserved_bytes
        if (
            overlap
            or reserved_bytes != self.reserved_bytes
            or self._references.span_bytes != self.used_bytes
            or total != self.capacity_bytes
        ):
            raise AssertionError(
                f"free {self.free.ranges!r}, references {self._references!r}, reservations "
                f"{self._reservations!r}, {self.used_bytes} used, {self.reserved_bytes} reserved"
            )
