"""`AddrRangeSeq`: the ranges of a vectored copy (an iovec), and how far the copy has come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.hostarch.ranges import AddrRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_BYTES = (1 << 63) - 1
"""What all ranges together may have: a copy's count is a signed 64-bit number (ssize_t)."""


class AddrRangeSeq:
    """A sequence of ranges, in any order, overlapping or not. Immutable.

    Ranges of length 0 are part of it, and stay where they are: whoever goes through it with `head`
    and `drop_first` sees each of them once. What has been cut off at the end by `take_first` stays
    as well, with length 0.

    The ranges themselves are shared by everything that is derived from a sequence: `tail`,
    `drop_first` and `take_first` copy none of them.

    Attributes:
        n_ranges: How many ranges, empty ones included.
        n_bytes: Their lengths, together.
        packed: (start, length) of each range as two unsigned 64-bit numbers, the host's byte order:
            what C goes through. A range at 2**64, which can only be empty, stands one lower.

    Raises:
        RangeError: More than `MAX_BYTES`.

    Source:
        gVisor hostarch.AddrRangeSeq.
    """

    # The ranges from _index on, the first without its first _offset bytes, n_bytes of all these.
    # `packed` of what is derived is made when it is first asked for: a slot without a value.
    __slots__ = ("_index", "_offset", "_ranges", "n_bytes", "n_ranges", "packed")

    def __init__(self, ranges: Iterable[AddrRange] = ()) -> None:
        self._ranges = tuple(ranges)
        self._index = self._offset = 0
        self.n_ranges = len(self._ranges)
        self.n_bytes = sum([ar.end - ar.start for ar in self._ranges])
        if self.n_bytes > MAX_BYTES:
            first = self._ranges[0]
            raise RangeError(
                first.start, first.end,
                f"together with what follows {self.n_bytes:#x} bytes, more than can be counted",
            )  # fmt: skip
        self.packed = _pack(self._ranges)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> bytes:
            if name != "packed":
                raise AttributeError(name, name=name, obj=self)
            self.packed = _pack(self)
            return self.packed

    def _part(self, index: int, offset: int, n_bytes: int) -> Self:
        part = object.__new__(type(self))
        part._ranges = self._ranges
        part._index = index
        part._offset = offset
        part.n_ranges = len(self._ranges) - index
        part.n_bytes = n_bytes
        return part

    @property
    def is_empty(self) -> bool:
        """Whether there are no ranges. Ranges without bytes are ranges."""
        return not self.n_ranges

    @property
    def head(self) -> AddrRange:
        """The first range.

        Raises:
            IndexError: There is none.
        """
        if not self.n_ranges:
            raise IndexError("an empty sequence has no first range")
        ar = self._ranges[self._index]
        start = ar.start + self._offset
        if ar.end - start > self.n_bytes:
            return AddrRange(start, start + self.n_bytes)
        return AddrRange(start, ar.end) if self._offset else ar

    @property
    def tail(self) -> Self:
        """All but the first range.

        Raises:
            IndexError: There is none.
        """
        head = self.head
        return self._part(self._index + 1, 0, self.n_bytes - (head.end - head.start))

    def drop_first(self, n_bytes: int) -> Self:
        """Return what follows the first `n_bytes`; no ranges, if there are no more bytes than that.

        A first range of length 0 is dropped by any number, 0 included, so that this ends:

            while not ranges.is_empty:
                ranges = ranges.drop_first(copy(ranges.head))

        Those of length 0 behind the last byte that is dropped stay.

        Raises:
            RangeError: `n_bytes` is below 0.
        """
        if n_bytes < 0:
            raise RangeError(0, n_bytes, "bytes to drop cannot be fewer than none")
        left = self.n_bytes - n_bytes
        if left < 0:
            return self._part(len(self._ranges), 0, 0)
        index, offset, ranges = self._index, self._offset, self._ranges
        # Ranges may have been cut by take_first: not their own lengths count, but what is left.
        at_hand = self.n_bytes
        while index < len(ranges):
            length = min(ranges[index].end - ranges[index].start - offset, at_hand)
            if length > n_bytes:
                return self._part(index, offset + n_bytes, left)
            n_bytes -= length
            at_hand -= length
            index += 1
            offset = 0
            if not n_bytes:
                break
        return self._part(index, 0, left)

    def take_first(self, n_bytes: int) -> Self:
        """Return the same ranges with no more than the first `n_bytes`.

        Raises:
            RangeError: `n_bytes` is below 0.
        """
        if n_bytes < 0:
            raise RangeError(0, n_bytes, "bytes to take cannot be fewer than none")
        return self._part(self._index, self._offset, min(n_bytes, self.n_bytes))

    def __iter__(self) -> Iterator[AddrRange]:
        """Yield each range, empty ones included."""
        left, offset = self.n_bytes, self._offset
        for ar in self._ranges[self._index :]:
            start = ar.start + offset
            length = min(ar.end - start, left)
            yield ar if length == ar.end - ar.start else AddrRange(start, start + length)
            left -= length
            offset = 0

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]"


def truncated_addr_range_seq(ars: AddrRangeSeq, rest: AddrRangeSeq, end: int) -> AddrRangeSeq:
    """Return `ars` up to where it can be used. Later ranges stay in it, with length 0.

    Args:
        ars: All that was asked for.
        rest: What is left of it, made by `tail` or `drop_first`: its first range is the one that
            cannot be used, or not to its end.
        end: Guest address up to which that range can be used; anything up to its start is nothing.

    Preconditions:
        - `rest` has a range, and it does not end before `end`.

    Source: gVisor mm.truncatedAddrRangeSeq.
    """
    return ars.take_first(ars.n_bytes - rest.n_bytes + max(end - rest.head.start, 0))


def _pack(ranges: Iterable[AddrRange]) -> bytes:
    # One number of 128 bits a range, x86's byte order: faster than struct, and nothing to import.
    return b"".join(
        [
            (min(ar.start, ADDRESS_LIMIT - 1) | (ar.end - ar.start) << 64).to_bytes(16, "little")
            for ar in ranges
        ]
    )
