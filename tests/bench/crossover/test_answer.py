"""The answer: ten lines that say what the data carries, and nothing where it carries nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.crossover.answer import LINE_CHARS, LINES, STATES, answer_of, summarize
from kvmmm.bench.crossover.record import FILE_NAME, Results, Writer
from kvmmm.bench.crossover.statistics import analyse
from kvmmm.bench.crossover.thresholds import COSTLY, HARMLESS, UNKNOWN
from tests.bench.crossover.simulated import (
    Simulated,
    cells_of,
    identical_ns,
    internal_ns,
    planted_ns,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.bench.crossover.record import Cell

pytest.importorskip("numpy", reason="numpy is not installed")


def cold_is_dear(cell: Cell, variant: str) -> float:
    cold = cell.residency in {"mirror-cold", "cold"} and variant == "mirror"
    return internal_ns(cell.bytes) + (3000 + cell.bytes if cold else 0)


def all_states(**dims: str) -> list[Cell]:
    return [cell for state in STATES for cell in cells_of(residency=state, **dims)]


def answered(results: Results) -> list[str]:
    return answer_of(results, analyse(results, seed=1, replicates=300))


@pytest.fixture(scope="module")
def residency() -> Results:
    cells = [*all_states(), *all_states(operation="copy_in_to", locality="spread")]
    return Simulated(cold_is_dear, seed=1, rounds=9, process_sd=0.01).results(cells)


def test_there_are_ten_lines_and_none_is_long(residency: Results) -> None:
    lines = answered(residency)

    assert len(lines) == LINES == 10
    assert all(line.endswith(".") and "\n" not in line for line in lines)
    assert all(len(line) <= LINE_CHARS for line in lines)


def test_the_first_line_is_the_answer_the_most_favourable_state_first(residency: Results) -> None:
    lines = answered(residency)

    assert re.fullmatch(
        r"ASIO \(the mirror\) beats internal mappings on this host in (\d+) of 22 cells where .*, "
        r"0 of 22 where both are cold.*\.",
        lines[0],
    )
    assert "0 of 22 where the mirror is cold" in lines[0]


def asio_with_a_cold_linear_mapping(cell: Cell, variant: str) -> float:
    scattered = cell.order == "scattered" and cell.bytes >= 2048
    slow = cell.residency == "linear-cold" or scattered
    return internal_ns(cell.bytes) * (2 if slow and variant != "mirror" else 1)


def test_where_asio_wins_is_said_by_state_and_layout() -> None:
    cells = [
        *cells_of(residency="linear-cold"),
        *cells_of(),
        *cells_of(layout="1000", order="scattered"),
    ]
    results = Simulated(asio_with_a_cold_linear_mapping, seed=1).results(cells)

    lines = answered(results)

    assert lines[0].startswith(
        "ASIO (the mirror) beats internal mappings on this host in 11 of 11 cells where the linear "
        "mapping is cold, 7 of 22 where both are warm."
    )
    assert "7 of ASIO's 7 wins are in scattered memory, mostly from 2 KiB on" in lines[1]
    assert lines[3].startswith("Linear mapping cold, 11 cells: ASIO faster in 11 (")


def test_the_last_line_says_where_it_was_measured_and_what_is_not_known(residency: Results) -> None:
    last = answered(residency)[-1]

    assert last.startswith("Measured: AMD EPYC, Linux 6.18, kind: pvm; default sweep, 110 cells")
    assert "5 processes" in last
    assert "NUMA" in last
    assert "is noise (A/A)" in last


def test_where_size_does_not_decide_it_says_so(residency: Results) -> None:
    lines = answered(residency)

    assert lines[1].startswith("Size decides nothing: no crossover in 10 curves (")
    assert lines[4].startswith("Mirror cold, 22 cells: internal mappings faster in 22 (")
    assert "undecided 22; no crossover in 2 curves" in lines[2]


def test_a_crossover_is_said_with_all_that_belongs_to_it() -> None:
    cells = [*cells_of(), *cells_of([4], operation="swap")]  # one size cannot cross
    results = Simulated(planted_ns(3000, 3.0), seed=1).results(cells)

    lines = answered(results)

    assert "1 of 1 curve cross, at 1" in lines[1]
    warm = lines[2]
    assert "1 of 1 curve crosses: copy_in, 1 segment, hot: 1" in warm
    assert "ASIO above, probability 1.00, 4x wrong costs " in warm
    assert lines[3] == "Linear mapping cold: not measured."


def test_identical_sides_have_no_winner_and_thresholds_are_not_wrong() -> None:
    results = Simulated(identical_ns, seed=1, process_sd=0.002, rounds=9).results(cells_of())

    lines = answered(results)

    assert "in 0 of 11 cells where both are warm." in lines[0]
    assert "Size decides nothing" in lines[1]
    assert "undecided 11" in lines[2]
    assert lines[7].endswith("costs over 5 %: both warm in 0 of 1 curve, not in 1.")
    assert "not judged" in lines[8]


def test_thresholds_are_judged_by_regret(residency: Results) -> None:
    analysis = analyse(residency, seed=1, replicates=300)

    by_operation = {
        (str(j.curve.dim("operation")), str(j.curve.dim("residency"))): j
        for j in analysis.thresholds
    }
    vectored, plain = by_operation["copy_in_to", "cold"], by_operation["copy_in", "mirror-cold"]
    assert (vectored.bytes, plain.bytes) == (512, 32 << 10)
    for judged in (vectored, plain):
        assert judged.verdict == COSTLY
        assert judged.at_bytes == 8
        assert judged.low < judged.regret < judged.high
        assert judged.regret == pytest.approx((3008 + 10) / (10 + 8 / 30), rel=0.1)
        assert (judged.best_bytes, judged.best_regret) == (0, 0.0)
    warm = by_operation["copy_in", "warm"]
    assert warm.verdict in {HARMLESS, UNKNOWN}
    line = answered(residency)[7]
    assert "gVisor's 32 KiB (plain copies, ASIO below it) costs over 5 %: both warm in 0 of" in line
    assert "best internal always" in line


def test_a_threshold_may_be_right_or_too_low() -> None:
    at_32k = Simulated(planted_ns(-0.0, 0.0), seed=1)

    def asio_for_small(cell: Cell, variant: str) -> float:
        factor = 0.5 if cell.bytes < 32 << 10 else 2
        return internal_ns(cell.bytes) * (factor if variant == "mirror" else 1)

    def asio_always(cell: Cell, variant: str) -> float:
        return internal_ns(cell.bytes) * (0.5 if variant == "mirror" else 1)

    at_32k.ns = asio_for_small
    [right] = analyse(at_32k.results(cells_of())).thresholds
    assert right.verdict == HARMLESS
    assert right.regret == 0

    [low] = analyse(Simulated(asio_always, seed=1).results(cells_of())).thresholds
    assert low.verdict == COSTLY
    assert low.at_bytes >= 32 << 10
    assert low.best_bytes == float("inf")


def test_a_sweep_that_was_cut_off_says_so(residency: Results) -> None:
    assert "did not come to its end" in answered(residency._replace(footer=None))[-1]
    assert "did not come to its end" not in answered(residency)[-1]


@pytest.mark.parametrize("n", [1, 2])
def test_few_processes_carry_no_answer(n: int) -> None:
    results = Simulated(cold_is_dear, seed=1, processes=n).results(all_states())

    lines = answered(results)

    assert len(lines) == 2
    assert lines[0].startswith(f"No answer: {n} processes do not show")


def test_four_processes_are_few() -> None:
    results = Simulated(cold_is_dear, seed=1, processes=4).results(all_states())

    assert "Fewer than 5" in answered(results)[-1]


def test_without_the_mirror_there_is_no_answer() -> None:
    results = Simulated(identical_ns, seed=1, variants=("walk",)).results(cells_of())

    assert answered(results)[0] == "No answer: nothing was measured with the mirror."
    assert len(answered(results._replace(samples=[]))) == 2


def test_without_noise_known_or_with_too_much_there_is_no_answer(residency: Results) -> None:
    without = [
        s._replace(ns={k: v for k, v in s.ns.items() if k != "internal2"})
        for s in residency.samples
    ]
    assert "no side was measured twice" in answered(residency._replace(samples=without))[0]

    disturbed = [
        s._replace(ns={**s.ns, "internal2": s.ns["internal2"] * 2}) for s in residency.samples
    ]
    lines = answered(residency._replace(samples=disturbed))
    assert "Measure again on a quiet host" in lines[0]


def test_it_is_made_from_a_folder(tmp_path: Path, residency: Results) -> None:
    with Writer(tmp_path / FILE_NAME) as writer:
        for record in [residency.header, *residency.cells.values(), *residency.samples]:
            writer.write(record)

    lines = summarize(tmp_path)

    assert len(lines) == LINES
    assert lines[1] == answered(residency)[1]
