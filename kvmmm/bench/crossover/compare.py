"""`kvmmm bench compare`: runs of several hosts or commits side by side; what differs beyond noise.

The first run is what the others are compared with. Two ratios of one cell and pair differ where

- their 95 % intervals do not meet, and
- they lie further apart than both runs' A/A noise together, and
- Welch's t rejects equality after Holm's correction over all that is compared: in two runs without
  any difference, one is named anywhere with a probability of about 1 % (`statistics.FAMILY_WISE`).

Ratios only. Times of different runs were never taken side by side, so nothing is claimed of them.
Whether two runs of one host agree is another question: `agreement.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.agreement import CLEARLY, agreement_of
from kvmmm.bench.crossover.record import read_results
from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.statistics import FEWEST_PROCESSES, analyse, holm
from kvmmm.bench.crossover.student import two_sided_p
from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.verdicts import Analysis, CellVerdict, Curve

TEXT_NAME, PAGE_NAME = "compare.txt", "compare.html"
Key = tuple[str, ...]


class CompareError(KvmmmError, ValueError):
    """These folders cannot be compared; the message says why."""


class Run:
    """One folder, analysed.

    Attributes:
        name: What it is called here: the folder's name, longer where two have the same.
        results: What was measured.
        analysis: What follows from it.
        cells: Verdicts by dimensions, bytes and pair.
        curves: By dimensions and pair.
    """

    __slots__ = ("analysis", "cells", "curves", "name", "results")

    def __init__(self, name: str, results: Results, analysis: Analysis) -> None:
        self.name = name
        self.results = results
        self.analysis = analysis
        self.cells: dict[Key, CellVerdict] = {
            (*words.dims_of(one.cell), str(one.cell.bytes), one.pair[0]): one
            for one in analysis.cells
        }
        self.curves: dict[Key, Curve] = {
            (*words.dims_of(one.points[0].cell), one.pair[0]): one for one in analysis.curves
        }


class Difference(NamedTuple):
    """One cell and pair in two runs.

    Attributes:
        key: Dimensions, bytes, pair.
        first: In the first run.
        other: In the other.
        factor: The other's ratio ÷ the first's.
    """

    key: Key
    first: CellVerdict
    other: CellVerdict
    factor: float


class Comparison(NamedTuple):
    """A run beside the first.

    Attributes:
        first: The first run.
        other: The other.
        n_common: Cells and pairs that both measured.
        differing: What differs beyond noise, the largest first.
        contradicting: What is clearly won by different sides.
        doubts: Why nothing is claimed, if so.
    """

    first: Run
    other: Run
    n_common: int
    differing: list[Difference]
    contradicting: list[Difference]
    doubts: list[str]


class Compared(NamedTuple):
    """What a comparison says.

    Attributes:
        text: Lines to show.
        agree: Whether each of the runs agrees with the first.
    """

    text: str
    agree: bool


def main(folders: Sequence[Path], out: Path | None = None) -> Compared:
    """Compare runs; write compare.txt and compare.html into `out`, unless it is None.

    Args:
        folders: Of two runs or more; the first is what the others are compared with.
        out: A folder; made where there is none.

    Raises:
        CompareError: There are fewer than two, or they have no cell in common.
        ResultsError: Results are malformed.
        MissingExtraError: numpy is not installed.
        OSError: Something cannot be read or written.
    """
    from kvmmm.bench.crossover.report.compare_text import lines_of

    runs = read_runs(folders)
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    text = "\n".join(lines_of(runs, comparisons)) + "\n"
    if out is not None:
        from kvmmm.bench.crossover.report.compare_page import compare_page

        out.mkdir(parents=True, exist_ok=True)
        (out / TEXT_NAME).write_text(text, encoding="utf-8")
        (out / PAGE_NAME).write_text(compare_page(runs, comparisons, text), encoding="utf-8")
    return Compared(text, all(agreement_of(one).holds for one in comparisons))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read and analyse folders. Raises as `main` does."""
    if len(folders) < 2:
        raise CompareError("two runs are needed at least")
    runs = []
    for name, folder in zip(_names(folders), folders, strict=True):
        results = read_results(folder)
        runs.append(Run(name, results, analyse(results, seed=results.header.seed)))
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    for n_parts in (1, 2, 3):
        names = ["/".join(folder.resolve().parts[-n_parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {folder}" for i, folder in enumerate(folders, 1)]


def compare(first: Run, other: Run) -> Comparison:
    """Say what differs between two runs beyond noise.

    Raises:
        CompareError: They have no cell in common.
    """
    common = [
        Difference(key, one, other.cells[key], other.cells[key].ratio / one.ratio)
        for key, one in first.cells.items()
        if key in other.cells
    ]
    if not common:
        raise CompareError(f"{first.name} and {other.name} have no cell in common")
    doubts = [doubt for run in (first, other) for doubt in _doubts(run)]
    rejected = holm([(i, _p(one)) for i, one in enumerate(common)])
    differing = [common[i] for i in sorted(rejected) if _apart(common[i])] if not doubts else []
    differing.sort(key=lambda one: -abs(math.log(one.factor)))
    contradicting = [one for one in common if _contradicts(one)]
    return Comparison(first, other, len(common), differing, contradicting, doubts)


def _doubts(run: Run) -> Iterator[str]:
    if run.analysis.n_processes < FEWEST_PROCESSES:
        yield f"{run.name} has fewer than {FEWEST_PROCESSES} processes"
    if not math.isfinite(run.analysis.noise.smallest):
        yield f"{run.name} has no A/A pair"
    elif not run.analysis.noise.trusted:
        yield f"the A/A pair of {run.name} differs beyond noise"


def _p(one: Difference) -> float:
    # Welch: two independent means; the fewer degrees of freedom, the more a t must be.
    a, b = one.first, one.other
    if not (a.df and b.df):
        return 1.0
    square_a, square_b = a.error**2, b.error**2
    error = math.sqrt(square_a + square_b)
    df = error**4 / (square_a**2 / a.df + square_b**2 / b.df)
    return two_sided_p(math.log(one.factor) / error, df)


def _apart(one: Difference) -> bool:
    meet = one.first.low <= one.other.high and one.other.low <= one.first.high
    noise = math.hypot(one.first.floor, one.other.floor)
    return not meet and abs(math.log(one.factor)) > noise


def _contradicts(one: Difference) -> bool:
    a, b = one.first, one.other
    if a.winner is None or b.winner is None or a.winner == b.winner:
        return False
    return all(max(x.ratio, 1 / x.ratio) > CLEARLY for x in (a, b))
