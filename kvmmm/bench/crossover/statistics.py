"""From samples to statements: noise, the winner of each cell, what each curve says.

A ratio is time of a variant ÷ time of internal mappings: below 1 the variant wins. Per round, the
logarithm of a ratio of times that were measured side by side; how these become an interval is told
in `resample.py`. What may be *said* is less than what an interval shows:

- Noise. The same side is measured twice in every round (A/A). Twice the half width of its interval,
  the cell's own or what is usual for its residency and locality, is the smallest difference that
  is reported (`floor`).
- Family-wise control. A winner is named only where Student's t rejects equality after Holm's
  correction over all cells and pairs of the sweep: in a sweep without any difference, a winner is
  named anywhere with a probability of at most 1 %. Crossovers need a winner on both sides.
- Too few processes (3), no claims. An A/A pair that differs, and the sweep is not to be trusted.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.crossing import (
    Crossover,
    NoThreshold,
    Parity,
    Points,
    Verdict,
    verdict_of,
)
from kvmmm.bench.crossover.extras import need
from kvmmm.bench.crossover.record import INTERNAL
from kvmmm.bench.crossover.resample import Bootstrap, Centre, Spread, centre_of, spreads_of
from kvmmm.bench.crossover.student import two_sided_p
from kvmmm.bench.crossover.thresholds import judge
from kvmmm.bench.crossover.verdicts import AA, Analysis, CellVerdict, Curve, Noise, Pair

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kvmmm.bench.crossover.record import Cell, Results

    Floats = NDArray[np.float64]

__all__ = [
    "Analysis", "CellVerdict", "Crossover", "Curve", "NoThreshold", "Noise", "Parity", "Verdict",
    "analyse", "holm",
]  # fmt: skip

FAMILY_WISE = 0.01
"""Probability that a sweep without any difference names a winner anywhere."""
_LEVEL = FAMILY_WISE / 2
# Cells that differ in how noisy they are cost up to as much again (simulated, with five processes).
FEWEST_PROCESSES = 3
_DISTRUST = 0.001  # an A/A pair that differs with so small a probability spoils the sweep
REPLICATES = 2000


class _Measured(NamedTuple):
    # One pair in one cell.
    cell: Cell
    pair: Pair
    processes: list[Floats]
    centre: Centre


def analyse(results: Results, *, seed: int = 0, replicates: int = REPLICATES) -> Analysis:
    """Say what may be said about a sweep.

    Args:
        results: It.
        seed: Of the resampling.
        replicates: How many.

    Raises:
        MissingExtraError: numpy is not installed.
    """
    need("numpy", what="the analysis of a sweep")
    measured, n_dropped = _measured(results)
    return _analyse(measured, n_dropped, seed, replicates)


def _analyse(measured: Sequence[_Measured], n_dropped: int, seed: int, replicates: int) -> Analysis:
    n_processes = max((len(m.processes) for m in measured), default=1)
    spreads = _spreads(measured)
    floors, noise = _noise(measured, spreads)
    claims = [i for i, m in enumerate(measured) if m.pair != AA]
    rejected = holm([(i, _p(measured[i].centre, spreads[i])) for i in claims], level=_LEVEL)
    bootstrap = Bootstrap(seed, replicates, n_processes)
    rows: dict[int, Floats] = {}
    cells: list[CellVerdict] = []
    for i in claims:
        one = measured[i]
        rows[len(cells)] = bootstrap.replicates(one.processes, one.centre, spreads[i])
        floor = floors[one.cell.id]
        sure = i in rejected and len(one.processes) >= FEWEST_PROCESSES and noise.trusted
        cells.append(_cell_verdict(one, spreads[i], rows[len(cells)], floor, sure=sure))
    curves = _curves(cells, rows)
    thresholds = [j for curve in curves if (j := judge(curve)) is not None]
    return Analysis(noise, cells, curves, thresholds, n_processes, n_dropped)


def _measured(results: Results) -> tuple[list[_Measured], int]:
    import numpy as np

    logs: dict[tuple[str, str], dict[int, list[float]]] = {}
    n_dropped = 0
    for sample in results.samples:
        internal = sample.ns.get(INTERNAL, 0)
        for variant, ns in sample.ns.items():
            if variant == INTERNAL:
                n_dropped += internal <= 0
            elif ns <= 0:
                n_dropped += 1
            elif internal > 0:
                of_process = logs.setdefault((sample.cell, variant), {})
                of_process.setdefault(sample.process, []).append(math.log(ns / internal))
    measured = []
    place = {cell_id: i for i, cell_id in enumerate(results.cells)}
    for cell_id, variant in sorted(logs, key=lambda key: (place[key[0]], key[1])):
        by_process, cell = logs[cell_id, variant], results.cells[cell_id]
        processes = [np.asarray(by_process[p]) for p in sorted(by_process)]
        measured.append(_Measured(cell, (variant, INTERNAL), processes, centre_of(processes)))
    return measured, n_dropped


def _spreads(measured: Sequence[_Measured]) -> list[Spread]:
    # Pairs do not share: what walks page tables may vary more than what does not.
    spreads: dict[int, Spread] = {}
    for pair in {m.pair for m in measured}:
        indexes = [i for i, m in enumerate(measured) if m.pair == pair]
        centres = [measured[i].centre for i in indexes]
        groups = [_alike(measured[i].cell) for i in indexes]
        spreads |= zip(indexes, spreads_of(centres, groups), strict=True)
    return [spreads[i] for i in range(len(measured))]


def _alike(cell: Cell) -> tuple[str, str]:
    return cell.residency, cell.locality


def _noise(
    measured: Sequence[_Measured], spreads: Sequence[Spread]
) -> tuple[dict[str, float], Noise]:
    # The floor of every cell, by id, and the sweep's noise. Without A/A nothing is reported.
    aa = [i for i, m in enumerate(measured) if m.pair == AA]
    widths = {measured[i].cell.id: spreads[i].half_width for i in aa}
    groups: dict[tuple[str, str], list[float]] = {}
    for i in aa:
        groups.setdefault(_alike(measured[i].cell), []).append(spreads[i].half_width)
    usual = {group: statistics.median(values) for group, values in groups.items()}
    floors = {}
    for m in measured:
        typical = usual.get(_alike(m.cell), math.inf)
        floors[m.cell.id] = 2 * max(widths.get(m.cell.id, typical), typical)
    rejected = holm([(i, _p(measured[i].centre, spreads[i])) for i in aa], level=_DISTRUST)
    wrong = [i for i in rejected if abs(measured[i].centre.value) > floors[measured[i].cell.id]]
    return floors, Noise(
        _median([abs(measured[i].centre.value) for i in aa]),
        _median(list(widths.values())),
        _median([floors[measured[i].cell.id] for i in aa]),
        {group: 2 * value for group, value in usual.items()},
        bool(aa) and not wrong,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.inf


def _p(centre: Centre, spread: Spread) -> float:
    return two_sided_p(centre.value / spread.error, spread.df) if spread.df else 1.0


def holm(tests: Sequence[tuple[int, float]], *, level: float = FAMILY_WISE) -> set[int]:
    """Return which of (index, p) are rejected: a true one at all with `level` at most."""
    rejected = set()
    for rank, (i, p) in enumerate(sorted(tests, key=lambda test: test[1])):
        if p > level / (len(tests) - rank):
            break
        rejected.add(i)
    return rejected


def _cell_verdict(
    one: _Measured, spread: Spread, row: Floats, floor: float, *, sure: bool
) -> CellVerdict:
    import numpy as np

    low, high = (float(end) for end in np.percentile(row, (2.5, 97.5)))
    value = one.centre.value
    winner = None
    if sure and abs(value) > floor:
        winner = one.pair[0] if value < 0 else one.pair[1]
    return CellVerdict(
        one.cell, one.pair, math.exp(value), math.exp(low), math.exp(high), winner, floor,
        _p(one.centre, spread), len(one.processes), one.centre.n_rounds, *spread,
    )  # fmt: skip


def _curves(cells: Sequence[CellVerdict], rows: Mapping[int, Floats]) -> list[Curve]:
    members: dict[tuple[object, ...], list[int]] = {}
    for i, verdict in enumerate(cells):
        members.setdefault((*verdict.cell.dims, verdict.pair), []).append(i)
    curves = []
    for indexes in members.values():
        indexes.sort(key=lambda i: cells[i].cell.bytes)
        points = [cells[i] for i in indexes]
        first, arrays = points[0], _as_arrays(points, [rows[i] for i in indexes])
        said = verdict_of(arrays, first.pair)
        curves.append(Curve(first.cell.dims, first.pair, points, said))
    return curves


def _as_arrays(points: Sequence[CellVerdict], rows: Sequence[Floats]) -> Points:
    import numpy as np

    signs = [0 if p.winner is None else (-1 if p.winner == p.pair[0] else 1) for p in points]
    return Points(
        [p.cell.bytes for p in points],
        np.log([p.ratio for p in points]),
        np.log([p.low for p in points]),
        np.log([p.high for p in points]),
        np.asarray([p.floor for p in points]),
        signs,
        np.stack(rows, axis=1),
    )
