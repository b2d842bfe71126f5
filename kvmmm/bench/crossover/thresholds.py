"""What a fixed threshold costs: the address space below it, internal mappings from it on.

Judged by regret: at each size, how much slower the side is that the threshold takes than the other;
of all sizes, the worst. The lower bound counts sizes only where a winner may be named, with the end
of the interval that is kinder to the threshold.

Source: gVisor pkg/sentry/mm/io.go, `copyMapMinBytes` and `rwMapMinBytes`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.crossing import LEAST_REGRET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.verdicts import CellVerdict, Curve

COPY_MAP_MIN_BYTES = 32 << 10
RW_MAP_MIN_BYTES = 512
THRESHOLDS = {
    "copy_in": COPY_MAP_MIN_BYTES, "copy_out": COPY_MAP_MIN_BYTES, "zero_out": COPY_MAP_MIN_BYTES,
    "copy_out_from": RW_MAP_MIN_BYTES, "copy_in_to": RW_MAP_MIN_BYTES,
}  # fmt: skip
"""gVisor's thresholds, bytes, by the operations that use them."""
_ADDRESS_SPACE = ("mirror", "walk")

HARMLESS, COSTLY, UNKNOWN = "harmless", "costly", "unknown"
"""Verdicts: at most 5 % are lost at any size; more than that for sure at some; neither is sure."""


class Judgement(NamedTuple):
    """One threshold on one curve. Regrets are fractions: 0.3 is 30 % slower than need be.

    Attributes:
        bytes: The threshold.
        curve: What it is judged on.
        regret: Most that is lost at any size.
        low: At least so much is, for sure.
        high: At most so much.
        at_bytes: Size where most is lost.
        best_bytes: The best threshold between these sizes; 0: internal mappings always, inf: never.
        best_regret: What that one costs.
        verdict: HARMLESS, COSTLY or UNKNOWN.
    """

    bytes: int
    curve: Curve
    regret: float
    low: float
    high: float
    at_bytes: int
    best_bytes: float
    best_regret: float
    verdict: str


def judge(curve: Curve) -> Judgement | None:
    """Judge gVisor's threshold for a curve; None where it has none, or no size on one side."""
    threshold = THRESHOLDS.get(str(curve.dim("operation")))
    if threshold is None or curve.pair[0] not in _ADDRESS_SPACE:
        return None
    points = curve.points
    sizes = [point.cell.bytes for point in points]
    if not sizes[0] < threshold <= sizes[-1]:
        return None
    regret, at_bytes = _worst(points, threshold)
    low = max(_loss(p, p.low, p.high, threshold) if p.winner else 0.0 for p in points)
    high = max(_loss(p, p.high, p.low, threshold) for p in points)
    best_regret, best_bytes = min((_worst(points, t)[0], t) for t in (0, *sizes[1:], math.inf))
    verdict = UNKNOWN
    if high < LEAST_REGRET:
        verdict = HARMLESS
    elif low > LEAST_REGRET:
        verdict = COSTLY
    return Judgement(
        threshold, curve, regret, low, high, at_bytes, best_bytes, best_regret, verdict
    )


def _worst(points: Sequence[CellVerdict], threshold: float) -> tuple[float, int]:
    return max((_loss(p, p.ratio, p.ratio, threshold), p.cell.bytes) for p in points)


def _loss(point: CellVerdict, below: float, above: float, threshold: float) -> float:
    # The ratio `below` counts below the threshold, where the variant is taken; `above` from it on.
    slower = below if point.cell.bytes < threshold else 1 / above
    return max(slower - 1, 0.0)
