"""Names of benchmarks and cases, and the goals they carry."""

from __future__ import annotations

import pytest

from kvmmm.bench.registry import BENCHMARKS, UnknownBenchmarkError, groups_of

GOALS = {
    "startup/first_exit": ("ratio", 1.25),
    "startup/close": ("ratio", 1.2),
    "startup/import": ("ms", 40),
    "exits/pio": ("ns", 2500),
    "exits/pio_data": ("ns", 1200),
    "exits/console_64k": ("ratio", 2),
    "exits/console_lines": ("ratio", 3),
    "exits/console_latency": ("ms", 20),
    "paging/touch_64m": ("ratio", 1.2),
    "paging/touch_64m_fresh": ("ratio", 1.1),
    "mm/find_scaling": ("ratio", 2),
    "mm/find_100k": ("ratio", 5),
    "mm/fault_scaling": ("ratio", 2.5),
    "mm/unmap_scaling": ("ratio", 2.5),
    "mm/ring3_fault": ("ratio", 1.25),
    "mm/ring3_fault_handler": ("ns", 8000),
    "mm/ring3_fault_handler_alloc": ("ns", 15000),
    "mm/cow_break_page": ("ratio", 1.3),
    "mm/cow_break_window": ("ratio", 1.15),
    "mm/fork_1g": ("ms", 5),
    "mm/fork_after": ("ratio", 1.5),
    "copies/small_slice": ("ratio", 1.25),
    "copies/small_unicorn": ("ratio", 18),
    "copies/small_process_vm": ("ratio", 50),
    "copies/large_memcpy": ("ratio", 0.95),
    "copies/pma_scaling": ("ratio", 1.15),
    "copies/spinner": ("ratio", 1.15),
    "copies/cold_64k": ("ratio", 1.15),
    "copies/cold_64": ("ratio", 2.5),
    "copies/mirror_first_touch": ("ratio", 1.2),
    "copies/vec_16x64": ("ratio", 3),
    "policy/calibrated_worst": ("ratio", 1.05),
    "policy/default_worst": ("ratio", 1.15),
}
HIGHER = {"copies/small_unicorn", "copies/small_process_vm", "copies/large_memcpy"}


def test_every_goal_has_its_case() -> None:
    cases = {case.name: case for group in groups_of("all") for case in group.cases}

    with_goal = {c.name: (c.unit, c.goal) for c in cases.values() if c.goal is not None}
    assert with_goal == GOALS
    assert {c.name for c in cases.values() if c.better == "higher"} == HIGHER
    assert cases["exits/console_lines"].limits == {"exits": 64}
    assert cases["paging/touch_64m"].limits == {"exits": 40}


def test_kinds_and_ways_are_told_without_a_goal() -> None:
    told = {c.name for group in groups_of("all") for c in group.cases if c.goal is None}

    kinds = ("out", "in", "out_nobody", "mmio_read", "mmio_write", "page_fault", "syscall")
    for kind in (*kinds, "out_ring0", "hlt", "deadline"):
        assert {f"exits/kind_{kind}", f"exits/over_{kind}"} <= told
    assert "exits/kind_ioeventfd" in told
    for way in ("slot", "lazy", "pf"):
        assert {f"faults/{way}_{a}_{w}" for a in ("read", "write") for w in ("4k", "2m")} <= told
    assert {f"faults/slots_{count}" for count in (1, 100, 1000, 4000)} <= told


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_cases_of_its_own_name(name: str) -> None:
    cases = [case for group in groups_of(name) for case in group.cases]

    assert cases
    assert all(case.name.startswith(f"{name}/") for case in cases)
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.note for case in cases)


def test_one_case_can_be_asked_for() -> None:
    [group] = groups_of("exits/pio")

    assert [case.name for case in group.cases] == ["exits/pio"]


@pytest.mark.parametrize("name", ["nonsense", "exits/nonsense", "", "nonsense/pio"])
def test_an_unknown_name_lists_those_that_there_are(name: str) -> None:
    known = ", ".join([*BENCHMARKS, "all"])
    with pytest.raises(UnknownBenchmarkError, match=f"there are {known}") as caught:
        groups_of(name)

    assert caught.value.name == name
