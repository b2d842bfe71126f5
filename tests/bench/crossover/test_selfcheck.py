"""The self-check, on sweeps that are simulated: what it counts, and that the statistics pass it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.bench.crossover import selfcheck
from kvmmm.bench.crossover.crossing import Crossover
from kvmmm.bench.crossover.plan import SELF_CHECK, plan_of
from kvmmm.bench.crossover.record import FILE_NAME, Footer, Writer
from kvmmm.bench.crossover.selfcheck import Trial, check, finding_of, records_of, trials
from kvmmm.bench.crossover.statistics import analyse
from kvmmm.bench.crossover.sweep import Outcome, SweepError
from tests.bench.crossover.simulated import Simulated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmmm.bench.crossover.record import Cell, Results

pytest.importorskip("numpy", reason="numpy is not installed")


def ns_with(trial: Trial) -> Callable[[Cell, str], float]:
    def ns(cell: Cell, variant: str) -> float:
        return 40 + cell.bytes / 25 + trial.planted.ns_of(variant, cell.bytes)

    return ns


def simulated_sweep(trial: Trial, seed: int, **how: Any) -> Results:
    options = {"process_sd": 0.01, "rounds": 11, **how}
    return Simulated(ns_with(trial), seed=seed, **options).results(plan_of(SELF_CHECK).cells)


def test_there_are_ten_planted_and_twenty_identical_in_mixed_order() -> None:
    made = trials()

    planted = [trial for trial in made if trial.crossover_bytes is not None]
    assert (len(planted), len(made) - len(planted)) == (10, 20)
    assert len({trial.name for trial in made}) == 30
    kinds = [trial.crossover_bytes is None for trial in made]
    assert kinds != sorted(kinds)
    assert all(trial.planted.identical for trial in made)
    assert made == trials()


def test_sides_are_equal_at_the_size_that_is_planted() -> None:
    for trial in trials(seed=3, n_planted=20, n_identical=0):
        at = trial.crossover_bytes
        assert at is not None
        cost = {side: a + b * at for side, (a, b) in trial.planted.costs.items()}
        assert cost["mirror"] == pytest.approx(cost["internal"]) == cost["internal2"]
        assert cost["mirror"] > 0


def test_both_directions_are_planted() -> None:
    ends = {trial.planted.costs["mirror"][0] > 0 for trial in trials() if trial.crossover_bytes}

    assert ends == {True, False}


def test_all_sweeps_take_less_than_twenty_minutes_and_each_less_than_thirty_seconds() -> None:
    seconds = plan_of(SELF_CHECK).seconds

    assert seconds is not None
    assert seconds <= 28
    assert len(trials()) * (seconds + 3) <= 20 * 60


def test_planted_crossovers_are_recovered() -> None:
    made = trials(seed=11, n_planted=20, n_identical=0)

    right = sum(
        finding_of(trial, analyse(simulated_sweep(trial, seed), seed=1, replicates=400)).right
        for seed, trial in enumerate(made)
    )

    assert right >= 18


def test_identical_sides_are_left_alone() -> None:
    made = trials(n_planted=0, n_identical=30)

    wrong = [
        finding
        for seed, trial in enumerate(made)
        if not (
            finding := finding_of(
                trial, analyse(simulated_sweep(trial, seed), seed=1, replicates=50)
            )
        ).right
    ]

    assert len(wrong) <= 1, wrong


def test_a_crossover_elsewhere_is_not_the_one_that_is_planted() -> None:
    trial = trials(n_planted=1, n_identical=0)[0]
    analysis = analyse(simulated_sweep(trial, 1))

    shifted = trial._replace(crossover_bytes=(trial.crossover_bytes or 0) * 4)

    assert finding_of(trial, analysis).right
    assert isinstance(analysis.curves[0].verdict, Crossover)
    assert not finding_of(shifted, analysis).right


def test_a_difference_is_a_false_claim_even_without_a_crossover() -> None:
    trial = trials(n_planted=0, n_identical=1)[0]
    slower = Trial("x", selfcheck.Planted({"mirror": (5000.0, 0.0)}), None)

    finding = finding_of(trial, analyse(simulated_sweep(slower, 1)))

    assert not finding.right
    assert "internal faster" in finding.said


def test_a_planted_sweep_without_the_mirror_is_wrong() -> None:
    trial = trials(n_planted=1, n_identical=0)[0]

    finding = finding_of(trial, analyse(simulated_sweep(trial, 1, variants=("walk",))))

    assert not finding.right
    assert "not measured" in finding.said


def test_cases_are_shares() -> None:
    made = trials(n_planted=2, n_identical=2)
    findings = [selfcheck.Finding(trial, i % 2 == 0, "") for i, trial in enumerate(made)]

    planted, false = records_of(findings)

    kinds = [f.right for f in findings if f.trial.crossover_bytes is not None]
    assert (planted.case.name, false.case.name) == ("selfcheck/planted", "selfcheck/false")
    assert planted.value == sum(kinds) / 2
    wrong = [not f.right for f in findings if f.trial.crossover_bytes is None]
    assert false.value == sum(wrong) / 2
    assert (planted.n, false.n) == (2, 2)
    assert records_of([]) == []


def test_findings_come_one_by_one() -> None:
    made = trials(n_planted=1, n_identical=1)
    asked: list[str] = []

    def measure(trial: Trial) -> Results:
        asked.append(trial.name)
        return simulated_sweep(trial, 5)

    findings = check(made, measure)
    assert next(findings).trial == made[0]
    assert asked == [made[0].name]
    assert [finding.trial for finding in findings] == made[1:]


@pytest.fixture
def fake_sweep(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Sweeps that are over at once. `stop` names the one at which somebody presses Ctrl-C.
    world: dict[str, Any] = {"stop": None, "made": []}

    def run(
        _plan: Any, folder: Path, *, planted: Any, resume: bool, host: Any, progress: Any
    ) -> Outcome:
        assert resume
        assert host == {"cpu": "x"}
        progress(0.5, 11.0, "process 3")
        interrupted = folder.name == world["stop"]
        if not interrupted:
            folder.mkdir(parents=True)
            results = simulated_sweep(Trial(folder.name, planted, None), 7)
            with Writer(folder / FILE_NAME) as writer:
                writer.write(results.header)
                writer.write_other("planted", **planted.as_json())
                for record in [*results.cells.values(), *results.samples]:
                    writer.write(record)
                writer.write(Footer(complete=True, seconds=1.0))
            world["made"].append(folder.name)
        return Outcome(not interrupted, interrupted, 1.0, 1, [])

    monkeypatch.setattr("kvmmm.bench.crossover.sweep.run", run)
    monkeypatch.setattr("kvmmm.bench.host.host_record", lambda: {"kernel": "6.18"})
    monkeypatch.setattr("kvmmm.bench.crossover.facts.host_facts", lambda: {"cpu": "x"})
    return world


def test_it_writes_its_cases_and_ends_well(
    tmp_path: Path, fake_sweep: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = trials(n_planted=1, n_identical=1)

    status = selfcheck.run(tmp_path / "out", made)

    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert sorted(fake_sweep["made"]) == sorted(trial.name for trial in made)
    lines = (tmp_path / "out" / selfcheck.RECORDS_NAME).read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines[1:]]
    assert [(c["case"], c["value"], c["met"]) for c in cases] == [
        ("selfcheck/planted", 1.0, True),
        ("selfcheck/false", 0.0, True),
    ]
    assert "2/2" in shown.err
    assert "selfcheck/planted" in shown.out
    assert "self-check passed: 1 of 1 planted crossovers stated with the truth inside" in shown.out
    assert "median width a factor of 1." in shown.out
    assert "in 0 of 1 sweeps of identical sides" in shown.out
    assert 1 < cases[0]["interval_factor"] < 3


def test_what_is_interrupted_says_how_to_go_on(
    tmp_path: Path, fake_sweep: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    made = trials(n_planted=1, n_identical=1)
    fake_sweep["stop"] = made[1].name

    status = selfcheck.run(tmp_path, made)

    assert status == 130
    assert fake_sweep["made"] == [made[0].name]
    shown = capsys.readouterr()
    assert "--self-check" in shown.err
    assert "self-check not finished: " in shown.out

    fake_sweep["stop"] = None
    assert selfcheck.run(tmp_path, made) == 0
    # What was made before is read, not made again.
    assert fake_sweep["made"] == [trial.name for trial in made]


def test_a_folder_of_another_self_check_is_refused(
    tmp_path: Path, fake_sweep: dict[str, Any]
) -> None:
    selfcheck.run(tmp_path, trials(n_planted=1, n_identical=0))
    other = [
        trial._replace(name="planted-00") for trial in trials(seed=9, n_planted=1, n_identical=0)
    ]

    with pytest.raises(SweepError, match="another self-check"):
        selfcheck.run(tmp_path, other)
    assert fake_sweep["made"] == ["planted-00"]


def test_a_miss_is_a_failure(tmp_path: Path, fake_sweep: dict[str, Any]) -> None:
    made = [trials(n_planted=1, n_identical=0)[0]._replace(crossover_bytes=9.0)]

    assert selfcheck.run(tmp_path, made) == 1
    assert fake_sweep["made"]
