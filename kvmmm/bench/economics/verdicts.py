"""What may be said about a sweep, as data: figures, comparisons, noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.statistics import FEWEST_PROCESSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.bench.crossover.record import Cell
    from kvmmm.bench.economics.asked import Key, Question

BELOW, UNTOLD, ABOVE = -1, 0, 1


class Figure(NamedTuple):
    """What something costs.

    Attributes:
        cell: Of what; see `plan`.
        name: PAGE, BEFOREHAND, FAULT, MAP, EXIT or FLOOR.
        ns: It.
        low: Lower end of its 95 % interval.
        high: The upper end.
        floor: Smallest log ratio that is told of it.
        lost: Share of its rounds that were not positive: a difference within the noise.
        n_rounds: Of all processes.
    """

    cell: Cell
    name: str
    ns: float
    low: float
    high: float
    floor: float
    lost: float
    n_rounds: int


class Comparison(NamedTuple):
    """One figure over another.

    Attributes:
        question: See there.
        ratio: The first ÷ the second.
        low: Lower end of its 95 % interval.
        high: The upper end.
        floor: Smallest log distance from the reference that is told.
        p: That so large a distance comes by chance, in this comparison alone.
        told: BELOW or ABOVE the reference, or UNTOLD.
    """

    question: Question
    ratio: float
    low: float
    high: float
    floor: float
    p: float
    told: int


class Noise(NamedTuple):
    """What the same, measured twice, differs by; logarithms, about fractions.

    Attributes:
        difference: Median over figures of the size of the log ratio.
        smallest: Median over figures of the smallest difference that is told.
        smallest_of: The same by the figure's name.
        trusted: False where an A/A pair differs, beyond doubt, by more than its floor.
    """

    difference: float
    smallest: float
    smallest_of: Mapping[str, float]
    trusted: bool


class Economics(NamedTuple):
    """All that a sweep says.

    Attributes:
        noise: Of the A/A pairs.
        figures: By (part, subject, access, window, name).
        comparisons: Of those.
        n_processes: Most that a cell has.
        n_rounds: Most that a cell has, of all processes.
    """

    noise: Noise
    figures: Mapping[Key, Figure]
    comparisons: Sequence[Comparison]
    n_processes: int
    n_rounds: int

    @property
    def refusal(self) -> str:
        """Why nothing may be told; empty where something may."""
        if not self.figures:
            return "nothing was measured."
        if self.n_processes < FEWEST_PROCESSES:
            return f"{self.n_processes} processes do not show how much processes differ; 5 do."
        if math.isinf(self.noise.smallest):
            return "nothing was measured twice (A/A), so it is not known what is noise."
        if not self.noise.trusted:
            return (
                "the same, measured twice, differs beyond doubt: something disturbed the sweep. "
                "Measure again on a quiet host."
            )
        return ""

    def of(self, question: str, over: Key, reference: float = 1.0) -> Comparison | None:
        """Return the comparison of that name whose first figure it is."""
        for one in self.comparisons:
            asked = one.question
            if (asked.name, asked.over, asked.reference) == (question, over, reference):
                return one
        return None
