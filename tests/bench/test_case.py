"""Cases as data: what becomes of one round's samples."""

from __future__ import annotations

import pytest

from kvmmm.bench.case import EACH, MS, NS, RATIO, Case, Group
from tests.bench.fake import FakeProbes, group_of, ratio_case


@pytest.mark.parametrize(
    ("unit", "expected"), [(RATIO, 2.5), (NS, 3_000_000.0), (MS, 3.0)], ids=["ratio", "ns", "ms"]
)
def test_a_value_compares_product_and_floor(unit: str, expected: float) -> None:
    case = Case("x/y", unit=unit, goal=1, product=("p", "t"), floor=("f", "t"))

    assert case.value_of({"t": 5_000_000}, {"t": 2_000_000}) == expected


def test_without_a_floor_the_time_itself_counts() -> None:
    case = Case("x/y", unit=MS, goal=1, product=("p", "t"))

    assert case.value_of({"t": 5_000_000}, None) == 5.0


def test_only_keeps_the_named_cases_and_all_else() -> None:
    group = group_of(FakeProbes(), [ratio_case("fake/a"), ratio_case("fake/b")], rounds=7)

    chosen = group.only({"fake/b"})

    assert isinstance(chosen, Group)
    assert [case.name for case in chosen.cases] == ["fake/b"]
    assert (chosen.rounds, chosen.quick_rounds, chosen.open) == (7, 2, group.open)


def test_a_case_of_several_times_has_one_of_each() -> None:
    case = ratio_case(product=("p", EACH), floor=("f", EACH), each=("in", "out"), better="higher")

    one = case.one_of_each("out")

    assert (one.product, one.floor, one.each) == (("p", "out"), ("f", "out"), ())
    assert (one.name, one.unit, one.goal, one.better) == (case.name, case.unit, 2.0, "higher")
    assert one.value_of({"in": 1, "out": 6}, {"in": 1, "out": 2}) == 3.0
