"""The cluster bootstrap: processes first, then rounds, and how wide five processes let it be.

    rounds of a cell ──log(variant / internal)──► a median for each process ──mean──► centre
    replicate: draw processes (the same for all cells: what a process does to one cell it does to
    its neighbours), for each draw rounds, again medians, their mean

The bootstrap has the right shape, and is too narrow: with P processes it is short by P / (P - 1),
and knows nothing of Student's t. So replicates are stretched about their centre until they spread
as the processes do: by the variance over processes, where cells that are measured alike share what
they know (`student.shared_variance`; never less than the cell's own), and by t for 95 %. Half of
them are mirrored at the centre: of skewness so few processes know nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.student import quantile, shared_variance

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_TABLE = 4096
_LEAST_VARIANCE = 1e-12
_LEAST_CELLS = 6


class Centre(NamedTuple):
    """What one cell's log ratios say, before any interval.

    Attributes:
        medians: Of each process, over its rounds.
        value: Their mean.
        variance: Over processes; 0 with one.
        n_rounds: Of all processes.
    """

    medians: tuple[float, ...]
    value: float
    variance: float
    n_rounds: int


class Spread(NamedTuple):
    """How sure a centre is.

    Attributes:
        error: Its standard error.
        df: Degrees of freedom behind that; 0 with one process: nothing is known.
    """

    error: float
    df: float

    @property
    def half_width(self) -> float:
        """Half of a 95 % interval."""
        return self.error * quantile(0.05, self.df) if self.df else math.inf


def centre_of(processes: Sequence[Floats]) -> Centre:
    """Return the centre of log ratios, one array of rounds for each process."""
    import numpy as np

    medians = tuple(float(np.median(rounds)) for rounds in processes)
    value = sum(medians) / len(medians)
    squares = sum((median - value) ** 2 for median in medians)
    n_rounds = sum(len(rounds) for rounds in processes)
    return Centre(medians, value, squares / max(len(medians) - 1, 1), n_rounds)


def spreads_of(centres: Sequence[Centre], groups: Sequence[object]) -> list[Spread]:
    """Return the spread of each centre; those of one group are measured alike.

    A group of few cells shares with all the others.
    """
    members: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    large = {g: m for g, m in members.items() if len(m) >= _LEAST_CELLS}
    rest = [i for g, m in members.items() if g not in large for i in m]
    spreads = [Spread(math.inf, 0)] * len(centres)
    for indexes in [*large.values(), rest]:
        pool = indexes if len(indexes) >= _LEAST_CELLS else list(range(len(centres)))
        known = [centres[i] for i in pool if len(centres[i].medians) > 1]
        if not known:
            continue
        df = sum(len(c.medians) - 1 for c in known) / len(known)
        common, weight = shared_variance([max(c.variance, _LEAST_VARIANCE) for c in known], df)
        # What a process does to one cell it may do to all of them: together they may know no more
        # than one. So they count for at most as much as the cell itself.
        weight = min(weight, df)
        for i in indexes:
            spreads[i] = _spread(centres[i], common, weight)
    return spreads


def _spread(centre: Centre, common: float, weight: float) -> Spread:
    n, own = len(centre.medians), max(centre.variance, _LEAST_VARIANCE)
    if n < 2:
        return Spread(math.inf, 0)
    shrunk = (weight * common + (n - 1) * own) / (weight + n - 1)
    return Spread(math.sqrt(max(shrunk, own) / n), weight + n - 1)


class Bootstrap:
    """Draws replicates.

    Args:
        seed: The same seed, the same draws.
        n: How many replicates.
        n_processes: Most processes that a cell has.
    """

    def __init__(self, seed: int, n: int, n_processes: int) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._n = n
        self._draws = self._random.random((n, n_processes))
        self._sides = self._random.choice((-1.0, 1.0), n)
        self._tables: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def replicates(self, processes: Sequence[Floats], centre: Centre, spread: Spread) -> Floats:
        """Return replicates of a centre, stretched to what the spread allows for 95 %."""
        import numpy as np

        deviations = self._raw(processes)
        deviations = (deviations - np.median(deviations)) * self._sides
        if not spread.df:
            return np.asarray(centre.value + deviations)
        low, high = np.percentile(deviations, (2.5, 97.5))
        seen = float(high - low) / 2
        stretch = spread.half_width / seen if seen else 0.0
        return np.asarray(centre.value + deviations * stretch)

    def _raw(self, processes: Sequence[Floats]) -> Floats:
        import numpy as np

        n = len(processes)
        chosen = (self._draws[:, :n] * n).astype(np.int64)
        medians = np.empty(chosen.shape)
        for process, rounds in enumerate(processes):
            here = chosen == process
            ordered = np.sort(rounds)
            low, high = self._middle(len(ordered))
            which = self._random.integers(0, _TABLE, int(here.sum()))
            medians[here] = (ordered[low[which]] + ordered[high[which]]) / 2
        return np.asarray(medians.mean(axis=1))

    def _middle(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # Where the median of n values drawn from n lies among them: the same whatever the values.
        import numpy as np

        if n not in self._tables:
            drawn = np.sort(self._random.integers(0, n, (_TABLE, n)), axis=1)
            self._tables[n] = (drawn[:, (n - 1) // 2], drawn[:, n // 2])
        return self._tables[n]
