"""Student's t against tables, and what cells that are measured alike know of each other."""

from __future__ import annotations

import math
import random

import pytest

from kvmmm.bench.crossover.student import quantile, shared_variance, two_sided_p


@pytest.mark.parametrize(
    ("t", "df", "p"),
    [
        (2.776445, 4, 0.05),
        (4.604095, 4, 0.01),
        (2.042272, 30, 0.05),
        (12.7062, 1, 0.05),
        (1.0, 1, 0.5),
        (1.959964, 1e7, 0.05),
        (0.0, 4, 1.0),
        (-2.776445, 4, 0.05),
        (math.inf, 4, 0.0),
    ],
)
def test_probabilities_are_those_of_the_tables(t: float, df: float, p: float) -> None:
    assert two_sided_p(t, df) == pytest.approx(p, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("df", [1, 2.5, 4, 17, 400])
@pytest.mark.parametrize("p", [0.5, 0.05, 1e-3, 1e-6])
def test_a_quantile_has_its_probability(df: float, p: float) -> None:
    assert two_sided_p(quantile(p, df), df) == pytest.approx(p, rel=1e-6)


def test_far_tails_are_small_and_never_negative() -> None:
    ps = [two_sided_p(t, 30) for t in (5, 20, 100, 1e4)]

    assert ps == sorted(ps, reverse=True)
    assert 0 < ps[-1] < 1e-60


def chi_squared_variances(true: list[float], df: int, seed: int) -> list[float]:
    choose = random.Random(seed)
    return [v * sum(choose.gauss(0, 1) ** 2 for _ in range(df)) / df for v in true]


def test_equal_variances_are_found_and_worth_much() -> None:
    value, weight = shared_variance(chi_squared_variances([4.0] * 200, 4, 1), 4)

    assert value == pytest.approx(4.0, rel=0.15)
    assert weight > 30


def test_variances_that_differ_are_worth_little() -> None:
    choose = random.Random(2)
    true = [math.exp(choose.gauss(0, 2)) for _ in range(200)]

    _, weight = shared_variance(chi_squared_variances(true, 4, 3), 4)

    assert 0 < weight < 3


def test_one_cell_shares_with_nobody() -> None:
    assert shared_variance([3.0], 4) == (3.0, 0.0)
    assert shared_variance([], 4) == (0.0, 0.0)


def test_few_cells_are_not_worth_more_than_they_have() -> None:
    _, weight = shared_variance([1.0, 1.0, 1.0], 4)

    assert weight == 8
