"""`bench faults`: what it concludes from samples; that real faults are what it says they are."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvmmm.bench import fault_grounds, faults, toucher
from kvmmm.bench.command import bench
from kvmmm.bench.fault_answer import (
    SLOT_COUNTS,
    WINDOW_NAMES,
    WINDOWS,
    Estimate,
    Way,
    tell_slot_counts,
    tell_windows,
)
from kvmmm.bench.fault_grounds import Ground, SlotGround
from kvmmm.bench.fault_table_grounds import LazySlotGround, PageFaultGround
from kvmmm.bench.guest import BenchmarkError
from kvmmm.bench.runner import record_of
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmmm.bench.case import Group, Sample
    from kvmmm.bench.record import Record

_WINDOWS_GROUP, _SLOTS_GROUP = faults.GROUPS
_needs_kvm = [
    pytest.mark.kvm,
    pytest.mark.usefixtures("no_leak"),
    pytest.mark.skipif("KVMMM_TEST_NPT" in os.environ, reason="an emulated CPU has no times"),
]
_LENGTH = 4 << 20


def _sample(
    fault_ns: Callable[[int], float], *, page_ns: float = 1000, map_ns: float = 20_000
) -> dict[str, float]:
    """Return what a round would measure where a fault of a window costs `fault_ns(window)`."""
    sample = {"there": page_ns, "beforehand": page_ns + map_ns / 512}
    for window, name in WINDOW_NAMES.items():
        sample[f"fault_{name}"] = fault_ns(window)
        sample[f"page_{name}"] = page_ns + fault_ns(window) * PAGE_BYTES / window
        sample[f"map_{name}"] = map_ns
    return sample


def _records(group: Group, sample_of: Callable[[str, int], Sample], n: int = 9) -> list[Record]:
    probes = {case.product[0] for case in group.cases}
    samples = {
        (probe, label): [sample_of(probe, i) for i in range(n)]
        for probe in probes
        for label in "AB"
    }
    return [record_of(case, samples) for case in group.cases]


def test_an_estimate_holds_the_median_and_forgets_outliers() -> None:
    values = [*range(100, 160), 10_000]
    estimate = Estimate(values)

    assert estimate.value == 130
    assert 115 < estimate.low < 130 < estimate.high < 145


def test_few_values_make_no_narrow_interval() -> None:
    estimate = Estimate([3, 1, 2, 9])

    assert (estimate.low, estimate.high) == (1, 9)


def test_a_window_that_costs_no_more_than_a_page_is_taken() -> None:
    records = _records(_WINDOWS_GROUP, lambda _probe, _i: _sample(lambda _window: 50_000.0))
    way = Way(records, "pf_write")

    assert way.advised() == HUGE_PAGE_BYTES
    assert way.break_even(HUGE_PAGE_BYTES).value == 1
    assert way.enough() == HUGE_PAGE_BYTES
    assert way.share(HUGE_PAGE_BYTES).value == pytest.approx(0.4)


def test_a_window_that_costs_by_its_pages_is_not() -> None:
    # 1 us a page: a copy, say. 64 KiB cost 1.5 faults of a page, 2 MiB 17.
    records = _records(
        _WINDOWS_GROUP, lambda _probe, _i: _sample(lambda w: 30_000.0 + w / PAGE_BYTES * 1000)
    )
    way = Way(records, "slot_write")

    assert way.advised() == 64 << 10
    assert way.break_even(HUGE_PAGE_BYTES).value == pytest.approx(542 / 31)


def test_an_uncertain_break_even_advises_nothing_larger() -> None:
    def sample(_probe: str, i: int) -> Sample:
        return _sample(lambda w: 50_000.0 * (1 if w == PAGE_BYTES else 1 + 2 * (i % 3)))

    assert Way(_records(_WINDOWS_GROUP, sample), "pf_write").advised() == PAGE_BYTES


def test_rounds_are_compared_with_themselves() -> None:
    # A wave of load that triples everything in half of the rounds is not seen in a ratio.
    def sample(_probe: str, i: int) -> Sample:
        load = 3 if i % 2 else 1
        return _sample(lambda w: load * (50_000.0 if w == PAGE_BYTES else 60_000.0))

    found = Way(_records(_WINDOWS_GROUP, sample), "pf_write").break_even(HUGE_PAGE_BYTES)

    assert (found.low, found.value, found.high) == (1.2, 1.2, 1.2)


def test_the_text_answers_for_every_way_and_says_how_noisy_it_is() -> None:
    text = tell_windows(_records(_WINDOWS_GROUP, lambda _p, _i: _sample(lambda _w: 50_000.0)))

    assert text.startswith("How large should a window be here?")
    for way in ("EPT violation, memslot: 2 MiB.", "EPT violation, lazy slot: 2 MiB.",
                "guest #PF: 2 MiB."):  # fmt: skip
        assert way in text
    assert "it always pays" in text
    assert "more than 40% [40%, 40%]" in text
    assert "Noise: the same measured twice differs by 0.0%, at worst 0.0%" in text
    assert "over 9 rounds" in text
    assert text.count("\n    4 KiB") + text.count("\n     4 KiB") == 4


def test_the_text_says_that_a_busy_host_told_little() -> None:
    def sample(_probe: str, i: int) -> Sample:
        return _sample(lambda w: 50_000.0 * (1 + 0.9 * (i % 3)) + w / PAGE_BYTES)

    records = _records(_WINDOWS_GROUP, sample)
    for record in records:
        record.aa = 0.2

    assert "measure again when the host is less busy" in tell_windows(records)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0] * 9, "it always pays"),
        ([1.4] * 9, "costs 1.400 [1.400, 1.400] of a page's: it pays if two"),
        ([0.7, 1.1, 1.8] * 3, "the noise hides which is dearer"),
    ],
)
def test_a_cost_is_not_told_more_exactly_than_it_is_known(values: list[float], says: str) -> None:
    def sample(_probe: str, i: int) -> Sample:
        return _sample(lambda w: 50_000.0 * (1 if w == PAGE_BYTES else values[i]))

    assert says in tell_windows(_records(_WINDOWS_GROUP, sample))


def test_the_text_does_not_advise_mapping_beforehand_where_it_is_dearer() -> None:
    records = _records(
        _WINDOWS_GROUP, lambda _p, _i: _sample(lambda w: 10_000.0 + 20 * w / 4096, map_ns=1e6)
    )

    assert "Mapping beforehand never pays." in tell_windows(records)


def test_the_text_about_memslots_has_a_row_for_each_count() -> None:
    def sample(probe: str, _i: int) -> Sample:
        count = int(probe.removeprefix("slots_"))
        return {"slots": max(count, 6), **_sample(lambda _w: 50_000.0 + count)}

    text = tell_slot_counts(_records(_SLOTS_GROUP, sample))

    rows = [line.split()[0] for line in text.splitlines()[3:7]]
    assert rows == ["6", "100", "1,000", "4,000"]
    assert "1.080" in text


def test_every_window_and_way_is_in_the_record() -> None:
    names = {case.name for case in _WINDOWS_GROUP.cases}

    for way in ("slot", "lazy", "pf"):
        for access in ("read", "write"):
            assert f"faults/{way}_{access}_beforehand" in names
            assert {f"faults/{way}_{access}_{w}" for w in WINDOW_NAMES.values()} <= names
    assert (min(WINDOWS), max(WINDOWS)) == (PAGE_BYTES, HUGE_PAGE_BYTES)
    assert (SLOT_COUNTS[0], SLOT_COUNTS[-1]) == (1, 4000)


class TestGrounds:
    pytestmark = _needs_kvm

    @pytest.mark.parametrize("kind", [SlotGround, LazySlotGround, PageFaultGround])
    def test_each_window_is_one_fault_and_no_more(
        self, kind: Callable[[ExitStack, int], Ground]
    ) -> None:
        with ExitStack() as stack:
            ground = kind(stack, _LENGTH)
            n_pages = _LENGTH // PAGE_BYTES
            for window in WINDOWS:
                for write in (True, False):
                    ground.forget()
                    ground.set_window(window)
                    n_faults = _LENGTH // window
                    if n_faults <= 64:
                        ground.touch(
                            ground.start, n_pages, PAGE_BYTES, write=write, n_faults=n_faults
                        )
                        # All of it is there now.
                        ground.touch(ground.start, n_pages, PAGE_BYTES, write=write, n_faults=0)
                    ground.forget()
                    ground.touch(ground.start, 2, window, write=write, n_faults=2)

    @pytest.mark.parametrize("kind", [SlotGround, LazySlotGround, PageFaultGround])
    def test_what_was_mapped_beforehand_makes_no_fault(
        self, kind: Callable[[ExitStack, int], Ground]
    ) -> None:
        with ExitStack() as stack:
            ground = kind(stack, _LENGTH)
            ground.set_window(1 << 16)
            for addr in range(ground.start, ground.start + (1 << 20), 1 << 16):
                ground.serve(addr)
            ground.touch(ground.start, 256, PAGE_BYTES, write=True, n_faults=0)
            with pytest.raises(BenchmarkError, match="0 faults, expected 16"):
                ground.touch(ground.start, 256, PAGE_BYTES, write=True, n_faults=16)

    def test_slots_that_only_count_are_there_and_in_nobodys_way(self) -> None:
        with ExitStack() as stack:
            ground = SlotGround(stack, _LENGTH, n_slots=50)

            assert ground.n_slots == 50
            ground.set_window(HUGE_PAGE_BYTES)
            ground.touch(ground.start, 2, HUGE_PAGE_BYTES, write=True, n_faults=2)
            assert len(ground.vm.vm.memslots) == 52

    @pytest.mark.parametrize(
        ("kind", "module"), [(SlotGround, fault_grounds), (PageFaultGround, toucher)]
    )
    def test_a_guest_that_does_not_end_is_ended(
        self, kind: Callable[[ExitStack, int], Ground], module: object,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        with ExitStack() as stack:
            ground = kind(stack, _LENGTH)
            monkeypatch.setattr(module, "_TIMEOUT_NS", 20_000_000)
            with pytest.raises(BenchmarkError, match="did not come to its mark"):
                ground.run(ground.start, 1 << 40, 0, write=True)


class TestCommand:
    pytestmark = _needs_kvm

    def test_a_case_gives_one_record(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"

        result = CliRunner().invoke(bench, ["faults/pf_write_2m", "--quick", "--json", str(path)])

        assert result.exit_code == 0, result.output
        _host, case = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        assert case["case"] == "faults/pf_write_2m"
        assert case["value"] > 0
        assert case["pf_write_map_2m_ns"] > 0

    @pytest.mark.slow
    def test_the_whole_gives_the_answer(self) -> None:
        result = CliRunner().invoke(bench, ["faults", "--quick"])

        assert result.exit_code == 0, result.output
        assert "How large should a window be here?" in result.output
        assert "What do memslots cost that are there?" in result.output
        assert "faults/" not in result.output
