"""Curves by hand: what is a crossover, what parity, what neither, and where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover.crossing import Crossover, NoThreshold, Parity, Points, verdict_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAIR = ("mirror", "internal")
SIZES = [8 << (2 * i) for i in range(8)]

pytest.importorskip("numpy", reason="numpy is not installed")


def points_of(
    ratios: Sequence[float], *, sd: float = 0.01, sizes: Sequence[int] = SIZES,
    signs: Sequence[int] | None = None, floor: float = 0.02, seed: int = 1,
) -> Points:  # fmt: skip
    import numpy as np

    centre = np.log(np.asarray(ratios))
    if signs is None:
        signs = [0 if abs(y) < max(floor, 4 * sd) else int(np.sign(y)) for y in centre]
    replicates = centre + np.random.default_rng(seed).normal(0, sd, (1000, len(ratios)))
    return Points(
        sizes, centre, centre - 1.96 * sd, centre + 1.96 * sd, np.full(len(ratios), floor), signs,
        replicates,
    )  # fmt: skip


def judged(ratios: Sequence[float], **options: Any) -> Any:
    return verdict_of(points_of(ratios, sizes=SIZES[: len(ratios)], **options), PAIR)


def test_a_crossover_is_where_the_ratio_is_one() -> None:
    verdict = judged([2, 1.8, 1.5, 1.25, 0.8, 0.7, 0.6, 0.55])

    assert isinstance(verdict, Crossover)
    between = math.sqrt(SIZES[3] * SIZES[4])
    assert verdict.bytes == pytest.approx(between, rel=0.02)
    assert verdict.low < between < verdict.high
    assert verdict.probability == 1
    assert (verdict.below, verdict.above) == ("internal", "mirror")


def test_it_has_two_directions() -> None:
    verdict = judged([0.5, 0.6, 0.7, 0.8, 1.25, 1.5, 1.7, 2])

    assert isinstance(verdict, Crossover)
    assert (verdict.below, verdict.above) == ("mirror", "internal")


@pytest.mark.parametrize("at", [40, 700, 5000, 60_000])
def test_curves_between_sizes_are_no_reason_to_miss(at: float) -> None:
    def ratio(n_bytes: int) -> float:
        return (5 + n_bytes / 30 + at) / (5 + n_bytes / 30 + n_bytes)

    verdict = judged([ratio(n_bytes) for n_bytes in SIZES], sd=0.001)

    assert isinstance(verdict, Crossover)
    assert verdict.low <= at <= verdict.high
    assert verdict.high / verdict.low < 1.5


def test_more_noise_is_a_wider_interval() -> None:
    widths = []
    for sd in (0.005, 0.02, 0.05):
        verdict = judged([2, 1.8, 1.5, 1.25, 0.8, 0.7, 0.6, 0.55], sd=sd)
        assert isinstance(verdict, Crossover)
        widths.append(verdict.high / verdict.low)
    assert widths == sorted(widths)


def test_regret_is_the_most_that_is_lost_within_four_times() -> None:
    verdict = judged([1.5, 1.5, 1.5, 1.5, 1 / 1.2, 1 / 1.2, 1 / 1.2, 1 / 1.2], sd=0.001)

    assert isinstance(verdict, Crossover)
    assert verdict.regret == pytest.approx(0.5, rel=0.01)


def test_where_being_wrong_costs_nothing_there_is_no_threshold() -> None:
    verdict = judged([1.04] * 4 + [0.97] * 4, sd=0.001)

    assert isinstance(verdict, NoThreshold)
    assert "4x costs at most 4 %" in verdict.reason


def test_sizes_that_are_open_in_the_middle_do_not_matter() -> None:
    verdict = judged([2, 1.6, 1.3, 1.01, 0.995, 0.8, 0.6, 0.5])

    assert isinstance(verdict, Crossover)
    assert SIZES[2] < verdict.bytes < SIZES[5]


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ([1.5, 1.4, 0.8, 0.7, 1.3, 1.4, 1.5, 1.6], "changes 2 times"),
        ([1.5, 0.7, 1.4, 0.7, 1.3, 1.4, 1.5, 0.6], "changes 5 times"),
        ([67, 40, 20, 10, 6.3, 4, 3, 2], "internal wins at every size, by 2x to 67x"),
        ([0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7], "mirror wins at every size, by 11 % to 43 %"),
        ([1.0, 1.01, 1.0, 0.99, 1.0, 1.0, 1.01, 1.0], "the same at every size"),
        ([1.0, 1.0, 1.0, 1.5, 1.0, 1.5, 1.5, 1.5], "internal wins at 4 of 8 sizes"),
        ([1.5, 0.5], "only 2 sizes"),
    ],
)
def test_what_is_no_crossover_says_why(ratios: Sequence[float], reason: str) -> None:
    verdict = judged(ratios)

    assert isinstance(verdict, NoThreshold)
    assert reason in verdict.reason


def test_noise_that_hides_everything_is_told_from_equality() -> None:
    verdict = judged([1.1, 0.9, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0], sd=0.2)

    assert verdict == NoThreshold("no difference beyond noise at any size")


def test_parity_is_the_size_from_which_both_bounds_stay_within_five_percent() -> None:
    verdict = judged([1.6, 1.4, 1.2, 1.06, 1.03, 1.01, 1.0, 1.0], sd=0.005)

    assert verdict == Parity(SIZES[4], "internal")


def test_parity_needs_to_stay() -> None:
    verdict = judged([1.6, 1.4, 1.01, 1.01, 1.03, 1.2, 1.01, 1.03], sd=0.005)

    assert verdict == Parity(SIZES[6], "internal")


def test_one_size_alone_is_no_parity() -> None:
    verdict = judged([1.6, 1.4, 1.2, 1.2, 1.2, 1.2, 1.2, 1.0], sd=0.005)

    assert isinstance(verdict, NoThreshold)


def test_what_is_open_at_the_large_end_is_no_parity() -> None:
    verdict = judged([1.6, 1.4, 1.2, 1.1, 1.0, 1.0, 1.0, 1.06], sd=0.005, floor=0.1)

    assert isinstance(verdict, NoThreshold)


def test_sizes_beyond_doubt_that_resampling_does_not_bear_out_are_no_crossover() -> None:
    ratios = [1.05, 1.04, 1.04, 1.03, 0.97, 0.96, 0.97, 0.96]

    verdict = judged(ratios, sd=0.04, floor=0.01, signs=[1, 0, 0, 0, 0, 0, 0, -1])

    assert isinstance(verdict, NoThreshold)
    assert "probability" in verdict.reason


def test_a_sign_that_comes_back_between_sizes_beyond_doubt_is_no_crossover() -> None:
    ratios = [1.5, 1.3, 0.8, 1.3, 0.8, 0.7, 0.7, 0.7]

    verdict = judged(ratios, signs=[1, 0, 0, 0, 0, -1, -1, -1])

    assert isinstance(verdict, NoThreshold)
    assert "to and fro" in verdict.reason


def test_an_interval_wider_than_the_question_is_no_number() -> None:
    ratios = [1.4, 1.015, 1.01, 1.005, 0.995, 0.99, 0.985, 0.7]

    verdict = judged(ratios, sd=0.02, signs=[1, 0, 0, 0, 0, 0, 0, -1], floor=0.07)

    assert isinstance(verdict, NoThreshold)
    assert "factor of 16" in verdict.reason


@pytest.mark.parametrize(
    "turn", [lambda y: y, lambda y: [1 / r for r in y]], ids=["as it is", "sides exchanged"]
)
def test_sides_exchanged_exchange_the_winner_and_nothing_else(
    turn: Callable[[Sequence[float]], Sequence[float]],
) -> None:
    import numpy as np

    ratios = [3, 2, 1.5, 1.1, 0.8, 0.7, 0.6, 0.5]
    points = points_of(ratios)
    turned = points_of(turn(ratios))
    same = turned.centre[0] > 0
    replicates = points.replicates if same else -points.replicates
    turned = turned._replace(replicates=np.asarray(replicates))

    a, b = verdict_of(points, PAIR), verdict_of(turned, PAIR if same else PAIR[::-1])

    assert isinstance(a, Crossover)
    assert isinstance(b, Crossover)
    assert b[:4] == pytest.approx(a[:4])
    assert (b.below, b.above) == (a.below, a.above)
