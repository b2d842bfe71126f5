"""Sweeps of two cells, with a worker that measures nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover import sweep
from kvmmm.bench.crossover.plan import plan_of

if TYPE_CHECKING:
    from kvmmm.bench.crossover.plan import Plan
    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.sweep import Outcome

FAKE = Path(__file__).with_name("fake_worker.py")
HOST = {"cpu": "none"}


def fake(kind: str) -> list[str]:
    return [sys.executable, str(FAKE), kind]


def small_plan(**changes: Any) -> Plan:
    the_plan = plan_of("self-check")
    return the_plan._replace(
        cells=the_plan.cells[:2], rounds=3, n_processes=2, seconds=20.0
    )._replace(**changes)


def run(folder: Path, kind: str = "works", **options: Any) -> Outcome:
    the_plan = options.pop("plan", small_plan())
    return sweep.run(the_plan, folder, host=HOST, seed=1, command=fake(kind), **options)


def keys(results: Results) -> list[tuple[str, int, int]]:
    return [(one.cell, one.process, one.round) for one in results.samples]


def processes(results: Results) -> list[dict[str, Any]]:
    return [line for line in results.others if line["kind"] == "process"]
