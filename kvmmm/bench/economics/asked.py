"""What is compared with what: the questions that a sweep answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.economics.plan import (
    EXIT,
    EXITS,
    FAULT,
    FAULTS,
    FLOOR,
    MAP,
    MEMSLOTS,
    PAGE,
    READ,
    WRITE,
)
from kvmmm.bench.fault_answer import PF, SLOT_COUNTS, WAYS, WINDOWS
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from kvmmm.bench.crossover.record import Cell

BREAK_EVEN, SHARE, IN_ORDER, WAY, COUNT, OVER_C = (
    "break-even", "share", "in order", "way", "memslots", "over C",
)  # fmt: skip
FEW = 2.0
"""A window that pays from the second touched page on needs no guess about the program."""
REFERENCE_WAY = PF
QUESTIONS = {
    BREAK_EVEN: "a fault of the window ÷ a fault of 4 KiB",
    SHARE: "mapping the window beforehand ÷ a fault of it",
    IN_ORDER: "a page, all touched in order ÷ the same with windows of 2 MiB",
    WAY: "a fault by this way ÷ a #PF, same window",
    COUNT: "a fault with so many memslots there ÷ with the fewest",
    OVER_C: "an exit ÷ the same under a loop in C",
}
"""By name: what is divided by what."""


class Key(NamedTuple):
    """Which figure: see `plan`."""

    part: str
    subject: str
    access: str
    window: int
    name: str

    def is_of(self, cell: Cell) -> bool:
        """Return whether a cell has it."""
        return self[:4] == (cell.order, cell.layout, cell.operation, cell.bytes)


class Question(NamedTuple):
    """One comparison.

    Attributes:
        name: One of QUESTIONS.
        over: A figure.
        under: What it is divided by.
        reference: What their ratio is compared with.
    """

    name: str
    over: Key
    under: Key
    reference: float = 1.0


def questions_of(figures: Collection[Key]) -> list[Question]:
    """Return what may be asked of figures that were measured."""
    asked = [*_of_windows(), *_of_ways(), *_of_counts(), *_of_exits(figures)]
    return [one for one in asked if one.over in figures and one.under in figures]


def _of_windows() -> Iterator[Question]:
    for way in WAYS:
        for access in (WRITE, READ):

            def key(window: int, name: str, way: str = way, access: str = access) -> Key:
                return Key(FAULTS, way, access, window, name)

            for window in WINDOWS:
                yield Question(SHARE, key(window, MAP), key(window, FAULT))
                if window != PAGE_BYTES:
                    for reference in (1.0, FEW):
                        over, under = key(window, FAULT), key(PAGE_BYTES, FAULT)
                        yield Question(BREAK_EVEN, over, under, reference)
                if window != HUGE_PAGE_BYTES:
                    yield Question(IN_ORDER, key(window, PAGE), key(HUGE_PAGE_BYTES, PAGE))


def _of_ways() -> Iterator[Question]:
    for way in WAYS:
        for access in (WRITE, READ):
            for window in WINDOWS:
                if way != REFERENCE_WAY:
                    under = Key(FAULTS, REFERENCE_WAY, access, window, FAULT)
                    yield Question(WAY, under._replace(subject=way), under)


def _of_counts() -> Iterator[Question]:
    fewest, *more = map(str, SLOT_COUNTS)
    for count in more:
        for window in WINDOWS:
            under = Key(MEMSLOTS, fewest, WRITE, window, FAULT)
            yield Question(COUNT, under._replace(subject=count), under)


def _of_exits(figures: Collection[Key]) -> Iterator[Question]:
    for key in figures:
        if key.part == EXITS and key.name == EXIT:
            yield Question(OVER_C, key, key._replace(name=FLOOR))
