"""What is measured, written as cells of the crossover's results' file.

    part       order      layout            operation    bytes
    faults     faults     the way           write, read  the window
    memslots   memslots   how many there    write        the window
    exits      exits      the kind of exit  exit         1

The other fields of a cell say the same everywhere. A cell's samples hold ns by name:

    page        a page, all pages of some windows touched in order, faults and all
    beforehand  the same, the windows mapped by the host first, that included
    fault       one page touched in each window: what it costs over the same with all windows there
    map         a window mapped by the host beforehand
    exit        from exit to exit under kvmmm, with the least handler; floor: under a loop in C
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.plan import Plan
from kvmmm.bench.crossover.record import Cell
from kvmmm.bench.fault_answer import SLOT_COUNTS, WAYS, WINDOWS
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FAULTS, MEMSLOTS, EXITS = "faults", "memslots", "exits"
PARTS = (FAULTS, MEMSLOTS, EXITS)
READ, WRITE, EXIT = "read", "write", "exit"
PAGE, BEFOREHAND, FAULT, MAP, FLOOR = "page", "beforehand", "fault", "map", "floor"
NAMES = (PAGE, BEFOREHAND, FAULT, MAP, EXIT, FLOOR)
COUNT_WINDOWS = (PAGE_BYTES, HUGE_PAGE_BYTES)
"""Windows of the faults among memslots."""
SUBJECTS: dict[str, Sequence[str]] = {"faults": PARTS, "exits": (EXITS,)}
"""By the benchmark's name: what a sweep of it measures."""

# Of three minutes, and of one, the rest is for the host's facts, the analysis and the report.
_SECONDS = {"default": 160.0, "quick": 48.0}
_ROUNDS = 60


def again(name: str) -> str:
    """Return the name of the same measured once more (A/A)."""
    return f"{name}2"


def plan_of(subject: str, *, quick: bool) -> Plan:
    """Return the plan of a sweep.

    Args:
        subject: One of SUBJECTS.
        quick: Within a minute: fewer rounds.
    """
    found = [cell for part in SUBJECTS[subject] for cell in _CELLS[part]()]
    cells = [cell._replace(id=f"c{number}") for number, cell in enumerate(found)]
    mode = f"{subject}-quick" if quick else subject
    return Plan(mode, cells, _SECONDS["quick" if quick else "default"], _ROUNDS)


def _cell(part: str, of: str, access: str, window_bytes: int) -> Cell:
    return Cell("", access, window_bytes, of, part, "hot", "warm", PAGE_BYTES, "python")


def _fault_cells() -> Iterator[Cell]:
    for way in WAYS:
        for access in (WRITE, READ):
            for window in WINDOWS:
                yield _cell(FAULTS, way, access, window)


def _memslot_cells() -> Iterator[Cell]:
    for count in SLOT_COUNTS:
        for window in COUNT_WINDOWS:
            yield _cell(MEMSLOTS, str(count), WRITE, window)


def _exit_cells() -> Iterator[Cell]:
    from kvmmm.bench.exit_kinds import ALL_NAMES

    for name in ALL_NAMES:
        yield _cell(EXITS, name, EXIT, 1)


_CELLS = {FAULTS: _fault_cells, MEMSLOTS: _memslot_cells, EXITS: _exit_cells}
