"""Sweeps of first touches and exits that never ran: known costs, effects of processes, noise."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.record import Cell, Footer, Header, Results, Sample, Writer
from kvmmm.bench.economics.plan import (
    BEFOREHAND,
    EXIT,
    EXITS,
    FAULT,
    FAULTS,
    FLOOR,
    MAP,
    PAGE,
    again,
    plan_of,
)
from kvmmm.bench.fault_answer import PF
from kvmmm.hostarch.addr import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOST = {"cpu": "AMD EPYC Milan", "kernel": "6.18", "kvm": "KVM of tests", "n_cpus": 2, "thp": None}


def costs_of(cell: Cell) -> dict[str, float]:
    """Return costs like those of a real host: a #PF is cheaper, its window dearer by the page."""
    if cell.order == EXITS:
        return {EXIT: 3000.0, FLOOR: 1500.0} if cell.layout != "ioeventfd" else {EXIT: 500.0}
    n_pages = cell.bytes / PAGE_BYTES
    fault = 8000.0 + 10 * n_pages if cell.layout == PF else 20_000.0
    costs = {FAULT: fault, MAP: 0.3 * fault}
    if cell.order == FAULTS:
        costs |= {PAGE: 500 + fault / n_pages, BEFOREHAND: 500 + 0.3 * fault / n_pages}
    return costs


def simulated(
    costs: Callable[[Cell], dict[str, float]] = costs_of, *, subject: str = "faults",
    processes: int = 5, rounds: int = 9, process_sd: float = 0.01, round_sd: float = 0.02,
    seed: int = 1, cpu: str = "AMD EPYC Milan", complete: bool = True,
) -> Results:  # fmt: skip
    """Return a sweep in which everything costs what `costs` says, times noise."""
    plan = plan_of(subject, quick=True)
    draw = random.Random(seed)
    samples = []
    for process in range(processes):
        for cell in plan.cells:
            truth = costs(cell)
            effects = {name: draw.gauss(0, process_sd) for name in truth}
            for number in range(rounds):
                ns = {
                    label: value * math.exp(effects[name] + draw.gauss(0, round_sd))
                    for name, value in truth.items()
                    for label in (name, again(name))
                }
                samples.append(Sample(cell.id, process, number, ns))
    header = Header(
        "0.1.0", None, "2026-01-01T00:00:00+00:00", plan.mode, 1, {**HOST, "cpu": cpu}
    )  # fmt: skip
    footer = Footer(complete=complete, seconds=1.0)
    return Results(header, {cell.id: cell for cell in plan.cells}, samples, [], footer, [])


def write_results(folder: Path, results: Results) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder / "results.jsonl") as writer:
        for record in (results.header, *results.cells.values(), *results.samples):
            writer.write(record)
        if results.footer:
            writer.write(results.footer)
    return folder
