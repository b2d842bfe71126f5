"""One figure at a time: of memory that never was, and of real guests."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.crossover.worker import Job
from kvmmm.bench.economics.plan import plan_of
from kvmmm.bench.economics.probes import Exits, Guests, Touches
from kvmmm.bench.economics.worker import COMMAND
from kvmmm.bench.fault_grounds import Ground
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_needs_kvm = [
    pytest.mark.kvm,
    pytest.mark.slow,
    pytest.mark.skipif("KVMMM_TEST_NPT" in os.environ, reason="an emulated CPU has no times"),
]


class NoMemory(Ground):
    """Memory whose touches cost 1,000 ns and its faults 7,000 more: it says so at once."""

    start = 1 << 30
    length_bytes = 16 * HUGE_PAGE_BYTES

    def __init__(self) -> None:
        self.there: set[int] = set()
        self.window = 0
        self.faults = 0
        self.n_forgotten = 0

    def set_window(self, window_bytes: int) -> None:
        self.window = window_bytes

    def forget(self) -> None:
        self.there.clear()
        self.n_forgotten += 1

    def serve(self, addr: int) -> None:
        self.there.add(addr // self.window)

    def n_faults(self) -> int:
        return self.faults

    def run(self, start: int, n: int, stride_bytes: int, *, write: bool) -> int:
        assert write
        before = self.faults
        for addr in range(start, start + n * stride_bytes, stride_bytes):
            if addr // self.window not in self.there:
                self.serve(addr)
                self.faults += 1
        return 1000 * n + 7000 * (self.faults - before)

    def settle(self, start: int, n: int, stride_bytes: int) -> None:
        pass


@pytest.mark.parametrize("window", [PAGE_BYTES, 1 << 16, HUGE_PAGE_BYTES])
def test_touches_cost_what_they_cost(window: int):
    touches = Touches(NoMemory(), window, write=True)

    assert touches.sample("page", 1, 2) == 1000 + 7000 * PAGE_BYTES / window
    assert touches.sample("fault2", 1, 2) == 7000
    assert 1000 <= touches.sample("beforehand", 1, 2) < 1e6
    assert touches.sample("map2", 1, 2) > 0


def test_a_fault_and_a_window_mapped_beforehand_are_measured_side_by_side():
    ground = NoMemory()
    touches = Touches(ground, PAGE_BYTES, write=True, in_order=False)
    assert touches.variants == ["fault", "fault2", "map", "map2"]

    for variant in ("map", "fault2", "fault", "map2"):
        touches.sample(variant, 1, 0)
    assert ground.n_forgotten == 4  # two measurements
    # The next round has nothing from this one, whatever was left of it.
    touches.sample("fault", 2, 0)
    touches.sample("map", 3, 0)
    assert ground.n_forgotten == 8


def test_an_exit_is_a_median_of_turns():
    def turns() -> Iterator[float]:
        yield from (3.0, 9.0, 1.0)

    product = turns()
    exits = Exits(lambda: next(product), None, 3)
    assert exits.variants == ["exit", "exit2"]
    assert exits.sample("exit2", 0, 0) == 3
    assert Exits(lambda: 1.0, lambda: 2.0).sample("floor", 0, 0) == 2


class TestGuests:
    pytestmark = _needs_kvm

    @pytest.mark.usefixtures("no_leak")
    def test_every_cell_can_be_measured_and_nothing_takes_no_time(self):
        with Guests() as guests:
            for cell in plan_of("faults", quick=True).cells:
                probe = guests.probe(cell)
                ns = {variant: probe.sample(variant, 1, 2) for variant in probe.variants}
                # A difference may be lost in noise; once is not always.
                assert all(ns[name] > 0 for name in ns if not name.startswith("fault")), cell


class TestWorker:
    pytestmark = _needs_kvm

    def test_a_process_writes_lines_of_the_results_file(self):
        cells = [c for c in plan_of("exits", quick=True).cells if c.layout in {"out", "hlt"}]
        job = Job(3, cells, [0, 1], time.monotonic() + 30, 1, None)
        run = subprocess.run(
            COMMAND, input=job.as_json().encode(), capture_output=True, timeout=60, check=True
        )
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        kinds = [line["kind"] for line in lines]
        assert kinds == [
            "ready",
            "sample",
            "sample",
            "canary",
            "sample",
            "sample",
            "canary",
            "ended",
        ]
        for line in lines:
            if line["kind"] == "sample":
                assert (line["process"], set(line["ns"])) == (
                    3, {"exit", "exit2", "floor", "floor2"},
                )  # fmt: skip
