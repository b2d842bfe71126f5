"""The runner: interleaving, A/A, medians, and what it leaves behind."""

from __future__ import annotations

import gc
import os
from collections import Counter

import pytest

from kvmmm.bench.case import EACH, MS, NS, WORST, Case
from kvmmm.bench.runner import LABELS, measure
from tests.bench.fake import FakeProbes, group_of, ratio_case


def steady(product: float, floor: float) -> FakeProbes:
    return FakeProbes(p=lambda _n: {"t": product}, f=lambda _n: {"t": floor})


def in_order(_keys: list[tuple[str, str]]) -> None:
    pass


def test_a_value_is_the_median_over_rounds() -> None:
    # Label A takes the odd calls, B the even ones; the first pair is the warm-up.
    times = [999, 999, 30, 30, 10, 10, 20, 20]
    probes = FakeProbes(p=lambda n: {"t": times[n - 1]}, f=lambda _n: {"t": 10})

    [record] = measure(group_of(probes, [ratio_case()], rounds=3), shuffle=in_order)

    assert record.value == 2.0
    assert record.n == 6
    assert record.aa == 0.0
    assert record.extra["product_ns"] == 20.0
    assert record.extra["floor_ns"] == 10.0


def test_aa_tells_how_far_two_measurements_of_the_same_thing_lie_apart() -> None:
    probes = FakeProbes(p=lambda n: {"t": 20 if n % 2 else 30}, f=lambda _n: {"t": 10})

    [record] = measure(group_of(probes, [ratio_case()]), shuffle=in_order)

    assert record.value == 2.5
    assert record.aa == pytest.approx(0.4)  # 2 against 3


def test_a_round_compares_neighbours_so_that_load_cancels() -> None:
    # The machine becomes ten times slower half-way.
    def slow(n: int, ns: float) -> dict[str, float]:
        return {"t": ns * (10 if n > 6 else 1)}

    probes = FakeProbes(p=lambda n: slow(n, 15), f=lambda n: slow(n, 10))

    [record] = measure(group_of(probes, [ratio_case()], rounds=6), shuffle=in_order)

    assert record.value == pytest.approx(1.5)


def test_every_round_runs_each_probe_twice_in_a_new_order() -> None:
    probes = steady(1, 1)
    orders: list[list[tuple[str, str]]] = []

    def shuffle(keys: list[tuple[str, str]]) -> None:
        keys.reverse()
        orders.append(list(keys))

    measure(group_of(probes, [ratio_case()], rounds=4), shuffle=shuffle)

    assert len(orders) == 5  # one round warms up
    assert orders[0] != orders[1]
    for number, order in enumerate(orders):
        assert sorted(order) == sorted((name, label) for name in "pf" for label in LABELS)
        assert probes.calls[number * 4 : number * 4 + 4] == [name for name, _ in order]


def test_probes_that_no_case_needs_do_not_run() -> None:
    probes = FakeProbes(p=lambda _n: {"t": 1}, f=lambda _n: {"t": 1}, other=lambda _n: {"t": 1})

    measure(group_of(probes, [ratio_case()]))

    assert Counter(probes.calls).keys() == {"p", "f"}


def test_probes_that_are_only_shown_run_too() -> None:
    probes = FakeProbes(p=lambda _n: {"t": 1}, f=lambda _n: {"t": 1}, o=lambda _n: {"s": 7})

    [record] = measure(group_of(probes, [ratio_case(shown=[("o", "s")])]))

    assert record.extra["o_s_ns"] == 7.0


def test_quick_means_fewer_rounds() -> None:
    [record] = measure(group_of(steady(1, 1), [ratio_case()], rounds=50), quick=True)

    assert record.n == 4


def test_progress_goes_from_nothing_to_all() -> None:
    steps: list[tuple[int, int]] = []

    measure(
        group_of(steady(1, 1), [ratio_case()], rounds=3),
        progress=lambda done, total: steps.append((done, total)),
    )

    assert steps == [(0, 3), (0, 3), (1, 3), (2, 3), (3, 3)]


def test_timed_parts_run_without_gc_on_one_cpu_and_all_is_restored() -> None:
    probes = steady(1, 1)
    before = os.sched_getaffinity(0)
    assert gc.isenabled()

    measure(group_of(probes, [ratio_case()]))

    assert not probes.gc_was_on
    assert all(len(cpus) == 1 for cpus in probes.cpus)
    assert len({frozenset(cpus) for cpus in probes.cpus}) == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_restores_everything_and_goes_on_up(error: type[BaseException]) -> None:
    def fail(n: int) -> dict[str, float]:
        if n == 3:
            raise error
        return {"t": 1}

    probes = FakeProbes(p=fail, f=lambda _n: {"t": 1})
    before = os.sched_getaffinity(0)

    with pytest.raises(error):
        measure(group_of(probes, [ratio_case()]))

    assert not probes.is_open
    assert gc.isenabled()
    assert os.sched_getaffinity(0) == before


def test_a_count_above_its_limit_is_told_whatever_the_time() -> None:
    probes = FakeProbes(p=lambda n: {"t": 1, "exits": 65 if n == 5 else 2}, f=lambda _n: {"t": 10})
    case = ratio_case(limits={"exits": 64})

    [record] = measure(group_of(probes, [case]), shuffle=in_order)

    assert record.value == pytest.approx(0.1)
    assert record.over_limit == [("exits", 65, 64)]
    assert record.met is False
    assert record.extra["exits"] == 65


def test_a_bound_takes_the_worst_round() -> None:
    times = [1, 1, 5, 2, 17, 3, 4, 2]
    probes = FakeProbes(p=lambda n: {"t": times[n - 1] * 1e6})
    case = Case("fake/late", unit=MS, goal=20, product=("p", "t"), reduce=WORST)

    [record] = measure(group_of(probes, [case], rounds=3), shuffle=in_order)

    assert record.value == 17.0
    assert record.extra["median"] == 3.5


@pytest.mark.parametrize(("goal", "aa"), [(100, 0.02), (None, 2.0)])
def test_noise_of_a_small_difference_is_measured_by_the_goal(goal: float | None, aa: float) -> None:
    # 12 and 10 against a floor of 10: the difference is 1, the labels are 2 apart.
    probes = FakeProbes(p=lambda n: {"t": 12 if n % 2 else 10}, f=lambda _n: {"t": 10})
    case = Case("fake/small", unit=NS, goal=goal, product=("p", "t"), floor=("f", "t"))

    [record] = measure(group_of(probes, [case]), shuffle=in_order)

    assert record.value == 1.0
    assert record.aa == pytest.approx(aa)


def test_a_difference_of_nothing_without_a_goal_is_no_division_by_zero() -> None:
    case = Case("fake/none", unit=NS, goal=None, product=("p", "t"), floor=("f", "t"))

    [record] = measure(group_of(steady(10, 10), [case]))

    assert (record.value, record.aa) == (0.0, 0.0)


@pytest.mark.parametrize(("better", "worst", "value"), [("lower", "out", 3), ("higher", "in", 2)])
def test_of_several_times_the_worst_median_counts(better: str, worst: str, value: float) -> None:
    # In every single round it is another one that is worst.
    spikes = [0, 0, 70, 0, 0, 90, 0, 0]
    probes = FakeProbes(
        p=lambda n: {"in": 20 + spikes[n - 1], "out": 30 - spikes[n - 1] / 10},
        f=lambda _n: {"in": 10, "out": 10},
    )
    case = ratio_case(product=("p", EACH), floor=("f", EACH), each=("in", "out"), better=better)

    [record] = measure(group_of(probes, [case], rounds=3), shuffle=in_order)

    assert record.case is case
    assert record.value == value
    assert record.n == 6
    assert record.extra["worst"] == worst
    assert (record.extra["in"], record.extra["out"]) == (2.0, 3.0)
    assert record.extra["product_ns"] == value * 10
