"""Where a curve (log ratio against log size) changes its sign, and whether that may be said.

A crossover is stated only where sizes that are beyond doubt lie on both sides, the sign changes
once and stays, resampling agrees, the interval is no wider than the question, and it matters.
Everything else has its own name: parity (the sides come within 5 % and stay there), or no
threshold, and why.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PARITY = 1.05
"""Ratios below it (and above its inverse) are as good as equal."""
LEAST_REGRET = 0.05
"""Where being wrong costs less, there is nothing to decide."""
LEAST_PROBABILITY = 0.95
_FEWEST_EQUAL = 2  # one size alone does not stay
_WRONG_BY = math.log(4)
_WIDEST = math.log(16)
FEWEST_SIZES = 3
"""What a curve needs at least to have a crossover."""
_FINE = 8


class Crossover(NamedTuple):
    """One size separates the sides.

    Attributes:
        bytes: It.
        low: Lower end of its 95 % interval, bytes.
        high: The upper end.
        probability: That there is one: share of replicates whose sign changes once, this way.
        regret: Most that is lost, as a fraction, by a threshold 4 times too low or too high.
        below: Who wins below it: the variant, or "internal".
        above: Who wins above.
    """

    bytes: float
    low: float
    high: float
    probability: float
    regret: float
    below: str
    above: str


class Parity(NamedTuple):
    """One side wins at small sizes, and from `bytes` on they are within 5 %.

    Attributes:
        bytes: Smallest size measured from which the 95 % intervals stay there.
        below: Who wins below.
    """

    bytes: int
    below: str


class NoThreshold(NamedTuple):
    """There is no size to switch at; `reason` says why."""

    reason: str


Verdict = Crossover | Parity | NoThreshold


class Points(NamedTuple):
    """A curve, as arrays over its sizes in ascending order; log ratios.

    Attributes:
        sizes: Bytes.
        centre: The log ratios.
        low: Lower ends of their 95 % intervals.
        high: Upper ends.
        floor: Smallest differences that may be reported.
        signs: 1 or -1 where the sign is beyond doubt, 0 elsewhere.
        replicates: One row each.
    """

    sizes: Sequence[int]
    centre: Floats
    low: Floats
    high: Floats
    floor: Floats
    signs: Sequence[int]
    replicates: Floats


def verdict_of(points: Points, pair: tuple[str, str]) -> Verdict:
    """Judge a curve.

    Args:
        points: It.
        pair: The sides: log ratios below 0 mean that the first is faster.
    """
    if len(points.sizes) < FEWEST_SIZES:
        n = len(points.sizes)
        return NoThreshold(f"only {n} size{'s were' if n > 1 else ' was'} measured")
    doubtless = [sign for sign in points.signs if sign]
    changes = sum(a != b for a, b in itertools.pairwise(doubtless))
    if not changes:
        return _without_change(points, pair)
    if changes > 1:
        return NoThreshold(f"the winner changes {changes} times with size")
    return _crossover(points, doubtless[0], pair)


def _without_change(points: Points, pair: tuple[str, str]) -> Parity | NoThreshold:
    edge = math.log(PARITY)
    equal = [-edge < low and high < edge for low, high in zip(points.low, points.high, strict=True)]
    n_apart = max((i + 1 for i, same in enumerate(equal) if not same), default=0)
    decided = [i for i, sign in enumerate(points.signs) if sign]
    if not decided:
        if not n_apart:
            return NoThreshold("the same at every size, within 5 %")
        return NoThreshold("no difference beyond noise at any size")
    winner = _winner(points.signs[decided[0]], pair)
    if n_apart <= len(equal) - _FEWEST_EQUAL and decided[0] < n_apart:
        return Parity(points.sizes[n_apart], winner)
    margins = [math.expm1(abs(points.centre[i])) for i in decided]
    least, most = _percent(min(margins)), _percent(max(margins))
    by = f"by {least}" if least == most else f"by {least} to {most}"
    if len(decided) == len(points.sizes):
        return NoThreshold(f"{winner} wins at every size, {by}")
    return NoThreshold(
        f"{winner} wins at {len(decided)} of {len(equal)} sizes, {by}; the rest is open"
    )


def _crossover(points: Points, before: int, pair: tuple[str, str]) -> Verdict:
    import numpy as np

    x = np.log(np.asarray(points.sizes, dtype=np.float64))
    middle, bend = _places(x, points.centre[None, :], points.floor, before)
    if not len(middle):
        return NoThreshold("the sign changes to and fro between sizes that are beyond doubt")
    places, _ = _places(x, points.replicates, points.floor, before)
    probability = len(places) / len(points.replicates)
    if probability < LEAST_PROBABILITY:
        return NoThreshold(f"the sign changes once with a probability of {probability:.2f} only")
    # What lies between two sizes is not measured: how far two ways of drawing it differ counts.
    unknown = abs(float(bend[0]))
    low, high = (float(end) for end in np.percentile(places, (2.5, 97.5)))
    low, high = max(low - unknown, float(x[0])), min(high + unknown, float(x[-1]))
    at = min(max(float(middle[0]), low), high)
    if high - low > _WIDEST:
        return NoThreshold("the sign changes, but where is unknown by more than a factor of 16")
    regret = _regret(x, points.centre, at)
    if regret < LEAST_REGRET:
        return NoThreshold(f"being wrong by 4x costs at most {_percent(regret)}")
    return Crossover(
        math.exp(at), math.exp(low), math.exp(high), probability, regret,
        _winner(before, pair), _winner(-before, pair),
    )  # fmt: skip


def _places(x: Floats, rows: Floats, floor: Floats, before: int) -> tuple[Floats, Floats]:
    # Where each row goes from sign `before` to the other, for those that do so once, as log size;
    # and by how much that lies elsewhere when straight lines are drawn between the sizes. Values
    # smaller than the floor have no sign.
    import numpy as np

    n = len(x)
    signs = np.where(np.abs(rows) > floor, np.sign(rows), 0) * before
    first, second = signs > 0, signs < 0
    last_of_first = n - 1 - first[:, ::-1].argmax(axis=1)
    first_of_second = second.argmax(axis=1)
    once = first.any(axis=1) & second.any(axis=1) & (last_of_first < first_of_second)
    rows, left, right = rows[once] * before, last_of_first[once], first_of_second[once]
    straight = _place_between(x, rows, left, right)
    fine_x, fine_rows = _curved(x, rows)
    curved = _place_between(fine_x, fine_rows, left * _FINE, right * _FINE)
    return curved, curved - straight


def _place_between(
    x: Floats, rows: Floats, left: NDArray[np.intp], right: NDArray[np.intp]
) -> Floats:
    # Each row is positive at x[left] and negative at x[right]. In between it may cross zero several
    # times; the place is such that what is positive there would just fit before it.
    import numpy as np

    a, b = rows[:, :-1], rows[:, 1:]
    up, down = np.maximum(a, 0) + np.maximum(b, 0), np.maximum(-a, 0) + np.maximum(-b, 0)
    share = up / np.maximum(up + down, 1e-300)
    segment = np.arange(len(x) - 1)
    share = np.where(segment < left[:, None], 1.0, np.where(segment >= right[:, None], 0.0, share))
    return np.asarray(x[0] + (share * np.diff(x)).sum(axis=1))


def _curved(x: Floats, rows: Floats) -> tuple[Floats, Floats]:
    # Each row drawn more finely: cubic pieces, whose slope at a size is that of the parabola
    # through it and its neighbours.
    import numpy as np

    h = np.diff(x)
    chords = np.diff(rows, axis=1) / h
    slopes = np.empty_like(rows)
    slopes[:, 1:-1] = (chords[:, :-1] * h[1:] + chords[:, 1:] * h[:-1]) / (h[1:] + h[:-1])
    slopes[:, 0] = 2 * chords[:, 0] - slopes[:, 1]
    slopes[:, -1] = 2 * chords[:, -1] - slopes[:, -2]
    t = np.arange(_FINE) / _FINE
    pieces = (
        rows[:, :-1, None] * (1 + 2 * t) * (1 - t) ** 2
        + rows[:, 1:, None] * t**2 * (3 - 2 * t)
        + (h * slopes[:, :-1])[:, :, None] * t * (1 - t) ** 2
        + (h * slopes[:, 1:])[:, :, None] * t**2 * (t - 1)
    )
    fine_x = (x[:-1, None] + h[:, None] * t).ravel()
    whole = np.concatenate([pieces.reshape(len(rows), len(fine_x)), rows[:, -1:]], axis=1)
    return np.append(fine_x, x[-1]), whole


def _regret(x: Floats, centre: Floats, at: float) -> float:
    import numpy as np

    inside = x[(x > at - _WRONG_BY) & (x < at + _WRONG_BY)]
    wrong = np.concatenate([[at - _WRONG_BY, at + _WRONG_BY], inside])
    values = np.interp(np.clip(wrong, x[0], x[-1]), x, centre)
    return float(np.expm1(np.abs(values).max()))


def _winner(sign: int, pair: tuple[str, str]) -> str:
    return pair[1] if sign > 0 else pair[0]


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.2g} %" if fraction < 0.995 else f"{fraction + 1:.3g}x"
