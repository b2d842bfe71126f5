"""Readers and Writers for tests of vectored copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.safemem.block import BlockSeq


def seq(*pairs: tuple[int, int]) -> AddrRangeSeq:
    """Ranges (start, end)."""
    return AddrRangeSeq(AddrRange(*pair) for pair in pairs)


class Source:
    """A Reader of bytes.

    Attributes:
        calls: How much room each call had.
        before: Called first, inside of `read_to_blocks`.
    """

    def __init__(self, data: bytes, before: Callable[[], object] = lambda: None) -> None:
        self.data = data
        self.calls: list[int] = []
        self.before = before

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        self.calls.append(dsts.n_bytes)
        self.before()
        n_bytes = dsts.copy_from(self.data)
        self.data = self.data[n_bytes:]
        return n_bytes


class Sink:
    """A Writer that takes no more than so many bytes.

    Attributes:
        data: What it took.
        calls: How much each call offered.
        before: Called first, inside of `write_from_blocks`.
    """

    def __init__(self, room: int = 1 << 40, before: Callable[[], object] = lambda: None) -> None:
        self.room = room
        self.data = b""
        self.calls: list[int] = []
        self.before = before

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        self.calls.append(srcs.n_bytes)
        self.before()
        taken = bytes(srcs.take_first(self.room))
        self.room -= len(taken)
        self.data += taken
        return len(taken)
