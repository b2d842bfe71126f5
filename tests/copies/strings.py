"""Strings that end with a NUL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ
from tests.copies.draw import LIMIT
from tests.copies.memory import Outcome, known_bytes
from tests.copies.operations import Operation, attempt, done_of, same
from tests.model.memory import PAGE
from tests.model.model import Fault

if TYPE_CHECKING:
    from kvmmm.mm import MemoryManager
    from tests.copies.draw import Draw
    from tests.copies.operations import Arguments, Ranges
    from tests.model.model import Space


class ReadString(Operation):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        max_bytes = d.pick((0, 1, 2, 10, 63, 64, 65, 300, 4095, 4096, 4097, 20_000, LIMIT >> 1))
        return {"addr": d.address(who, d.pick((1, 8, 64, 100))), "max_bytes": max_bytes}

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, max_bytes: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.read_string(addr, max_bytes, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, addr: int, max_bytes: int) -> Ranges:
        # Up to the first NUL, the first byte that cannot be read, or the last that is asked for.
        limit = model.n_pages * PAGE
        n = max(min(max_bytes, limit - addr), 0)
        fault = model.reach(addr, n, READ, ignore=ignore)
        if fault is None and n < max_bytes:
            fault = Fault(max(addr, limit), n, mapped=False)
        n = done_of(fault, n)
        known = known_bytes(model, addr, n, until=b"\0")
        if known is None:
            return []
        length = known.find(0)
        if length >= 0:
            same(outcome, known[:length], None, READ)
        elif fault is not None:
            same(outcome, None, fault, READ)
        else:
            assert outcome.error == ("StringTooLongError", addr, known), "too long"
        return []
