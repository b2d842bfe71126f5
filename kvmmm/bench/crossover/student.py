"""Student's t, and the little that sharing a variance between cells needs. Plain floats.

Source: Numerical Recipes, 6.4 (incomplete beta function); Smyth 2004, "Linear models and empirical
Bayes methods for assessing differential expression" (`shared_variance`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_TINY = 1e-300
_STEPS = 300


def two_sided_p(t: float, df: float) -> float:
    """Return the probability that |T| is at least |t|, with `df` degrees of freedom."""
    if t == 0:
        return 1.0
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


@cache
def quantile(p: float, df: float) -> float:
    """Return the t that |T| exceeds with probability `p`."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > p else (low, middle)
    return high


def shared_variance(variances: Sequence[float], df: float) -> tuple[float, float]:
    """Return what cells that are measured alike say about each other's variance: (value, weight).

    Five processes say little about the variance of one cell, and of a hundred cells some will look
    far too steady. How much the variances differ beyond what chance explains decides how many
    degrees of freedom the common value is worth beside the cell's own `df`; they are never more
    than the cells together have.

    Args:
        variances: Of each cell, over processes; positive.
        df: Their degrees of freedom.
    """
    n = len(variances)
    if n < 2:
        return (variances[0] if n else 0.0), 0.0
    logs = [math.log(v) - _digamma(df / 2) + math.log(df / 2) for v in variances]
    mean = sum(logs) / n
    excess = sum((x - mean) ** 2 for x in logs) / (n - 1) - _trigamma(df / 2)
    most = (n - 1) * df
    if excess <= 0:
        return math.exp(mean), most
    weight = min(2 * _trigamma_inverse(excess), most)
    return math.exp(mean + _digamma(weight / 2) - math.log(weight / 2)), weight


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0 or x >= 1:
        return float(x >= 1)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        + a * math.log(x) + b * math.log1p(-x)
    )  # fmt: skip
    front = math.exp(log_front)
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    # Lentz's method.
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or _TINY)
    value = d
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            d = 1 / ((1 + term * d) or _TINY)
            c = (1 + term / c) or _TINY
            step = c * d
            value *= step
        if abs(step - 1) < 1e-12:
            break
    return value


def _digamma(x: float) -> float:
    value = 0.0
    while x < 8:
        value -= 1 / x
        x += 1
    return value + math.log(x) - 1 / (2 * x) - 1 / (12 * x**2) + 1 / (120 * x**4)


def _trigamma(x: float) -> float:
    value = 0.0
    while x < 8:
        value += 1 / x**2
        x += 1
    return value + 1 / x + 1 / (2 * x**2) + 1 / (6 * x**3) - 1 / (30 * x**5)


def _trigamma_inverse(y: float) -> float:
    low, high = 1e-3, 1e6
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _trigamma(middle) > y else (low, middle)
    return high
