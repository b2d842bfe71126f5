"""A sweep that never ran, of the shape that a real one has: states, layouts, several variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.record import Cell, Results, Writer
from tests.bench.crossover.simulated import Simulated, cells_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SIZES = [8 << (2 * i) for i in range(10)]
LAYOUTS = [("1", "contiguous"), ("1000", "scattered")]
STATES = ["warm", "mirror-cold", "linear-cold", "cold", "absent"]
VARIANTS = ["mirror", "walk", "process_vm", "file_io"]
SCRIPT_IN_HOST = "</script><script>document.title='broken'</script>@DATA@"
"""What a hostile host might call its CPU: it must come out as text."""


def drawn_cells() -> list[Cell]:
    cells = []
    for layout, order in LAYOUTS:
        for state in STATES:
            for locality in ("hot", "spread"):
                cells += cells_of(
                    SIZES, layout=layout, order=order, residency=state, locality=locality
                )
    cells += cells_of(SIZES, operation="copy_out")
    cells += cells_of(SIZES[:5], caller="python")
    cells += cells_of([4], operation="swap")
    return cells


def few_cells() -> list[Cell]:
    """Return cells of the three states that matter most: quick to analyse."""
    states = ("warm", "mirror-cold", "cold")
    return [cell for state in states for cell in cells_of(SIZES, residency=state)]


def drawn_ns(cell: Cell, variant: str) -> float:
    """Return times like those of the prototypes: a cold mirror costs 10 us, faults 1.5 us."""
    if variant in ("process_vm", "file_io"):
        return {"process_vm": 1500.0, "file_io": 500.0}[variant] + cell.bytes / 15
    n_pages = 1 + cell.bytes // 4096
    cold_linear = cell.residency in ("linear-cold", "cold", "absent")
    cold_mirror = cell.residency in ("mirror-cold", "cold", "absent")
    ns = 6 + cell.bytes / 30 + (2500.0 * n_pages if cell.residency == "absent" else 0)
    if variant == "mirror":
        return ns + (8500 + 250 * n_pages if cold_mirror else 0)
    look_up = 3.0 if cell.layout == "1" else 12.0 * n_pages
    look_up *= 2 if variant == "walk" else 1
    look_up -= 0.004 * cell.bytes if cell.layout == "1" and variant == "internal" else 0
    return ns + look_up + (1500 + 250 * n_pages if cold_linear else 0)


def drawn_results(
    *, seed: int = 2, ns: Callable[[Cell, str], float] = drawn_ns, process_sd: float = 0.01,
    cpu: str = "AMD EPYC Milan", kernel: str = "6.18", processes: int = 5,
    cells: Sequence[Cell] | None = None,
) -> Results:  # fmt: skip
    simulated = Simulated(
        ns,
        seed=seed,
        variants=VARIANTS,
        rounds=7,
        process_sd=process_sd,
        processes=processes,
        varied=False,
    )
    results = simulated.results(cells or drawn_cells())
    host = {"cpu": cpu, "kernel": kernel, "kvm": {"kind": "pvm"}, "n_cpus": 2, "thp": None}
    return results._replace(header=results.header._replace(host=host))


def write_results(folder: Path, results: Results) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder / "results.jsonl") as writer:
        for record in (results.header, *results.cells.values(), *results.samples):
            writer.write(record)
        if results.footer:
            writer.write(results.footer)
    return folder
