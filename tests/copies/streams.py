"""Copies from a Reader and to a Writer, who may have less, take less, or refuse.

What goes through a buffer on the way (the address space, few bytes) has read its source before it
finds out that the destination cannot be written. So there a source may have lost bytes that are
nowhere, and an error of its own may come first. And where a file was cut short and nobody was told,
it is found out only by touching it: not where a source ends, or a sink, exactly before. Nothing
else may differ: `test_differences` says it by name.

Source: gVisor mm.CopyOutFrom, the comments on ASIO.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.safemem.block import BlockFaultError
from tests.copies.memory import Outcome, facts_of, outside, reach, sees, write
from tests.copies.operations import FILLER, Operation, attempt, done_of
from tests.copies.vectors import clip_all, long_pattern, sequence, some_ranges, total_of

if TYPE_CHECKING:
    from kvmmm.mm import MemoryManager
    from kvmmm.safemem.block import BlockSeq
    from tests.copies.draw import Draw
    from tests.copies.operations import Arguments, Ranges
    from tests.model.model import Space

READER, BUFFER, FILE, BROKEN = range(4)


class RefusalError(Exception):
    """What a Reader or Writer raises by itself."""


class Source:
    """A Reader that has only so many bytes now."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def read_to_blocks(self, dsts: BlockSeq) -> int:
        start = self.position
        try:
            self.position += dsts.copy_from(self.data, start)
        except BlockFaultError as error:
            self.position += error.done
            raise
        return self.position - start


class Sink:
    """A Writer that takes only so many bytes now."""

    def __init__(self, room_bytes: int) -> None:
        self.data = bytearray(bytes((FILLER,)) * room_bytes)

    def write_from_blocks(self, srcs: BlockSeq) -> int:
        return srcs.copy_to(self.data)


class Broken:
    """A Reader and Writer that refuses."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def read_to_blocks(self, blocks: BlockSeq) -> int:
        assert blocks.n_bytes
        raise RefusalError

    write_from_blocks = read_to_blocks


REFUSED = ("RefusalError", "")


def draw_amount(d: Draw, who: int, ranges: Ranges, access: int) -> int:
    """How much somebody has or takes: enough, less, or exactly what can be accessed."""
    n = total_of(ranges)
    choice = d.rng.random()
    if choice < 0.6:
        return n
    if choice < 0.7:
        return done_of(reach(d.world.model(who), ranges, access, ignore=False), n)
    return n + 10 if choice < 0.8 else d.upto(n)


class CopyOutFrom(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        ranges = some_ranges(d, who)
        kind = d.pick((READER, READER, READER, BUFFER, FILE, BROKEN))
        n_there = draw_amount(d, who, ranges, WRITE)
        return {"ranges": ranges, "kind": kind, "n_there": n_there, "seed": d.seed()}

    prepare = staticmethod(clip_all)

    @staticmethod
    def perform(
        mm: MemoryManager, how: Arguments, ranges: Ranges, kind: int, n_there: int, seed: int
    ) -> Outcome:
        data = long_pattern(seed, n_there)
        src: Any = (Source, bytes, io.BytesIO, Broken)[kind](data)
        value, error = attempt(lambda: mm.copy_out_from(sequence(ranges), src, **how))
        consumed = src.position if kind == READER else src.tell() if kind == FILE else None
        return Outcome(value, error, consumed=consumed)

    @staticmethod
    def may_differ(
        first: Outcome, other: Outcome, model: Space, ignore: bool, ranges: Ranges, kind: int,
        n_there: int, seed: int,
    ) -> bool:  # fmt: skip
        """See the module."""
        del seed
        allowed = allowed_outcomes(model, ranges, WRITE, kind, n_there, ignore=ignore)
        return all(is_allowed(one, allowed, n_there, ranges) for one in (first, other))

    @staticmethod
    def check(
        model: Space, ignore: bool, outcome: Outcome, ranges: Ranges, kind: int, n_there: int,
        seed: int,
    ) -> Ranges:  # fmt: skip
        allowed = allowed_outcomes(model, ranges, WRITE, kind, n_there, ignore=ignore)
        assert is_allowed(outcome, allowed, n_there, ranges), f"{allowed}"
        done = moved(outcome)
        return write(model, ranges, long_pattern(seed, n_there)[:done])


class CopyInTo(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        ranges = some_ranges(d, who)
        kind = d.pick((READER, READER, READER, BUFFER, FILE, BROKEN))
        return {"ranges": ranges, "kind": kind, "n_room": draw_amount(d, who, ranges, READ)}

    @staticmethod
    def perform(
        mm: MemoryManager, how: Arguments, ranges: Ranges, kind: int, n_room: int
    ) -> Outcome:
        if kind in (READER, BUFFER):
            sink = Sink(n_room)
            dst: Any = sink if kind == READER else sink.data
            value, error = attempt(lambda: mm.copy_in_to(sequence(ranges), dst, **how))
            return Outcome(value, error, bytes(sink.data))
        dst = io.BytesIO() if kind == FILE else Broken()
        value, error = attempt(lambda: mm.copy_in_to(sequence(ranges), dst, **how))
        return Outcome(value, error, dst.getvalue() if kind == FILE else b"")

    @staticmethod
    def may_differ(
        first: Outcome, other: Outcome, model: Space, ignore: bool, ranges: Ranges, kind: int,
        n_room: int,
    ) -> bool:  # fmt: skip
        """See the module."""
        amount = total_of(ranges) if kind == FILE else n_room
        allowed = allowed_outcomes(model, ranges, READ, kind, amount, ignore=ignore)
        return first.buffer == other.buffer and all(
            is_allowed(one, allowed, amount, ranges) for one in (first, other)
        )

    @staticmethod
    def check(
        model: Space, ignore: bool, outcome: Outcome, ranges: Ranges, kind: int, n_room: int
    ) -> Ranges:
        amount = total_of(ranges) if kind == FILE else n_room
        allowed = allowed_outcomes(model, ranges, READ, kind, amount, ignore=ignore)
        assert is_allowed(outcome, allowed, amount, ranges), f"{allowed}"
        done = moved(outcome)
        data = outcome.buffer[:done]
        rest = b"" if kind in (FILE, BROKEN) else bytes((FILLER,)) * (n_room - done)
        assert outcome.buffer == data + rest, "the rest untouched"
        assert sees(model, ranges, data), "other bytes"
        return []


def moved(outcome: Outcome) -> int:
    """Bytes that it says it has moved."""
    if outcome.error is None:
        assert isinstance(outcome.value, int)
        return outcome.value
    done = outcome.error[2] if outcome.error != REFUSED else 0
    assert isinstance(done, int)
    return done


def allowed_outcomes(
    model: Space, ranges: Ranges, access: int, kind: int, amount: int, *, ignore: bool
) -> list[tuple[object, tuple[object, ...] | None]]:
    """(value, error) of all that it may come to."""
    n = total_of(ranges)
    fault = reach(model, ranges, access, ignore=ignore)
    if fault is None:
        done = min(amount, n)
        return [(None, REFUSED)] if kind == BROKEN and n else [(done, None)]
    stopped = [(None, facts_of(fault, access))]
    if outside(model, ranges) is not None:
        return stopped
    is_untold = fault.kind is GuestBusError
    if kind == BROKEN:
        # It is asked where there is a place, and before that is known.
        is_asked = is_untold or access == WRITE
        refused = (None, REFUSED)
        return [refused] if fault.done else [*stopped, refused] if is_asked else stopped
    if amount < fault.done:
        return [(amount, None)]
    return [*stopped, (amount, None)] if is_untold and amount == fault.done else stopped


def is_allowed(
    outcome: Outcome, allowed: list[tuple[object, tuple[object, ...] | None]], amount: int,
    ranges: Ranges,
) -> bool:  # fmt: skip
    if (outcome.value, outcome.error) not in allowed:
        return False
    most = min(amount, total_of(ranges))
    return outcome.consumed is None or moved(outcome) <= outcome.consumed <= most
