"""`ReferenceCounts`: how many references each page of a file has. No lock."""

from __future__ import annotations

from kvmmm.errors import StateError
from kvmmm.segment import SegmentSet


class ReferenceCounts:
    """Counts by page, zero everywhere at first. Offsets are multiples of 4 KiB."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: SegmentSet[int] = SegmentSet(SegmentSet.merge_equal)

    def __repr__(self) -> str:
        return f"<ReferenceCounts {self._counts!r}>"

    @property
    def referenced_bytes(self) -> int:
        """Pages with a reference."""
        return self._counts.span_bytes

    def count(self, fo: int) -> int:
        """Return the references on the page at `fo`."""
        return self._counts.find_value(fo) or 0

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return (start, end, count) of the parts of [start, end) that have any, in order."""
        return [
            (max(s, start), min(e, end), count) for s, e, count in self._counts.segments(start, end)
        ]

    def add(self, start: int, end: int) -> None:
        """Add one to each page of [start, end)."""
        counts = self._counts
        gaps = list(counts.gaps(start, end))
        for s, e, count in counts.remove(start, end):
            counts.insert(s, e, count + 1)
        for s, e in gaps:
            counts.insert(s, e, 1)

    def drop(self, start: int, end: int) -> None:
        """Take one from each page of [start, end).

        Raises:
            StateError: A page has none; nothing changed.
        """
        counts = self._counts
        for s, _ in counts.gaps(start, end):
            raise StateError(f"the page at offset {s:#x} has no reference: dropped twice?")
        for s, e, count in counts.remove(start, end):
            if count > 1:
                counts.insert(s, e, count - 1)
