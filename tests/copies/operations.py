"""Copies: how each is drawn, done, and what it must have come to.

An operation has four functions: `draw` its arguments, `prepare` them for a memory (they may have
been drawn for another), `perform` it on a memory manager, `check` the outcome against the model,
which then knows what was written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError, HostBufferError, StringTooLongError
from kvmmm.hostarch.access import READ, WRITE
from tests.copies.draw import pattern
from tests.copies.memory import (
    Outcome,
    facts_of,
    kept_bytes,
    reach,
    sees,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm import MemoryManager
    from tests.copies.draw import Draw
    from tests.model.model import Fault, Space

    Arguments = dict[str, Any]
    Ranges = list[tuple[int, int]]

FILLER = 0xEE
GUARD = bytes(range(0xA0, 0xB0))


def attempt(call: Callable[[], object]) -> tuple[object, tuple[object, ...] | None]:
    """What a call returned, or the facts of its error."""
    try:
        return call(), None
    except GuestFaultError as e:
        return None, (type(e).__name__, e.addr, e.done, e.mapped, e.access)
    except HostBufferError as e:
        return None, (type(e).__name__, e.offset, e.done)
    except StringTooLongError as e:
        return None, (type(e).__name__, e.addr, e.prefix)
    except Exception as e:  # noqa: BLE001 - none of these may come; it is told which
        return None, (type(e).__name__, str(e))


class Destination:
    """A writable buffer, by itself or as a part of a larger one, whose rest must stay as it is."""

    def __init__(self, n_bytes: int, *, inside: bool) -> None:
        filler = bytes((FILLER,)) * n_bytes
        if inside:
            self._whole = bytearray(GUARD + filler + GUARD)
            self.buffer: bytearray | memoryview = memoryview(self._whole)[16 : 16 + n_bytes]
        else:
            self.buffer = self._whole = bytearray(filler)

    def content(self) -> bytes:
        return bytes(self._whole)


def expected_buffer(data: bytes, n_bytes: int, *, inside: bool) -> bytes:
    guard = GUARD if inside else b""
    return guard + data + bytes((FILLER,)) * (n_bytes - len(data)) + guard


def same(outcome: Outcome, value: object, fault: Fault | None, access: int) -> None:
    """It must have returned `value`, or failed so."""
    if fault is not None:
        assert outcome.error == facts_of(fault, access), f"{fault!r}"
    else:
        assert outcome.error is None, f"no error, {value!r}"
        assert outcome.value == value, f"{value!r}"


def done_of(fault: Fault | None, n_bytes: int) -> int:
    return n_bytes if fault is None else fault.done


class Operation:
    """What all have in common. Attributes: `weight`, how often it comes."""

    weight = 1

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        raise NotImplementedError

    @staticmethod
    def prepare(model: Space, arguments: Arguments) -> None:
        """Change what cannot be said in advance."""

    @staticmethod
    def may_differ(
        first: Outcome, other: Outcome, model: Space, ignore: bool, **_arguments: Any
    ) -> bool:
        """Whether two outcomes that are not the same are still no disagreement."""
        del first, other, model, ignore
        return False


def one_range(d: Draw, who: int) -> Arguments:
    n = d.size()
    return {"addr": d.address(who, n), "n": n}


def clip(model: Space, arguments: Arguments) -> None:
    arguments["n"] = kept_bytes(model, arguments["addr"], arguments["n"])


class BytesIn(Operation):
    weight = 8

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {**one_range(d, who), "inside": d.chance(0.3)}

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, n: int, inside: bool) -> Outcome:
        dst = Destination(n, inside=inside)
        value, error = attempt(lambda: mm.copy_in(addr, dst.buffer, **how))
        return Outcome(value, error, dst.content())

    @staticmethod
    def check(
        model: Space, ignore: bool, outcome: Outcome, addr: int, n: int, inside: bool
    ) -> Ranges:
        fault = reach(model, [(addr, n)], READ, ignore=ignore)
        same(outcome, n, fault, READ)
        start = len(GUARD) if inside else 0
        data = outcome.buffer[start : start + done_of(fault, n)]
        assert outcome.buffer == expected_buffer(data, n, inside=inside), "the rest untouched"
        assert sees(model, [(addr, n)], data), "other bytes"
        return []


class Read(Operation):
    weight = 5

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        arguments = one_range(d, who)
        if d.chance(0.01):
            # More than there are addresses: refused before anybody asks for so much memory.
            arguments["n"] = d.pick((d.world.backend.max_addr + 1, 1 << 62, (1 << 63) - 1))
        return arguments

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, n: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.read(addr, n, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, addr: int, n: int) -> Ranges:
        fault = reach(model, [(addr, n)], READ, ignore=ignore)
        same(outcome, outcome.value, fault, READ)
        if fault is None:
            assert isinstance(outcome.value, bytes)
            assert len(outcome.value) == n, f"{n} bytes"
            assert sees(model, [(addr, n)], outcome.value), "other bytes"
        return []


class BytesOut(Operation):
    weight = 8

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {**one_range(d, who), "seed": d.seed(), "kind": d.upto(2)}

    prepare = staticmethod(clip)

    @staticmethod
    def perform(
        mm: MemoryManager, how: Arguments, addr: int, n: int, seed: int, kind: int
    ) -> Outcome:
        data = pattern(seed, n)
        src = (data, bytearray(data), memoryview(GUARD + data)[len(GUARD) :])[kind]
        value, error = attempt(lambda: mm.copy_out(addr, src, **how))
        return Outcome(value, error, b"" if bytes(src) == data else b"the source changed")

    @staticmethod
    def check(
        model: Space, ignore: bool, outcome: Outcome, addr: int, n: int, seed: int, kind: int
    ) -> Ranges:
        del kind
        fault = reach(model, [(addr, n)], WRITE, ignore=ignore)
        same(outcome, n, fault, WRITE)
        assert not outcome.buffer
        return write(model, [(addr, n)], pattern(seed, done_of(fault, n)))


class ZeroOut(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        arguments = one_range(d, who)
        if d.chance(0.03):
            limit = d.world.backend.max_addr
            arguments["n"] = d.pick((limit, limit - arguments["addr"], 1 << 62, (1 << 63) - 1))
        return {**arguments, "n": max(arguments["n"], 0)}

    prepare = staticmethod(clip)

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, n: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.zero_out(addr, n, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, addr: int, n: int) -> Ranges:
        fault = reach(model, [(addr, n)], WRITE, ignore=ignore)
        same(outcome, n, fault, WRITE)
        return write(model, [(addr, n)], bytes(done_of(fault, n)))
