"""Words: swap, compare and swap, load; refused outside, then unaligned, then as any access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ, READ_WRITE
from tests.copies.memory import Outcome, facts_of, kept_bytes, known_bytes, outside, reach, write
from tests.copies.operations import Operation, attempt
from tests.model.memory import PAGE

if TYPE_CHECKING:
    from kvmmm.mm import MemoryManager
    from tests.copies.draw import Draw
    from tests.copies.operations import Arguments, Ranges
    from tests.model.model import Space

WORD = 4


class Word(Operation):
    """What the three have in common: refused outside, unaligned, then as any access."""

    @staticmethod
    def draw_addr(d: Draw, who: int) -> int:
        addr = d.address(who, WORD)
        return addr if d.chance(0.15) else addr & ~(WORD - 1)

    @staticmethod
    def refusal(model: Space, ignore: bool, addr: int, access: int) -> tuple[object, ...] | None:
        fault = outside(model, [(addr, WORD)])
        if fault is None and addr % WORD:
            return "GuestAlignmentError", addr, 0, True, access
        fault = fault or model.reach(addr, WORD, access, ignore=ignore)
        return None if fault is None else facts_of(fault, access)

    @staticmethod
    def saw(model: Space, addr: int, outcome: Outcome) -> None:
        assert outcome.error is None, "no error"
        assert isinstance(outcome.value, int)
        assert model.sees(addr, outcome.value.to_bytes(WORD, "little")), "another word"


class Swap(Word):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"addr": Word.draw_addr(d, who), "new": d.rng.getrandbits(32)}

    @staticmethod
    def prepare(model: Space, arguments: Arguments) -> None:
        _keep_out_of_tails(model, arguments)

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, new: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.swap_uint32(addr, new, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, addr: int, new: int) -> Ranges:
        refusal = Word.refusal(model, ignore, addr, READ_WRITE)
        if refusal is not None:
            assert outcome.error == refusal, f"{refusal}"
            return []
        Word.saw(model, addr, outcome)
        return write(model, [(addr, WORD)], new.to_bytes(WORD, "little"))


class CompareAndSwap(Word):
    weight = 4

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        addr = Word.draw_addr(d, who)
        model = d.world.model(who)
        old = d.rng.getrandbits(32)
        if d.chance(0.6) and reach(model, [(addr, WORD)], READ, ignore=True) is None:
            known = known_bytes(model, addr, WORD)
            old = int.from_bytes(known, "little") if known is not None else old
        return {"addr": addr, "old": old, "new": d.rng.getrandbits(32)}

    @staticmethod
    def prepare(model: Space, arguments: Arguments) -> None:
        _keep_out_of_tails(model, arguments)

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int, old: int, new: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.compare_and_swap_uint32(addr, old, new, **how)))

    @staticmethod
    def check(
        model: Space, ignore: bool, outcome: Outcome, addr: int, old: int, new: int
    ) -> Ranges:
        refusal = Word.refusal(model, ignore, addr, READ_WRITE)
        if refusal is not None:
            assert outcome.error == refusal, f"{refusal}"
            return []
        Word.saw(model, addr, outcome)
        # A page that is shared until it is written is a copy from now on, whatever was there.
        word = outcome.value if outcome.value != old else new
        assert isinstance(word, int)
        return write(model, [(addr, WORD)], word.to_bytes(WORD, "little"))


class Load(Word):
    weight = 3

    @staticmethod
    def draw(d: Draw, who: int) -> Arguments:
        return {"addr": Word.draw_addr(d, who)}

    @staticmethod
    def perform(mm: MemoryManager, how: Arguments, addr: int) -> Outcome:
        return Outcome(*attempt(lambda: mm.load_uint32(addr, **how)))

    @staticmethod
    def check(model: Space, ignore: bool, outcome: Outcome, addr: int) -> Ranges:
        refusal = Word.refusal(model, ignore, addr, READ)
        if refusal is not None:
            assert outcome.error == refusal, f"{refusal}"
        else:
            Word.saw(model, addr, outcome)
        return []


def _keep_out_of_tails(model: Space, arguments: Arguments) -> None:
    # To the beginning of its page, or, should the file have a byte or two there, out of the way.
    for addr in (arguments["addr"] & -PAGE, model.n_pages * PAGE):
        if kept_bytes(model, arguments["addr"], WORD) < WORD:
            arguments["addr"] = addr
