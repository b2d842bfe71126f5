"""Copies of several ranges at once: vectors, and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from tests.copies.draw import LIMIT, pattern
from tests.copies.memory import Outcome, facts_of, kept_bytes, reach, sees, write
from tests.copies.operations import (
    GUARD,
    Destination,
    Operation,
    attempt,
    done_of,
    expected_buffer,
    same,
)

if TYPE_CHECKING:
    from kvmmm.mm import MemoryManager
    from tests.copies.draw import Draw
    from tests.copies.operations import Arguments, Ranges
    from tests.model.model import Space

MAX_RANGES = 7


def some_ranges(d: Draw, who: int) -> Ranges:
    """Ranges in any order, side by side or not, overlapping or not, some of them empty."""
    ranges: Ranges = []
    n_ranges = 16 if d.chance(0.03) else d.upto(MAX_RANGES)
    for _ in range(n_ranges):
        n = (
            0
            if d.chance(0.15)
            else d.size()
            if d.chance(0.3)
            else d.pick((1, 4, 8, 16, 64, 64, 300))
        )
        addr = d.address(who, n)
        if ranges and d.chance(0.25):
            addr = sum(ranges[-1])
        if addr < LIMIT:
            ranges.append((addr, min(n, LIMIT - addr)))
    return ranges


def sequence(ranges: Ranges) -> AddrRangeSeq:
    return AddrRangeSeq(AddrRange(addr, addr + n) for addr, n in ranges)


def total_of(ranges: Ranges) -> int:
    return sum(n for _, n in ranges)


def clip_all(model: Space, arguments: Arguments) -> None:
    arguments["ranges"] = [(a, kept_bytes(model, a, n)) for a, n in arguments["ranges"]]


class CopyInVec(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"ranges": some_ranges(d, who), "inside": d.chance(0.3)}

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, ranges: Ranges, inside: bool) -> Outcome:
        dst = Destination(total_of(ranges), inside=inside)
        value, error = attempt(lambda: mm.copy_in_vec(sequence(ranges), dst.buffer, **how))
        return Outcome(value, error, dst.content())

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, ranges: Ranges, inside: bool) -> Ranges:
        n = total_of(ranges)
        fault = reach(model, ranges, READ, ignore=ignore)
        same(outcome, n, fault, READ)
        start = len(GUARD) if inside else 0
        data = outcome.buffer[start : start + done_of(fault, n)]
        assert outcome.buffer == expected_buffer(data, n, inside=inside), "the rest untouched"
        assert sees(model, ranges, data), "other bytes"
        return []


class CopyOutVec(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"ranges": some_ranges(d, who), "seed": d.seed()}

    prepare = staticmethod(clip_all)

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, ranges: Ranges, seed: int) -> Outcome:
        src = long_pattern(seed, total_of(ranges))
        return Outcome(*attempt(lambda: mm.copy_out_vec(sequence(ranges), src, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, ranges: Ranges, seed: int) -> Ranges:
        n = total_of(ranges)
        fault = reach(model, ranges, WRITE, ignore=ignore)
        same(outcome, n, fault, WRITE)
        return write(model, ranges, long_pattern(seed, n)[: done_of(fault, n)])


def long_pattern(seed: int, n_bytes: int) -> bytes:
    found = pattern(seed, n_bytes)
    return found if len(found) == n_bytes else (found * (n_bytes // len(found) + 1))[:n_bytes]


# ---- batches: one copy after the other, each checked when it is its turn ----


def attempt_batch(call: Any) -> tuple[object, tuple[object, ...] | None]:
    """As `attempt`; which one of them failed is a fact of it."""
    items = []

    def noting() -> object:
        try:
            return call()
        except GuestFaultError as e:
            items.append(e.item)  # type: ignore[attr-defined]
            raise

    value, error = attempt(noting)
    return value, error if error is None else (*error, *items)


def first_failing(
    model: Space, ranges: Ranges, access: int, *, ignore: bool
) -> tuple[int, tuple[object, ...] | None]:
    """(bytes done of all together, facts of the first one that fails)."""
    done = 0
    for i, one in enumerate(ranges):
        fault = reach(model, [one], access, ignore=ignore)
        if fault is not None:
            fault.done += done
            return fault.done, (*facts_of(fault, access), i)
        done += one[1]
    return done, None


class CopyInMany(Operation):
    weight = 2

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"ranges": some_ranges(d, who)}

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, ranges: Ranges) -> Outcome:
        value, error = attempt_batch(lambda: mm.copy_in_many(list(ranges), **how))
        return Outcome(value, error)

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, ranges: Ranges) -> Ranges:
        _, facts = first_failing(model, ranges, READ, ignore=ignore)
        assert outcome.error == facts, f"{facts}"
        if facts is None:
            assert isinstance(outcome.value, list)
            assert [len(data) for data in outcome.value] == [n for _, n in ranges], "all of them"
            assert all(
                model.sees(a, data) for (a, _), data in zip(ranges, outcome.value, strict=True)
            ), "other bytes"
        return []


class CopyOutMany(Operation):
    weight = 2

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"ranges": some_ranges(d, who), "seed": d.seed()}

    prepare = staticmethod(clip_all)

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, ranges: Ranges, seed: int) -> Outcome:
        items = [(a, pattern(seed + i, n)) for i, (a, n) in enumerate(ranges)]
        value, error = attempt_batch(lambda: mm.copy_out_many(items, **how))
        return Outcome(value, error)

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, ranges: Ranges, seed: int) -> Ranges:
        done, facts = first_failing(model, ranges, WRITE, ignore=ignore)
        assert outcome.error == facts, f"{facts}"
        assert facts is not None or outcome.value == done, f"{done}"
        data = b"".join(pattern(seed + i, n) for i, (_, n) in enumerate(ranges))
        return write(model, ranges, data[:done])
