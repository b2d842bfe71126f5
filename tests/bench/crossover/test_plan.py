"""Which cells there are, and that every state, size and caller that was asked for is among them."""

from __future__ import annotations

import itertools

import pytest

from kvmmm.bench.crossover import geometry, plan
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES


@pytest.mark.parametrize("mode", plan.MODES)
def test_cells_are_different_and_numbered(mode: str):
    cells = plan.plan_of(mode).cells
    assert [cell.id for cell in cells] == [f"c{n}" for n in range(len(cells))]
    assert len({cell._replace(id="") for cell in cells}) == len(cells)


@pytest.mark.parametrize("mode", [plan.QUICK, plan.DEFAULT, plan.FULL])
def test_every_dimension_is_swept(mode: str):
    cells = plan.plan_of(mode).cells
    assert {cell.operation for cell in cells} == {*plan.RANGES, *plan.WORDS}
    assert {cell.residency for cell in cells} == {
        "warm", "mirror-cold", "linear-cold", "cold", "absent",
    }  # fmt: skip
    assert {cell.caller for cell in cells} == {"c", "python"}
    assert {cell.locality for cell in cells} == {"hot", "spread"}
    assert {"1", "1000", "60000"} <= {cell.layout for cell in cells}
    assert {cell.order for cell in cells} == {"contiguous", "scattered"}
    assert {cell.page_bytes for cell in cells} == {PAGE_BYTES}


@pytest.mark.parametrize("mode", plan.MODES)
def test_the_thresholds_of_gvisor_are_among_the_sizes_of_every_curve_of_ranges(mode: str):
    by_curve: dict[object, set[int]] = {}
    for cell in plan.plan_of(mode).cells:
        by_curve.setdefault(cell.dims, set()).add(cell.bytes)
    for dims, sizes in by_curve.items():
        if dims[0] in plan.WORDS:
            assert sizes == {4}
        elif max(sizes) >= 32 << 10 and len(sizes) > 1:
            assert {512, 32 << 10} <= sizes, dims


def test_the_full_plan_has_every_layout_in_both_orders():
    cells = plan.plan_of(plan.FULL).cells
    layouts = {(cell.layout, cell.order) for cell in cells}
    # One segment has no order; the rest has both.
    assert layouts == {
        (n, order) for n in ("1", "10", "1000", "60000") for order in ("contiguous", "scattered")
    } - {("1", "scattered")}
    short = {cell.residency for cell in cells if (cell.layout, cell.order) == plan.SHORT_60000}
    assert short == {"warm", "mirror-cold", "linear-cold", "cold"}


def test_no_process_needs_more_vmas_than_there_are():
    for mode in plan.MODES:
        parts = plan.parts_of(plan.plan_of(mode, huge_pages=True).cells)
        assert len(parts) == (2 if mode == plan.FULL else 1)
        for cells in parts:
            layouts = {(cell.layout, cell.order, cell.page_bytes) for cell in cells}
            assert sum(int(layout) for layout, _, _ in layouts) < 64_000
    assert plan.parts_of(()) == []


def test_how_long_a_plan_takes_is_known_about():
    assert plan.estimate_s(plan.plan_of(plan.QUICK)) <= 60
    hours = plan.estimate_s(plan.plan_of(plan.FULL)) / 3600
    assert 1 < hours < 24


def test_long_segments_of_huge_pages_are_made_of_them():
    # Or the mirror could not have such pages, and a ratio would compare two sizes of pages.
    for layout in (plan.ONE, plan.TEN):
        found = geometry.geometry_of(*layout, HUGE_PAGE_BYTES)
        assert not found.segment_bytes % HUGE_PAGE_BYTES
        assert found.length_bytes == geometry.length_bytes(*layout, HUGE_PAGE_BYTES)
    assert geometry.geometry_of(*plan.THOUSAND, HUGE_PAGE_BYTES).segment_bytes < HUGE_PAGE_BYTES
    cells = plan.plan_of(plan.FULL, huge_pages=True).cells
    for cell in cells:
        length_bytes = geometry.length_bytes(cell.layout, cell.order, cell.page_bytes)
        assert cell.bytes * 4 <= length_bytes


def test_the_full_plan_goes_from_8_bytes_to_64_mib():
    sizes = {cell.bytes for cell in plan.plan_of(plan.FULL).cells} - {4}
    assert sizes == {1 << n for n in range(3, 27)}
    assert max(cell.bytes for cell in plan.plan_of(plan.DEFAULT).cells) == 64 << 20


def test_budgets():
    assert (plan.plan_of(plan.QUICK).seconds or 0) <= 60
    assert (plan.plan_of(plan.DEFAULT).seconds or 0) <= 600
    assert (plan.plan_of(plan.SELF_CHECK).seconds or 0) <= 30
    assert all(plan.plan_of(mode).n_processes >= 5 for mode in plan.MODES)


def test_words_are_small_and_copies_leave_a_choice_of_places():
    for cell in plan.plan_of(plan.FULL).cells:
        assert (cell.bytes == geometry.WORD_BYTES) == (cell.operation in plan.WORDS)
        assert cell.bytes * 4 <= geometry.length_bytes(cell.layout, cell.order)


def test_huge_pages_are_measured_where_there_are_some():
    cells = plan.plan_of(plan.DEFAULT, huge_pages=True).cells
    assert {cell.page_bytes for cell in cells} == {PAGE_BYTES, HUGE_PAGE_BYTES}


def test_large_cells_take_turns_and_none_is_forgotten():
    the_plan = plan.plan_of(plan.FULL)
    cells = the_plan.cells
    rounds = [plan.due(cells, n) for n in range(10)]
    assert len(rounds[0]) < len(cells)
    assert set(itertools.chain(*rounds)) == set(cells)
    small = [cell for cell in cells if cell.bytes <= 4096]
    assert all(set(small) <= set(one) for one in rounds)


@pytest.mark.parametrize("layout", plan.ALL_LAYOUTS)
def test_neighbours_in_the_guest_are_none_in_the_arena(layout: tuple[str, str]):
    found = geometry.geometry_of(*layout)
    assert len(found.order) == int(layout[0])
    assert sorted(found.order) == list(range(len(found.order)))
    assert all(b != a + 1 for a, b in itertools.pairwise(found.order))
    assert found.length_bytes == geometry.length_bytes(*layout) <= geometry.SPAN_BYTES
    assert found == geometry.geometry_of(*layout)
