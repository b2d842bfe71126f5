"""`MappingSet`: who maps what of a mappable, and where.

A mapping of one space is a straight line from offsets to addresses, so an interval of offsets has
as its value the set of (space, address minus offset, writable): cutting an interval cuts every
mapping in it, without touching one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeAlias

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.memmap.file import MappingSpace

# (space, address minus offset, writable)
_Mapping: TypeAlias = "tuple[MappingSpace, int, bool]"
_Mappings: TypeAlias = "frozenset[_Mapping]"


class MappingSet:
    """Offsets of one mappable -> the mappings of them. Not thread-safe: its owner's lock covers it.

    Spaces are told apart by identity (or by their own hash and equality).

    Source: gVisor memmap.MappingSet.
    """

    __slots__ = ("_mappings",)

    def __init__(self) -> None:
        self._mappings: SegmentSet[_Mappings] = SegmentSet(SegmentSet.merge_equal)

    def __bool__(self) -> bool:
        return bool(len(self._mappings))

    def __repr__(self) -> str:
        return f"<MappingSet {self._mappings!r}>"

    def add_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> list[FileRange]:
        """Note a mapping; return the ranges of offsets that had none before, ascending.

        Args:
            space: Who maps.
            ar: Its addresses, page aligned.
            offset: Where `ar` begins in the mappable, page aligned.
            writable: Whether it may ever be written through this mapping.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap; nothing changed.
        """
        start, end = _offsets(ar, offset)
        mapping = frozenset(((space, ar.start - offset, writable),))
        mappings = self._mappings
        fresh = [FileRange(s, e) for s, e in mappings.gaps(start, end)]
        for s, e, others in mappings.remove(start, end):
            mappings.insert(s, e, others | mapping)
        for fr in fresh:
            mappings.insert(fr.start, fr.end, mapping)
        return fresh

    def remove_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> list[FileRange]:
        """Forget a mapping, all of it or a part; return the ranges that have none now, ascending.

        What was not added so, with this `writable`, stays as it is.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap; nothing changed.
        """
        start, end = _offsets(ar, offset)
        mapping = frozenset(((space, ar.start - offset, writable),))
        mappings = self._mappings
        gone: list[FileRange] = []
        for s, e, all_of_them in mappings.remove(start, end):
            others = all_of_them - mapping
            if others:
                mappings.insert(s, e, others)
            else:
                gone.append(FileRange(s, e))
        return gone

    def invalidate(self, start: int, end: int, *, private: bool) -> None:
        """Call `invalidate` of every space, for exactly the addresses that map [start, end).

        One call for each contiguous range of addresses, however the offsets are cut up by other
        mappings.

        Args:
            start: First offset, page aligned.
            end: One past the last.
            private: Whether private copies go, too.
        """
        # Runs that may still grow, and those that are complete.
        open_runs: dict[tuple[MappingSpace, int], list[int]] = {}
        runs: list[tuple[MappingSpace, list[int]]] = []
        for s, e, mappings in self._mappings.segments(start, end):
            for space, delta, _ in mappings:
                first, last = max(s, start) + delta, min(e, end) + delta
                run = open_runs.get((space, delta))
                if run is not None and run[1] >= first:
                    run[1] = last
                else:
                    open_runs[space, delta] = run = [first, last]
                    runs.append((space, run))
        for space, (first, last) in runs:
            space.invalidate(AddrRange(first, last), private=private)

    def check_invariants(self) -> None:
        """Check that no interval is without mappings and all are merged; for tests.

        Raises:
            AssertionError: One is.
        """
        self._mappings.check_invariants()
        last_end, last = -1, None
        for start, end, mappings in self._mappings:
            if not mappings or (start == last_end and mappings == last):
                raise AssertionError(repr(self))
            last_end, last = end, mappings


def _offsets(ar: AddrRange, offset: int) -> tuple[int, int]:
    end = offset + ar.end - ar.start
    if (ar.start | ar.end | offset) & PAGE_MASK or not 0 <= offset < end <= ADDRESS_LIMIT:
        raise RangeError(ar.start, ar.end, f"cannot map whole pages at offset {offset:#x} there")
    return offset, end


class Mapped:
    """The part of a `Mappable` that knows who maps it; thread-safe. To be mixed in.

    Lock order: `_mappings_lock` comes after an mm's mapping_lock and before its active_lock, so
    `translate` must not take it.
    """

    def __init__(self) -> None:
        self._mappings = MappingSet()
        self._mappings_lock = threading.Lock()

    @property
    def is_mapped(self) -> bool:
        """Whether anybody maps any of it."""
        return bool(self._mappings)

    def add_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """See `kvmmm.memmap.file.Mappable`.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap.
        """
        with self._mappings_lock:
            self._mappings.add_mapping(space, ar, offset, writable=writable)

    def remove_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """See `kvmmm.memmap.file.Mappable`.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap.
        """
        with self._mappings_lock:
            self._mappings.remove_mapping(space, ar, offset, writable=writable)

    def copy_mapping(
        self, space: MappingSpace, src: AddrRange, dst: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """See `kvmmm.memmap.file.Mappable`. `dst` may be longer or shorter than `src`.

        Raises:
            RangeError: Unaligned or empty, or the offsets wrap.
        """
        del src  # nothing is kept by mapping: what is known of dst says it all
        self.add_mapping(space, dst, offset, writable=writable)
