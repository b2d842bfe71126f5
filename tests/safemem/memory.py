"""Host memory to make blocks of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.safemem.block import Block, BlockSeq
from kvmmm.safemem.ffi import address_of, ffi
from kvmmm.safemem.loan import Loan

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE = 4096


class Memory:
    """Pieces of memory, each its own bytearray, with room around that must not change.

    Keep it: a sequence of its blocks does not.
    """

    ROOM = 8

    def __init__(self, parts: Iterable[bytes], *, may_fault: Iterable[bool] = ()) -> None:
        room = b"\xa5" * self.ROOM
        self.parts = [bytearray(room + part + room) for part in parts]
        faulting = [*may_fault] or [False] * len(self.parts)
        self._held = [ffi.from_buffer(part) for part in self.parts]
        self.blocks = [
            Block(address_of(held) + self.ROOM, len(part) - 2 * self.ROOM, may_fault=fault)
            for held, part, fault in zip(self._held, self.parts, faulting, strict=True)
        ]

    def seq(self, *, writable: bool = True) -> BlockSeq:
        """All of it."""
        return BlockSeq(self.blocks, Loan(writable=writable))

    def bytes(self) -> bytes:
        """What is in it."""
        room = b"\xa5" * self.ROOM
        for part in self.parts:
            assert part.startswith(room)
            assert part.endswith(room)
        return b"".join(bytes(part[self.ROOM : -self.ROOM]) for part in self.parts)
