"""What a sweep of first touches and exits measures."""

from __future__ import annotations

import pytest

from kvmmm.bench.crossover.plan import MODES, due, parts_of
from kvmmm.bench.economics.plan import (
    EXITS,
    FAULTS,
    MEMSLOTS,
    SUBJECTS,
    plan_of,
)
from kvmmm.bench.exit_kinds import ALL_NAMES
from kvmmm.bench.fault_answer import SLOT_COUNTS, WAYS, WINDOWS
from kvmmm.bench.registry import BENCHMARKS, SWEEPS


def test_every_way_window_and_access_every_count_and_every_kind():
    cells = plan_of("faults", quick=False).cells

    faults = {(c.layout, c.operation, c.bytes) for c in cells if c.order == FAULTS}
    assert faults == {(way, a, w) for way in WAYS for a in ("read", "write") for w in WINDOWS}
    counts = {(c.layout, c.bytes) for c in cells if c.order == MEMSLOTS}
    assert counts == {(str(n), w) for n in SLOT_COUNTS for w in (4096, 2 << 20)}
    assert [c.layout for c in cells if c.order == EXITS] == list(ALL_NAMES)
    assert len({c.id for c in cells}) == len(cells)


def test_exits_alone():
    assert {c.order for c in plan_of("exits", quick=True).cells} == {EXITS}


@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_a_plan_is_one_that_the_sweep_can_run(subject: str):
    quick, whole = (plan_of(subject, quick=is_quick) for is_quick in (True, False))

    assert quick.seconds < 60
    assert whole.seconds < 180
    assert quick.n_processes == whole.n_processes == 5
    assert quick.cells == whole.cells
    assert quick.mode != whole.mode
    assert not {quick.mode, whole.mode} & set(MODES)
    # Everything in every round, and in every process.
    assert due(whole.cells, 3) == list(whole.cells)
    assert len(parts_of(whole.cells)) == 1


def test_what_is_a_sweep_is_a_benchmark_as_well():
    assert set(SWEEPS) == set(SUBJECTS)
    assert set(SWEEPS) <= set(BENCHMARKS)
