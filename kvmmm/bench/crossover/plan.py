"""Which cells a sweep measures, and how long it may take.

A plan is a list of cells and a budget. Every round measures every cell once, but large ones
more seldom; rounds go on until there are enough, or the time is over.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.geometry import WORD_BYTES, most_bytes
from kvmmm.bench.crossover.record import Cell
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

QUICK, DEFAULT, FULL, SELF_CHECK = "quick", "default", "full", "self-check"
MODES = (QUICK, DEFAULT, FULL, SELF_CHECK)

WORDS = ("swap", "cas")
RANGES = ("copy_in", "copy_out", "zero_out", "copy_out_from", "copy_in_to")
WARM, MIRROR_COLD, LINEAR_COLD, COLD, ABSENT = (
    "warm", "mirror-cold", "linear-cold", "cold", "absent",
)  # fmt: skip
HOT, SPREAD = "hot", "spread"
C, PYTHON = "c", "python"
ONE, TEN, THOUSAND = ("1", "contiguous"), ("10", "contiguous"), ("1000", "contiguous")
PAGES_1000, PAGES_60000 = ("1000", "scattered"), ("60000", "scattered")
SHORT_60000 = ("60000", "contiguous")  # a page each, the last one first
ALL_LAYOUTS = (ONE, TEN, THOUSAND, SHORT_60000, ("10", "scattered"), PAGES_1000, PAGES_60000)

USUAL_PROCESSES = 5
KIB, MIB = 1 << 10, 1 << 20
GVISOR_BYTES = (512, 32 * KIB)
"""Where gVisor switches: vectored copies, and others. Every list of sizes has them."""

# A cell that takes longer a round is measured in every second round, every third, ...
_CELL_NS = 4_000_000
_EVERY_MOST = 5
_MIRRORED_MOST_BYTES = 2 << 20
_MANY = (PAGES_60000, SHORT_60000)
_NS_PER_BYTE = 1.0  # four variants, each with its warm-up, at 8 GB/s
_COLD_NS_PER_BYTE = 6.0  # page faults, and their undoing
# A cell's round, verification and all: ns, and ns a byte; cold and warm. Before anything is timed.
_TAKES = ((0.6e6, 8.0), (0.8e6, 2.7))
_START_S = 3.0


def sizes(first: int, last: int, factor: int) -> list[int]:
    """Return log-spaced sizes, with those of gVisor among them where they are in range."""
    found = {bytes_ for bytes_ in GVISOR_BYTES if first <= bytes_ <= last}
    while first < last:
        found.add(first)
        first *= factor
    return sorted(found | {last})


class Plan(NamedTuple):
    """What a sweep is to do.

    Attributes:
        mode: One of MODES.
        cells: In the order of their ids.
        seconds: All of it, starting processes included; None, as long as it takes.
        rounds: How many each process makes at most.
        n_processes: How many, one after the other.
    """

    mode: str
    cells: Sequence[Cell]
    seconds: float | None
    rounds: int
    n_processes: int = USUAL_PROCESSES


class _Block(NamedTuple):
    # A product of dimensions.
    operations: Sequence[str]
    sizes: Sequence[int]
    layouts: Sequence[tuple[str, str]]
    residency: Sequence[str] = (WARM,)
    locality: Sequence[str] = (HOT, SPREAD)
    callers: Sequence[str] = (C,)


_COLD_STATES = (MIRROR_COLD, LINEAR_COLD, COLD)
_WORD = (WORD_BYTES,)

_QUICK_SIZES = sizes(8, 2 * MIB, 8)
_QUICK = (
    _Block(("copy_in", "copy_out"), _QUICK_SIZES, (ONE, THOUSAND, PAGES_60000)),
    _Block(
        ("copy_in", "copy_out"), _QUICK_SIZES, (ONE, THOUSAND, PAGES_1000), _COLD_STATES, (SPREAD,)
    ),
    _Block(("copy_out_from", "copy_in_to", "zero_out"), sizes(8, 256 * KIB, 8), (ONE,), (WARM,),
           (HOT,)),
    _Block(WORDS, _WORD, (ONE, PAGES_60000)),
    _Block(RANGES[:2], sizes(8, 256 * KIB, 8), (THOUSAND,), (WARM,), (HOT,), (PYTHON,)),
    _Block(RANGES[:2], sizes(64, 256 * KIB, 8), (ONE,), (ABSENT,), (SPREAD,), (PYTHON,)),
)  # fmt: skip

_DEFAULT_SIZES = sizes(8, 8 * MIB, 4)
_DEFAULT = (
    _Block(RANGES[:3], _DEFAULT_SIZES, (ONE, TEN, THOUSAND, PAGES_1000, PAGES_60000)),
    _Block(("copy_in", "copy_out"), (64 * MIB,), (ONE, PAGES_60000), (WARM,), (SPREAD,)),
    _Block(RANGES[3:], _DEFAULT_SIZES, (ONE, PAGES_60000)),
    _Block(WORDS, _WORD, (ONE, TEN, THOUSAND, PAGES_1000, PAGES_60000), (WARM, *_COLD_STATES)),
    _Block(RANGES[:3], _DEFAULT_SIZES, (ONE, THOUSAND, PAGES_60000), _COLD_STATES, (SPREAD,)),
    _Block(RANGES[3:], sizes(8, 512 * KIB, 4), (ONE,), _COLD_STATES, (SPREAD,)),
    _Block(RANGES[:2], sizes(8, 2 * MIB, 4), (ONE, THOUSAND, PAGES_60000), (WARM,), (HOT, SPREAD),
           (PYTHON,)),
    _Block(RANGES[2:], sizes(8, 512 * KIB, 4), (ONE,), (WARM,), (HOT,), (PYTHON,)),
    _Block(WORDS, _WORD, (ONE, PAGES_60000), (WARM,), (HOT, SPREAD), (PYTHON,)),
    _Block(RANGES[:2], sizes(8, 512 * KIB, 4), (ONE, THOUSAND), _COLD_STATES, (SPREAD,), (PYTHON,)),
    _Block(RANGES[:3], sizes(8, 2 * MIB, 4), (ONE,), (ABSENT,), (SPREAD,), (PYTHON,)),
)  # fmt: skip

_FULL_SIZES = sizes(8, 64 * MIB, 2)
_FULL = (
    _Block(RANGES, _FULL_SIZES, ALL_LAYOUTS, (WARM, *_COLD_STATES), (HOT, SPREAD), (C, PYTHON)),
    _Block(WORDS, _WORD, ALL_LAYOUTS, (WARM, *_COLD_STATES), (HOT, SPREAD), (C, PYTHON)),
    _Block((*RANGES, *WORDS), (WORD_BYTES, *sizes(8, 16 * MIB, 2)), (ONE,), (ABSENT,), (SPREAD,),
           (PYTHON,)),
)  # fmt: skip

_HUGE = {
    QUICK: _Block(("copy_in", "copy_out"), _QUICK_SIZES, (TEN,)),
    DEFAULT: _Block(RANGES[:2], _DEFAULT_SIZES, (ONE, TEN), (WARM, *_COLD_STATES), (SPREAD,)),
    FULL: _Block(RANGES, _FULL_SIZES, (ONE, TEN, THOUSAND), (WARM, *_COLD_STATES), (HOT, SPREAD),
                 (C, PYTHON)),
}  # fmt: skip

_SELF_CHECK = (_Block(("copy_in",), sizes(8, 256 * KIB, 2), (ONE,), (WARM,), (HOT,)),)

_BLOCKS = {QUICK: _QUICK, DEFAULT: _DEFAULT, FULL: _FULL, SELF_CHECK: _SELF_CHECK}
# What is left of 60 s, and of 10 minutes, is for the analysis and the report.
_SECONDS = {QUICK: 48.0, DEFAULT: 520.0, FULL: None, SELF_CHECK: 22.0}
_ROUNDS = {QUICK: 41, DEFAULT: 26, FULL: 41, SELF_CHECK: 41}
# How much processes differ is the more surely known the more there are: with eight, and as many
# rounds in all, more of what lies beyond the noise may be said than with five.
_PROCESSES = {QUICK: USUAL_PROCESSES, DEFAULT: 8, FULL: USUAL_PROCESSES}


def plan_of(mode: str, *, huge_pages: bool = False) -> Plan:
    """Return the plan of a mode.

    Args:
        mode: One of MODES.
        huge_pages: Whether the host gives 2 MiB pages to shared memory: they are measured, too.
    """
    blocks = [(block, PAGE_BYTES) for block in _BLOCKS[mode]]
    if huge_pages and mode in _HUGE:
        blocks.append((_HUGE[mode], HUGE_PAGE_BYTES))
    found = dict.fromkeys(itertools.chain(*(_cells_of(block, page) for block, page in blocks)))
    cells = [cell._replace(id=f"c{number}") for number, cell in enumerate(found)]
    return Plan(mode, cells, _SECONDS[mode], _ROUNDS[mode], _PROCESSES.get(mode, USUAL_PROCESSES))


def _cells_of(block: _Block, page_bytes: int) -> Iterator[Cell]:
    for operation, bytes_, layout, residency, locality, caller in itertools.product(
        block.operations, block.sizes, block.layouts, block.residency, block.locality, block.callers
    ):
        if (operation in WORDS) != (bytes_ == WORD_BYTES):
            continue
        if bytes_ > most_bytes(*layout, page_bytes):
            continue
        # What is made cold was somewhere else before: nothing of it is in a cache.
        if residency != WARM and locality == HOT:
            continue
        # Each page that is mirrored anew is a VMA, and a full mirror has most of what there are.
        is_mirror_cold = residency in {MIRROR_COLD, COLD}
        if is_mirror_cold and layout in _MANY and bytes_ > _MIRRORED_MOST_BYTES:
            continue
        yield Cell("", operation, bytes_, *layout, locality, residency, page_bytes, caller)


def parts_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return cells by who measures them: each part has processes of its own.

    A process has not VMAs enough for the full mirrors of two layouts with a segment a page.
    """
    parts: dict[bool, list[Cell]] = {}
    for cell in cells:
        parts.setdefault((cell.layout, cell.order) == SHORT_60000, []).append(cell)
    return list(parts.values())


def estimate_s(plan: Plan) -> float:
    """Return about how long a plan takes, by what cells took elsewhere; at most its budget."""
    a_process = plan.rounds * sum(_cell_s(cell) / every(cell) for cell in plan.cells)
    seconds = plan.n_processes * (a_process + _START_S * len(parts_of(plan.cells)))
    return seconds if plan.seconds is None else min(seconds, plan.seconds)


def _cell_s(cell: Cell) -> float:
    round_ns, per_byte = _TAKES[cell.residency == WARM]
    return (round_ns + per_byte * cell.bytes) / 1e9


def every(cell: Cell) -> int:
    """Return in which rounds a cell is measured: every one, every second, ..."""
    per_byte = _NS_PER_BYTE if cell.residency == WARM else _COLD_NS_PER_BYTE
    return min(int(cell.bytes * per_byte / _CELL_NS) + 1, _EVERY_MOST)


def due(cells: Iterable[Cell], number: int) -> list[Cell]:
    """Return the cells that round `number` measures; the large ones take turns."""
    return [cell for cell in cells if (number + int(cell.id[1:])) % every(cell) == 0]
