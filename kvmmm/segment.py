"""`SegmentSet`: an ordered map from disjoint half-open ranges to values.

vmas, pmas, reference counts and free space are all interval maps, and all are this one. Segments
lie in blocks of at most a few hundred, three parallel lists each, under one list of the blocks'
first addresses: a lookup is two bisections, an insertion moves a few hundred pointers, whatever the
size of the set. One flat list would move 100 000; a tree in Python costs more at every size that
occurs. Segments are not objects: a lookup creates nothing, the garbage collector follows nothing.

Source: the interface of gVisor's pkg/segment, with (start, end) in place of iterators.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Generic, TypeVar

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

V = TypeVar("V")

_BLOCK_MAX = 512  # a fuller block is cut in two
_BLOCK_MIN = 64  # an emptier one unites with a neighbour, when both together fill at most half


class SegmentSet(Generic[V]):
    """Ordered set of disjoint half-open segments [start, end), each with a value.

    Addresses are plain ints in [0, 2**64]; a segment is a plain tuple (start, end, value). Values
    must not be None, and `merge` and `split` must not raise. Not thread-safe: the owner's lock
    covers it. Do not change a set while iterating over it.

    Args:
        merge: `merge(start1, end1, value1, value2)` decides whether two adjacent segments, the
            first [start1, end1) and the second starting at end1, become one: the value of both,
            or None for no. Without it nothing is merged.
        split: `split(start, end, value, at)` gives the values of [start, at) and [at, end).
            Without it both keep the value.
    """

    __slots__ = ("_blocks", "_count", "_firsts", "_merge", "_span_bytes", "_split")

    def __init__(
        self,
        merge: Callable[[int, int, V, V], V | None] | None = None,
        split: Callable[[int, int, V, int], tuple[V, V]] | None = None,
    ) -> None:
        self._merge = merge
        self._split = split
        # _firsts[i] == _blocks[i][0][0]; a block is (starts, ends, values) and never empty.
        self._firsts: list[int] = []
        self._blocks: list[tuple[list[int], list[int], list[V]]] = []
        self._count = 0
        self._span_bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        for starts, ends, values in self._blocks:
            yield from zip(starts, ends, values, strict=True)

    def __repr__(self) -> str:
        return f"SegmentSet({', '.join(f'[{s:#x}, {e:#x})={v!r}' for s, e, v in self)})"

    @property
    def span_bytes(self) -> int:
        """Sum of the segments' lengths."""
        return self._span_bytes

    # Lookup.

    def find(self, addr: int) -> tuple[int, int, V] | None:
        """Return the segment that covers `addr`."""
        i = bisect_right(self._firsts, addr) - 1
        if i < 0:
            return None
        starts, ends, values = self._blocks[i]
        j = bisect_right(starts, addr) - 1
        return (starts[j], ends[j], values[j]) if addr < ends[j] else None

    def find_value(self, addr: int) -> V | None:
        """Return the value of the segment that covers `addr`; the cheapest lookup."""
        i = bisect_right(self._firsts, addr) - 1
        if i < 0:
            return None
        starts, ends, values = self._blocks[i]
        j = bisect_right(starts, addr) - 1
        return values[j] if addr < ends[j] else None

    def lower_bound(self, addr: int) -> tuple[int, int, V] | None:
        """Return the segment that covers `addr`, or else the first one after it."""
        return self._at(*self._locate(addr))

    def next_segment(self, addr: int) -> tuple[int, int, V] | None:
        """Return the first segment that starts at or after `addr`."""
        i, j = self._locate(addr)
        if i < len(self._blocks) and self._blocks[i][0][j] < addr:
            i, j = self._after(i, j)
        return self._at(i, j)

    def prev_segment(self, addr: int) -> tuple[int, int, V] | None:
        """Return the last segment that ends at or before `addr`."""
        i, j = self._locate(addr)
        if j:
            return self._at(i, j - 1)
        return self._at(i - 1, len(self._blocks[i - 1][0]) - 1) if i else None

    def segments(self, start: int = 0, end: int = ADDRESS_LIMIT) -> Iterator[tuple[int, int, V]]:
        """Iterate over the segments that overlap [start, end), whole, in order."""
        i, j = self._locate(start) if start < end else (len(self._blocks), 0)
        while i < len(self._blocks):
            starts, ends, values = self._blocks[i]
            k = len(starts) if starts[-1] < end else bisect_left(starts, end)
            yield from zip(starts[j:k], ends[j:k], values[j:k], strict=True)
            if k < len(starts):
                return
            i, j = i + 1, 0

    def gaps(self, start: int = 0, end: int = ADDRESS_LIMIT) -> Iterator[tuple[int, int]]:
        """Iterate over the largest sub-ranges of [start, end) that no segment covers, in order."""
        for segment_start, segment_end, _ in self.segments(start, end):
            if start < segment_start:
                yield start, segment_start
            start = segment_end
        if start < end:
            yield start, end

    def find_gap(self, addr: int) -> tuple[int, int] | None:
        """Return the largest range around `addr` that no segment covers; None if one covers it."""
        after = self.lower_bound(addr)
        if after is not None and after[0] <= addr:
            return None
        before = self.prev_segment(addr)
        return before[1] if before else 0, after[0] if after else ADDRESS_LIMIT

    # Change.

    def insert(self, start: int, end: int, value: V) -> None:
        """Add [start, end), merged with its neighbours where `merge` wants it.

        Raises:
            RangeError: It is empty, or overlaps a segment; nothing changed.
        """
        if not 0 <= start < end <= ADDRESS_LIMIT:
            raise RangeError(start, end, "a segment must be inside 64 bits and not empty")
        firsts = self._firsts
        if not firsts:
            firsts.append(start)
            self._blocks.append(([start], [end], [value]))
            self._count, self._span_bytes = 1, end - start
            return
        i = bisect_right(firsts, start, 1) - 1
        starts, ends, values = self._blocks[i]
        j = bisect_right(starts, start)  # of the successor; 0 only in front of everything
        if j < len(starts):
            next_start = starts[j]
        else:
            next_start = firsts[i + 1] if i + 1 < len(firsts) else ADDRESS_LIMIT + 1
        if end > next_start or (j and ends[j - 1] > start):
            raise RangeError(start, end, "overlaps a segment that is there already")
        self._span_bytes += end - start
        if self._merge is not None and self._join(i, j, start, end, value):
            return
        starts.insert(j, start)
        ends.insert(j, end)
        values.insert(j, value)
        self._count += 1
        if j == 0:
            firsts[i] = start
        if len(starts) > _BLOCK_MAX:
            self._cut(i)

    def remove(self, start: int, end: int) -> list[tuple[int, int, V]]:
        """Remove [start, end), cutting segments across its edges; return what went, in order."""
        i, j = self._locate(start)
        if start >= end or i == len(self._blocks) or self._blocks[i][0][j] >= end:
            return []
        starts, ends, _ = self._blocks[i]
        if start < starts[j] or ends[j] < end:
            self.isolate(start, end)
            return self._remove_whole(start, end)
        if starts[j] < start and end < ends[j]:
            self._split_at(i, j, end)
            return self.remove(start, end)
        return [(start, end, self._carve(i, j, start, end))]

    def isolate(self, start: int, end: int) -> None:
        """Cut the segments across `start` and `end`, so that none crosses either."""
        for at in (start, end):
            i, j = self._locate(at)
            if i < len(self._blocks) and self._blocks[i][0][j] < at:
                self._split_at(i, j, at)

    def mutate(self, start: int, end: int, change: Callable[[int, int, V], V]) -> None:
        """Give every segment in [start, end) the value `change(start, end, value)`, then merge.

        Segments across the edges are cut first. When `change` raises, no value has changed.
        """
        self.isolate(start, end)
        try:
            changed = [change(s, e, v) for s, e, v in self.segments(start, end)]
            i, j = self._locate(start)
            while changed:
                values = self._blocks[i][2]
                n = min(len(values) - j, len(changed))
                values[j : j + n] = changed[:n]
                del changed[:n]
                i, j = i + 1, 0
        finally:
            self.merge_range(start, end)

    def merge_range(self, start: int, end: int) -> None:
        """Merge adjacent segments that meet in [start, end], where `merge` wants it."""
        if self._merge is None:
            return
        segment = self.lower_bound(max(start - 1, 0))
        while segment is not None and segment[1] <= end:
            again = self._merge_next(*self._locate(segment[0]))
            segment = self.lower_bound(segment[0] if again else segment[1])

    def clear(self) -> None:
        """Remove everything."""
        self._firsts.clear()
        self._blocks.clear()
        self._count = self._span_bytes = 0

    def check_invariants(self) -> None:
        """Check order, disjointness and the counters; for tests and debugging.

        Raises:
            AssertionError: The set is damaged.
        """
        last = count = span_bytes = 0
        for first, (starts, ends, values) in zip(self._firsts, self._blocks, strict=True):
            ok = 0 < len(starts) == len(ends) == len(values) <= _BLOCK_MAX and first == starts[0]
            for start, end in zip(starts, ends, strict=True):
                ok = ok and last <= start < end <= ADDRESS_LIMIT
                last = end
                count += 1
                span_bytes += end - start
            if not ok:
                raise AssertionError(f"block at {first:#x} of {self!r}")
        if (count, span_bytes) != (self._count, self._span_bytes):
            raise AssertionError(f"{count} segments of {span_bytes} bytes: {self!r}")

    # Positions: (i, j) is segment j of block i; (len(blocks), 0) is the end.

    def _locate(self, addr: int) -> tuple[int, int]:
        # Position of the first segment that ends after addr.
        i = bisect_right(self._firsts, addr) - 1
        if i < 0:
            return 0, 0
        starts, ends, _ = self._blocks[i]
        j = bisect_right(starts, addr) - 1
        if addr < ends[j]:
            return i, j
        j += 1
        return (i, j) if j < len(starts) else (i + 1, 0)

    def _after(self, i: int, j: int) -> tuple[int, int]:
        return (i, j + 1) if j + 1 < len(self._blocks[i][0]) else (i + 1, 0)

    def _at(self, i: int, j: int) -> tuple[int, int, V] | None:
        if i == len(self._blocks):
            return None
        starts, ends, values = self._blocks[i]
        return starts[j], ends[j], values[j]

    # Pieces of a change. Whoever calls them keeps _span_bytes, they keep everything else.

    def _merged(self, start: int, end: int, value: V, next_value: V) -> V | None:
        return None if self._merge is None else self._merge(start, end, value, next_value)

    def _halves(self, start: int, end: int, value: V, at: int) -> tuple[V, V]:
        return (value, value) if self._split is None else self._split(start, end, value, at)

    def _join(self, i: int, j: int, start: int, end: int, value: V) -> bool:
        # Extend the predecessor, or the successor at (i, j), over [start, end), if one wants to.
        starts, ends, values = self._blocks[i]
        k, m = (i, j) if j < len(starts) else (i + 1, 0)
        touches_next = k < len(self._blocks) and self._blocks[k][0][m] == end
        if j and ends[j - 1] == start:
            merged = self._merged(starts[j - 1], start, values[j - 1], value)
            if merged is not None:
                ends[j - 1] = end
                values[j - 1] = merged
                if touches_next:
                    self._merge_next(i, j - 1)
                return True
        if touches_next:
            starts, _, values = self._blocks[k]
            merged = self._merged(start, end, value, values[m])
            if merged is not None:
                starts[m] = start
                values[m] = merged
                if m == 0:
                    self._firsts[k] = start
                return True
        return False

    def _merge_next(self, i: int, j: int) -> bool:
        # Merge segment (i, j) with its successor.
        k, m = self._after(i, j)
        starts, ends, values = self._blocks[i]
        following = self._at(k, m)
        if following is None or ends[j] != following[0]:
            return False
        merged = self._merged(starts[j], ends[j], values[j], following[2])
        if merged is None:
            return False
        ends[j] = following[1]
        values[j] = merged
        self._delete(k, m)
        return True

    def _split_at(self, i: int, j: int, at: int) -> None:
        # Cut segment (i, j) in two.
        starts, ends, values = self._blocks[i]
        left, right = self._halves(starts[j], ends[j], values[j], at)
        values[j] = left
        starts.insert(j + 1, at)
        ends.insert(j, at)
        values.insert(j + 1, right)
        self._count += 1
        if len(starts) > _BLOCK_MAX:
            self._cut(i)

    def _carve(self, i: int, j: int, start: int, end: int) -> V:
        # Cut [start, end) off one end of segment (i, j), or remove all of it; return its value.
        starts, ends, values = self._blocks[i]
        value = values[j]
        self._span_bytes -= end - start
        if starts[j] < start:
            values[j], value = self._halves(starts[j], end, value, start)
            ends[j] = start
        elif end < ends[j]:
            value, values[j] = self._halves(start, ends[j], value, end)
            starts[j] = end
            if j == 0:
                self._firsts[i] = end
        else:
            self._delete(i, j)
        return value

    def _remove_whole(self, start: int, end: int) -> list[tuple[int, int, V]]:
        # Remove the segments between two addresses that none crosses.
        pieces: list[tuple[int, int, V]] = []
        i, j = self._locate(start)
        while i < len(self._blocks) and self._blocks[i][0][j] < end:
            starts, ends, values = self._blocks[i]
            k = bisect_left(starts, end)
            pieces += zip(starts[j:k], ends[j:k], values[j:k], strict=True)
            if k - j < len(starts):
                del starts[j:k], ends[j:k], values[j:k]
                self._firsts[i] = starts[0]
                i, j = i + 1, 0
            else:
                del self._blocks[i], self._firsts[i]
        self._count -= len(pieces)
        self._span_bytes -= sum(e - s for s, e, _ in pieces)
        return pieces

    def _delete(self, i: int, j: int) -> None:
        # Delete segment (i, j). Positions may change.
        starts, ends, values = self._blocks[i]
        self._count -= 1
        if len(starts) == 1:
            del self._blocks[i], self._firsts[i]
            return
        del starts[j], ends[j], values[j]
        if j == 0:
            self._firsts[i] = starts[0]
        if len(starts) < _BLOCK_MIN and not self._unite(i) and i:
            self._unite(i - 1)

    def _unite(self, i: int) -> bool:
        # Let block i take in its successor, if there is one and both are small.
        starts, ends, values = self._blocks[i]
        if i + 1 == len(self._blocks):
            return False
        more_starts, more_ends, more_values = self._blocks[i + 1]
        if len(starts) + len(more_starts) > _BLOCK_MAX // 2:
            return False
        starts += more_starts
        ends += more_ends
        values += more_values
        del self._blocks[i + 1], self._firsts[i + 1]
        return True

    def _cut(self, i: int) -> None:
        # Cut a block that has grown too full in two.
        starts, ends, values = self._blocks[i]
        half = len(starts) // 2
        self._blocks.insert(i + 1, (starts[half:], ends[half:], values[half:]))
        self._firsts.insert(i + 1, starts[half])
        del starts[half:], ends[half:], values[half:]
