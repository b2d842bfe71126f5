"""`FreeSpace`: the free pages of an arena, and where among them an allocation fits."""

from __future__ import annotations

from kvmmm.segment import SegmentSet

_HINTS_MAX = 64


class FreeSpace:
    """The free ranges below a capacity. Offsets and lengths are multiples of 4 KiB.

    Args:
        start: Everything from here on is free at first.
        capacity_bytes: Where it ends.

    Attributes:
        ranges: The free ranges, merged.
        hints: Where to look first, by (length, alignment); see `find_fit`.
    """

    __slots__ = ("_capacity_bytes", "_hints_down", "hints", "ranges")

    def __init__(self, start: int, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self.ranges: SegmentSet[bool] = SegmentSet(SegmentSet.merge_equal)
        if start < capacity_bytes:
            self.ranges.insert(start, capacity_bytes, True)
        self.hints: dict[tuple[int, int], int] = {}
        self._hints_down: dict[tuple[int, int], int] = {}

    @property
    def largest_bytes(self) -> int:
        """Length of the largest free range; looks at all of them."""
        return max((end - start for start, end, _ in self.ranges), default=0)

    def covers(self, start: int, end: int) -> bool:
        """Return whether every page of [start, end) is free."""
        hole = self.ranges.find(start)
        return hole is not None and end <= hole[1]

    def add(self, start: int, end: int) -> None:
        """Make [start, end), not free so far, free."""
        self.ranges.insert(start, end, True)
        # A piece shorter than its alignment may want another phase than what was freed here: going
        # back for each would pass all the holes between again.
        for key, hint in self.hints.items():
            if start < hint and key[0] >= key[1]:
                self.hints[key] = start
        for key, hint in self._hints_down.items():
            if hint < end and key[0] >= key[1]:
                self._hints_down[key] = end

    # Searching. First fit, from where the last search of this kind ended or something was freed
    # behind it; from the edge when that finds nothing. So a search does not pass the same thousands
    # of holes that are too small again and again.

    def find_fit(self, length_bytes: int, align_bytes: int, phase_bytes: int) -> int | None:
        """Return the lowest fo where `length_bytes` are free, fo % align_bytes == phase_bytes.

        Lowest but for the hints: something that fits may have been passed over before.
        """
        key = (length_bytes, align_bytes)
        hint = self.hints.get(key, 0)
        found = self._search(hint, self._capacity_bytes, length_bytes, align_bytes, phase_bytes)
        if found is None and hint:
            found = self._search(0, hint, length_bytes, align_bytes, phase_bytes)
        if found is not None:
            if len(self.hints) >= _HINTS_MAX:
                self.hints.clear()
            self.hints[key] = found + length_bytes
        return found

    def find_fit_down(self, length_bytes: int, align_bytes: int, phase_bytes: int) -> int | None:
        """Return the highest such fo, in the same sense."""
        key = (length_bytes, align_bytes)
        hint = self._hints_down.get(key, self._capacity_bytes)
        fo = self._search_down(hint, 0, length_bytes, align_bytes, phase_bytes)
        if fo is None and hint < self._capacity_bytes:
            # From the edge down to everything that begins at or above the hint, or crosses it.
            floor = hint - length_bytes
            fo = self._search_down(
                self._capacity_bytes, floor, length_bytes, align_bytes, phase_bytes
            )
        if fo is not None:
            if len(self._hints_down) >= _HINTS_MAX:
                self._hints_down.clear()
            self._hints_down[key] = fo
        return fo

    def _search(self, fo: int, limit: int, length: int, align: int, phase: int) -> int | None:
        # First fit that begins in a hole below limit. fo steps from candidate to candidate, over
        # holes in the wrong place as over used pages: at most one step a hole, or one an alignment.
        while fo < limit:
            hole = self.ranges.lower_bound(fo)
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

    def _search_down(self, end: int, floor: int, length: int, align: int, phase: int) -> int | None:
        # The mirror image: last fit that ends at or below end, in a hole that reaches above floor.
        while end > max(floor, 0):
            hole = self.ranges.find(end - 1) or self.ranges.prev_segment(end)
            if hole is None:
                return None
            start = hole[0]
            fo = min(end, hole[1]) - length
            fo -= (fo - phase) & (align - 1)
            if fo >= start:
                return fo
            end = fo + length
            if end > start:
                end = min(start, end - align)
        return None
