"""Records: the one form of every benchmark."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.case import NS, Case
from kvmmm.bench.record import Record, write_json_lines

if TYPE_CHECKING:
    from pathlib import Path


def case_of(goal: float | None = 100, *, better: str = "lower", note: str = "") -> Case:
    return Case(
        "exits/pio", unit=NS, goal=goal, better=better, product=("p", "t"), note=note
    )  # fmt: skip


def test_a_record_has_the_form_that_all_benchmarks_share() -> None:
    record = Record(case_of(2500), 1941.23, 0.0123456, 50)

    written = record.as_dict()

    assert list(written.items())[:7] == [
        ("case", "exits/pio"),
        ("value", 1941.0),
        ("unit", "ns"),
        ("goal", 2500),
        ("better", "lower"),
        ("aa", 0.01235),
        ("n", 50),
    ]


@pytest.mark.parametrize(
    ("value", "goal", "better", "met"),
    [
        (100, 100, "lower", True),
        (100.1, 100, "lower", False),
        (100, 100, "higher", True),
        (99.9, 100, "higher", False),
        (99.9, None, "lower", None),
    ],
)
def test_a_goal_is_met_or_not(value: float, goal: float | None, better: str, met: object) -> None:
    record = Record(case_of(goal, better=better), value, 0, 1)

    assert record.met is met
    assert record.as_dict()["met"] is met


def test_a_limit_exceeded_is_a_goal_missed() -> None:
    record = Record(case_of(), 1, 0, 1, over_limit=[("exits", 65, 64)])

    assert record.met is False


def test_figures_have_four_digits_and_large_ones_no_fraction() -> None:
    extra = {"product_ns": 1234567.89, "exits": 123456, "median": 9999.96}
    record = Record(case_of(), 0.123456, 0, 1, extra=extra)

    written = record.as_dict()

    assert written["value"] == 0.1235
    assert written["product_ns"] == 1234568
    assert written["exits"] == 123456
    assert written["median"] == 10000.0


def test_a_file_holds_the_host_and_then_one_case_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    records = [Record(case_of(note="ring 3; a ÷ b"), 1.5, 0.1, 3), Record(case_of(), 2.5, 0.2, 3)]

    write_json_lines(path, {"kernel": "6.18"}, records)

    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"host": {"kernel": "6.18"}}
    assert [json.loads(line)["value"] for line in lines[1:]] == [1.5, 2.5]
    assert json.loads(lines[1])["note"] == "ring 3; a ÷ b"
