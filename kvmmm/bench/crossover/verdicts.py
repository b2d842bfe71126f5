"""What may be said about a sweep, as data: noise, cells, curves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.record import DIMS, INTERNAL, INTERNAL_AGAIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.bench.crossover.crossing import Verdict
    from kvmmm.bench.crossover.record import Cell
    from kvmmm.bench.crossover.thresholds import Judgement

Pair = tuple[str, str]
"""Whose time is divided by whose."""
AA: Pair = (INTERNAL_AGAIN, INTERNAL)


class Noise(NamedTuple):
    """What the same side, measured twice, differs by; logarithms, about fractions.

    Attributes:
        difference: Median over cells of the size of the log ratio.
        half_width: Median over cells of half the 95 % interval.
        smallest: Median over cells of the smallest difference that is reported.
        smallest_of: The same by residency and locality.
        trusted: False where the A/A pair itself differs, beyond doubt, by more than the floor.
    """

    difference: float
    half_width: float
    smallest: float
    smallest_of: Mapping[tuple[str, str], float]
    trusted: bool


class CellVerdict(NamedTuple):
    """What one cell says about one pair.

    Attributes:
        cell: See `record.Cell`.
        pair: (variant, "internal").
        ratio: Time of the first ÷ time of the second.
        low: Lower end of its 95 % interval.
        high: The upper end.
        winner: Who is faster, where that may be said; else None.
        floor: Smallest log ratio that is reported here.
        p: That so large a ratio comes by chance, in this cell alone; 1 with one process.
        n_processes: Behind it.
        n_rounds: Of all processes.
        error: Standard error of the log ratio.
        df: Degrees of freedom behind that; 0 with one process.
    """

    cell: Cell
    pair: Pair
    ratio: float
    low: float
    high: float
    winner: str | None
    floor: float
    p: float
    n_processes: int
    n_rounds: int
    error: float = math.inf
    df: float = 0.0


class Curve(NamedTuple):
    """One pair over all sizes.

    Attributes:
        dims: The other dimensions, in the order of `record.DIMS`.
        pair: (variant, "internal").
        points: In ascending order of size.
        verdict: See `crossing.py`.
    """

    dims: tuple[str | int, ...]
    pair: Pair
    points: Sequence[CellVerdict]
    verdict: Verdict

    def dim(self, name: str) -> str | int:
        """Return one dimension by its name."""
        return self.dims[DIMS.index(name)]


class Analysis(NamedTuple):
    """All that a sweep says.

    Attributes:
        noise: Of the A/A pairs.
        cells: One for each cell and pair.
        curves: Of these.
        thresholds: gVisor's, judged on the curves that they are for.
        n_processes: Most that a cell has.
        n_dropped: Times that were not positive, so that they have no logarithm.
    """

    noise: Noise
    cells: Sequence[CellVerdict]
    curves: Sequence[Curve]
    thresholds: Sequence[Judgement]
    n_processes: int
    n_dropped: int
