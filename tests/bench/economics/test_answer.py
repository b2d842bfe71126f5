"""The lines that a sweep of first touches and exits ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.economics.answer import answer_of
from kvmmm.bench.economics.plan import EXITS, FAULT, FAULTS, FLOOR, MAP, MEMSLOTS
from kvmmm.bench.economics.words import EXIT_NAMES, ns_text, subject_text
from kvmmm.bench.exit_kinds import ALL_NAMES
from kvmmm.hostarch.addr import PAGE_BYTES
from tests.bench.economics.simulated import costs_of, simulated

if TYPE_CHECKING:
    from kvmmm.bench.crossover.record import Cell, Results

pytest.importorskip("numpy", reason="numpy is not installed")


def lines_of(results: Results) -> list[str]:
    from kvmmm.bench.economics.analysis import analyse

    return answer_of(results, analyse(results, replicates=60))


def starting(lines: list[str], words: str) -> str:
    [line] = [line for line in lines if line.startswith(words)]
    return line


def test_some_ten_lines_about_ways_counts_exits_and_noise():
    lines = lines_of(simulated())

    assert 10 <= len(lines) <= 13
    assert "AMD EPYC Milan" in lines[0]
    assert "5 processes, at most 45 rounds" in lines[0]
    page_fault = starting(lines, "#PF: ")
    assert "windows of 2 MiB surely pay from the second touched page on" in page_fault
    assert "dearer)" in page_fault
    slot = starting(lines, "EPT violation: ")
    assert "not told apart)" in slot
    assert "Mapping 2 MiB beforehand pays where more than 30% [" in slot
    assert starting(lines, "Reads: ") == "Reads: the same windows surely pay."
    assert "EPT violation, 4 KiB: 2.5" in starting(lines, "A write fault ÷ one by #PF")
    assert "no difference of a fault to be told" in starting(lines, "Memslots")
    assert "OUT 3.0" in starting(lines, "An exit, ")
    over_c = starting(lines, "An exit ÷")
    assert over_c.count(";") == 9
    assert "Not told apart" not in over_c
    assert "A/A noise" in starting(lines, "Not said here")


def test_costs_by_the_page_memslots_and_dear_mapping_are_told():
    def dear(cell: Cell) -> dict[str, float]:
        if cell.order == EXITS:
            return costs_of(cell) | ({FLOOR: 3000.0} if cell.layout != "ioeventfd" else {})
        fault = 20_000.0 + 1000 * cell.bytes / PAGE_BYTES
        if cell.order == MEMSLOTS:
            fault *= 2 if cell.layout == "4000" else 1
        return costs_of(cell) | {FAULT: fault, MAP: 3 * fault}

    lines = lines_of(simulated(dear))

    slot = starting(lines, "EPT violation: ")
    assert "windows of 64 KiB surely pay" in slot
    assert "Mapping 2 MiB beforehand never pays" in slot
    memslots = starting(lines, "Memslots")
    assert "4,000 slots, 2 MiB" in memslots
    assert "100 slots" not in memslots
    assert "nothing to be told. Not told apart: 10 kinds" in starting(lines, "An exit ÷")


def test_a_noisy_sweep_advises_nothing():
    lines = lines_of(simulated(process_sd=1.0, round_sd=1.0))

    assert "no larger window surely pays" in starting(lines, "#PF: ")
    assert "is not to be told (÷ a fault:" in starting(lines, "EPT violation: ")
    assert "nothing to be told. Not told apart" in starting(lines, "A write fault ÷")


def test_why_there_is_no_answer():
    lines = lines_of(simulated(processes=2, complete=False))

    assert len(lines) == 2
    assert "did not come to its end" in lines[0]
    assert lines[1].startswith("No answer: 2 processes")


def test_exits_alone_have_a_shorter_answer():
    lines = lines_of(simulated(subject="exits"))

    assert [line.split()[0] for line in lines] == ["This", "An", "An", "Not"]


def test_every_kind_of_exit_has_a_name():
    assert list(EXIT_NAMES) == list(ALL_NAMES)
    assert subject_text(FAULTS, "pf") == "guest #PF, entries for a window"
    assert subject_text(MEMSLOTS, "4000") == "4,000 memslots"


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0.5, "0.50 ns"), (12.34, "12.3 ns"), (1234, "1.23 us"), (45e6, "45.0 ms"), (5e9, "5000 ms")],
)  # fmt: skip
def test_times_have_three_digits(ns: float, text: str):
    assert ns_text(ns) == text
