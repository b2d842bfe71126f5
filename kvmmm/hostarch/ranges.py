"""`AddrRange` and `FileRange`: the only range arithmetic in kvmmm."""

from __future__ import annotations

from typing import Self

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK, align_down, align_up


class AddrRange:
    """Half-open range [start, end) of guest addresses; 0 <= start <= end <= 2**64.

    A plain class with slots: half the cost of a dataclass, and ranges are made on the fault path.
    Treat it as immutable.
    """

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= ADDRESS_LIMIT:
            raise RangeError(start, end, "start must not lie after end, nor either outside 64 bits")
        self.start = start
        self.end = end

    @classmethod
    def of_length(cls, start: int, length_bytes: int) -> Self:
        """Return [start, start + length_bytes).

        Raises:
            RangeError: It would wrap.
        """
        return cls(start, start + length_bytes)

    @property
    def length_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def is_page_aligned(self) -> bool:
        """Whether both ends are multiples of 4 KiB."""
        return not (self.start | self.end) & PAGE_MASK

    def __bool__(self) -> bool:
        return self.end > self.start

    def __contains__(self, addr: int) -> bool:
        return self.start <= addr < self.end

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.start == other.start and self.end == other.end

    def __hash__(self) -> int:
        return hash((self.start, self.end))

    def __repr__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"

    def covers(self, other: AddrRange) -> bool:
        """Return whether every byte of `other` lies in this range."""
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: AddrRange) -> bool:
        """Return whether the two share a byte."""
        return max(self.start, other.start) < min(self.end, other.end)

    def intersect(self, other: AddrRange) -> Self:
        """Return the shared part; empty, at this range's start, when there is none."""
        start = max(self.start, other.start)
        end = min(self.end, other.end)
        return type(self)(start, end) if start < end else type(self)(self.start, self.start)

    def aligned_out(self, align_bytes: int) -> Self:
        """Return the smallest range around this one whose ends are multiples of `align_bytes`."""
        return type(self)(align_down(self.start, align_bytes), align_up(self.end, align_bytes))


class FileRange(AddrRange):
    """Half-open range of offsets in the file behind a `memmap` File, here the arena's memfd."""

    __slots__ = ()
