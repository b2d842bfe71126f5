"""From samples to statements, as `crossover.statistics` makes them of copies.

A figure is a cost in ns: per round the geometric mean of its two measurements (A/A), then medians
of processes, their mean, and an interval by the cluster bootstrap. A comparison is a paired log
ratio of two figures of the same round. It is *told* (above or below what it is compared with) only
where

- its distance is more than twice the half width of the wider A/A pair, or of what is usual,
- Student's t rejects equality after Holm's correction over all comparisons of the sweep,
- there are processes enough, few rounds were lost, and no A/A pair differs from itself.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.extras import need
from kvmmm.bench.crossover.record import ResultsError
from kvmmm.bench.crossover.resample import Bootstrap, Centre, Spread, centre_of, spreads_of
from kvmmm.bench.crossover.statistics import FAMILY_WISE, FEWEST_PROCESSES, REPLICATES, holm
from kvmmm.bench.crossover.student import two_sided_p
from kvmmm.bench.economics.asked import Key, Question, questions_of
from kvmmm.bench.economics.plan import NAMES, PARTS, again
from kvmmm.bench.economics.verdicts import (
    ABOVE,
    BELOW,
    UNTOLD,
    Comparison,
    Economics,
    Figure,
    Noise,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kvmmm.bench.crossover.record import Results

    Floats = NDArray[np.float64]
    Logs = dict[int, dict[int, float]]
    """Logarithms by process and round."""

_LEVEL = FAMILY_WISE / 2
_DISTRUST = 0.001
_LOST_MOST = 0.1


class _Measured(NamedTuple):
    # A figure before intervals.
    key: Key
    logs: Logs
    centre: Centre
    twins: Centre
    lost: float


def analyse(results: Results, *, seed: int = 0, replicates: int = REPLICATES) -> Economics:
    """Say what may be said about a sweep.

    Args:
        results: It.
        seed: Of the resampling.
        replicates: How many.

    Raises:
        MissingExtraError: numpy is not installed.
        ResultsError: These are results of something else.
    """
    need("numpy", what="the analysis of a sweep")
    if any(cell.order not in PARTS for cell in results.cells.values()):
        raise ResultsError(results.header.mode, 0, "no results of first touches and exits")
    measured = _measured(results)
    spreads = dict(zip(measured, _spreads(list(measured.values())), strict=True))
    floors, noise = _noise(measured)
    n_processes = max((len(m.logs) for m in measured.values()), default=0)
    bootstrap = Bootstrap(seed, replicates, max(n_processes, 1))
    figures = {
        key: _figure(results, m, spreads[key], floors[key], bootstrap)
        for key, m in measured.items()
    }
    comparisons = _comparisons(measured, floors, bootstrap, trusted=noise.trusted)
    n_rounds = max((m.centre.n_rounds for m in measured.values()), default=0)
    return Economics(noise, figures, comparisons, n_processes, n_rounds)


def _measured(results: Results) -> dict[Key, _Measured]:
    logs: dict[Key, tuple[Logs, Logs]] = {}
    seen: dict[Key, int] = {}
    for sample in results.samples:
        cell = results.cells[sample.cell]
        for name, ns in sample.ns.items():
            if name not in NAMES or (twin := sample.ns.get(again(name))) is None:
                continue
            key = Key(cell.order, cell.layout, cell.operation, cell.bytes, name)
            seen[key] = seen.get(key, 0) + 1
            if ns <= 0 or twin <= 0:
                continue
            for one, value in zip(
                logs.setdefault(key, ({}, {})),
                (math.log(ns * twin) / 2, math.log(twin / ns)),
                strict=True,
            ):
                one.setdefault(sample.process, {})[sample.round] = value
    return {
        key: _Measured(
            key, both, _centre(both), _centre(twins),
            1 - sum(map(len, both.values())) / seen[key],
        )
        for key, (both, twins) in sorted(logs.items())
    }  # fmt: skip


def _arrays(logs: Logs) -> list[Floats]:
    import numpy as np

    return [np.asarray(list(logs[process].values())) for process in sorted(logs)]


def _centre(logs: Logs) -> Centre:
    return centre_of(_arrays(logs))


def _spreads(measured: Sequence[_Measured]) -> list[Spread]:
    # Figures of one name are measured alike.
    return spreads_of([m.centre for m in measured], [m.key.name for m in measured])


def _noise(measured: Mapping[Key, _Measured]) -> tuple[dict[Key, float], Noise]:
    # Floors by figure, and the sweep's noise.
    keys = list(measured)
    spreads = spreads_of([measured[key].twins for key in keys], [key.name for key in keys])
    widths = {key: spread.half_width for key, spread in zip(keys, spreads, strict=True)}
    by_name: dict[str, list[float]] = {}
    for key, width in widths.items():
        by_name.setdefault(key.name, []).append(width)
    usual = {name: statistics.median(values) for name, values in by_name.items()}
    floors = {key: 2 * max(width, usual[key.name]) for key, width in widths.items()}
    tests = [(i, _p(measured[key].twins, spreads[i], 0.0)) for i, key in enumerate(keys)]
    wrong = [
        i for i in holm(tests, level=_DISTRUST)
        if abs(measured[keys[i]].twins.value) > floors[keys[i]]
    ]  # fmt: skip
    return floors, Noise(
        _median([abs(m.twins.value) for m in measured.values()]),
        _median(list(floors.values())),
        {name: 2 * value for name, value in usual.items()},
        bool(keys) and not wrong,
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.inf


def _p(centre: Centre, spread: Spread, reference: float) -> float:
    if not spread.df:
        return 1.0
    return two_sided_p((centre.value - reference) / spread.error, spread.df)


def _interval(
    logs: Logs, centre: Centre, spread: Spread, bootstrap: Bootstrap
) -> tuple[float, float, float]:
    import numpy as np

    row = bootstrap.replicates(_arrays(logs), centre, spread)
    low, high = (float(end) for end in np.percentile(row, (2.5, 97.5)))
    return math.exp(centre.value), math.exp(low), math.exp(high)


def _figure(
    results: Results, one: _Measured, spread: Spread, floor: float, bootstrap: Bootstrap
) -> Figure:
    key = one.key
    cell = next(cell for cell in results.cells.values() if key.is_of(cell))
    ns, low, high = _interval(one.logs, one.centre, spread, bootstrap)
    return Figure(cell, key.name, ns, low, high, floor, one.lost, one.centre.n_rounds)


def _comparisons(
    measured: Mapping[Key, _Measured], floors: Mapping[Key, float], bootstrap: Bootstrap,
    *, trusted: bool,
) -> list[Comparison]:  # fmt: skip
    asked: list[tuple[Question, Logs]] = []
    for question in questions_of(measured):
        logs = _ratios(measured[question.over].logs, measured[question.under].logs)
        if logs:
            asked.append((question, logs))
    centres = [_centre(logs) for _, logs in asked]
    spreads = spreads_of(centres, [question.name for question, _ in asked])
    tests = [
        (i, _p(centres[i], spreads[i], math.log(question.reference)))
        for i, (question, _) in enumerate(asked)
    ]
    rejected = holm(tests, level=_LEVEL) if trusted else set()
    found = []
    for i, (question, logs) in enumerate(asked):
        both = (question.over, question.under)
        floor = max(floors[key] for key in both)
        distance = centres[i].value - math.log(question.reference)
        told = UNTOLD
        if (
            i in rejected and len(logs) >= FEWEST_PROCESSES and abs(distance) > floor
            and max(measured[key].lost for key in both) <= _LOST_MOST
        ):  # fmt: skip
            told = ABOVE if distance > 0 else BELOW
        interval = _interval(logs, centres[i], spreads[i], bootstrap)
        found.append(Comparison(question, *interval, floor, tests[i][1], told))
    return found


def _ratios(over: Logs, under: Logs) -> Logs:
    # Of rounds that have both.
    ratios: Logs = {}
    for process, rounds in over.items():
        common = rounds.keys() & under.get(process, {}).keys()
        if common:
            ratios[process] = {n: rounds[n] - under[process][n] for n in sorted(common)}
    return ratios
