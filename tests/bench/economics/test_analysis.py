"""What is said of sweeps whose truth is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.crossover.record import ResultsError
from kvmmm.bench.economics.asked import BREAK_EVEN, COUNT, FEW, IN_ORDER, OVER_C, SHARE, WAY, Key
from kvmmm.bench.economics.plan import EXIT, EXITS, FAULT, FAULTS, FLOOR, MAP, MEMSLOTS, PAGE
from kvmmm.bench.fault_answer import PF, SLOT
from tests.bench.economics.simulated import costs_of, simulated

if TYPE_CHECKING:
    from kvmmm.bench.crossover.record import Cell, Results
    from kvmmm.bench.economics.verdicts import Economics

pytest.importorskip("numpy", reason="numpy is not installed")
_2M = 2 << 20


def analyse(results: Results, replicates: int = 60) -> Economics:
    from kvmmm.bench.economics.analysis import analyse as run

    return run(results, seed=1, replicates=replicates)


@pytest.fixture(scope="module")
def said() -> Economics:
    return analyse(simulated(), 300)


def test_figures_hold_the_truth_in_their_intervals(said: Economics):
    n_missed = 0
    for one in said.figures.values():
        truth = costs_of(one.cell)[one.name]
        assert one.ns == pytest.approx(truth, rel=0.05)
        n_missed += not one.low <= truth <= one.high
        assert one.lost == 0
        assert one.n_rounds == 45
    assert n_missed <= 0.1 * len(said.figures)
    assert said.refusal == ""


@pytest.mark.parametrize(
    ("question", "over", "reference", "ratio", "told"),
    [
        # 8,000 ns, and 10 a page: a window of 2 MiB costs 1.64 faults of a page.
        (BREAK_EVEN, Key(FAULTS, PF, "write", _2M, FAULT), 1.0, 13120 / 8010, 1),
        (BREAK_EVEN, Key(FAULTS, PF, "write", _2M, FAULT), FEW, 13120 / 8010, -1),
        (BREAK_EVEN, Key(FAULTS, SLOT, "read", _2M, FAULT), 1.0, 1.0, 0),
        (SHARE, Key(FAULTS, SLOT, "write", _2M, MAP), 1.0, 0.3, -1),
        (IN_ORDER, Key(FAULTS, SLOT, "write", 4096, PAGE), 1.0, 20_500 / 539, 1),
        (WAY, Key(FAULTS, SLOT, "write", 4096, FAULT), 1.0, 20_000 / 8010, 1),
        (COUNT, Key(MEMSLOTS, "4000", "write", _2M, FAULT), 1.0, 1.0, 0),
        (OVER_C, Key(EXITS, "syscall", EXIT, 1, EXIT), 1.0, 2.0, 1),
    ],
)  # fmt: skip
def test_comparisons_say_what_is_so(
    said: Economics, question: str, over: Key, reference: float, ratio: float, told: int
):
    one = said.of(question, over, reference)
    assert one.ratio == pytest.approx(ratio, rel=0.05)
    assert one.low <= one.ratio <= one.high
    assert one.told == told


def test_what_has_no_counterpart_is_not_asked(said: Economics):
    assert said.of(OVER_C, Key(EXITS, "ioeventfd", EXIT, 1, EXIT)) is None
    assert Key(EXITS, "ioeventfd", EXIT, 1, FLOOR) not in said.figures


def test_where_nothing_differs_nothing_is_told():
    def same(cell: Cell) -> dict[str, float]:
        return dict.fromkeys(costs_of(cell), 1000.0)

    for seed in range(12):
        told = [
            one for one in analyse(simulated(same, seed=seed, process_sd=0.05), 20).comparisons
            if one.told and one.question.reference == 1
        ]  # fmt: skip
        assert not told, seed


def test_what_is_less_than_the_noise_is_not_told():
    def close(cell: Cell) -> dict[str, float]:
        costs = costs_of(cell)
        return costs | {FLOOR: 2970.0} if FLOOR in costs else costs

    said = analyse(simulated(close, process_sd=0.0, round_sd=0.05, rounds=40))
    over_c = [one for one in said.comparisons if one.question.name == OVER_C]
    assert over_c
    assert not any(one.told for one in over_c)
    assert all(one.floor > math.log(1.01) for one in over_c)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_few_processes_tell_nothing(processes: int):
    said = analyse(simulated(processes=processes))
    assert f"{processes} processes do not show" in said.refusal
    assert not any(one.told for one in said.comparisons)


def test_what_was_measured_once_tells_nothing():
    results = simulated()
    samples = [
        one._replace(ns={name: ns for name, ns in one.ns.items() if not name.endswith("2")})
        for one in results.samples
    ]
    assert analyse(results._replace(samples=samples)).refusal == "nothing was measured."


def test_a_pair_that_differs_from_itself_spoils_the_sweep():
    results = simulated()
    samples = [
        one._replace(ns={n: ns * (1.5 if n == "fault2" else 1) for n, ns in one.ns.items()})
        for one in results.samples
    ]
    said = analyse(results._replace(samples=samples))
    assert "differs beyond doubt" in said.refusal
    assert not any(one.told for one in said.comparisons)


def test_a_figure_that_noise_often_hides_is_compared_with_nothing():
    results = simulated()
    fault_cells = {c.id for c in results.cells.values() if c.layout == PF and c.bytes == _2M}
    samples = [
        one._replace(ns=one.ns | {"fault": -5.0})
        if one.cell in fault_cells and one.round % 3 == 0 else one
        for one in results.samples
    ]  # fmt: skip
    said = analyse(results._replace(samples=samples))
    key = Key(FAULTS, PF, "write", _2M, FAULT)
    assert said.figures[key].lost == pytest.approx(1 / 3)
    assert said.of(BREAK_EVEN, key, FEW).told == 0
    assert said.of(BREAK_EVEN, key._replace(window=1 << 18), FEW).told == -1


def test_results_of_something_else_are_refused():
    results = simulated()
    cells = {id_: cell._replace(order="contiguous") for id_, cell in results.cells.items()}
    with pytest.raises(ResultsError, match="no results of first touches"):
        analyse(results._replace(cells=cells))


def test_an_empty_sweep_says_so():
    assert analyse(simulated(processes=0)).refusal == "nothing was measured."
