"""Which benchmarks there are. Modules are imported when their benchmark is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from kvmmm.bench.case import Group

BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "startup": ("from nothing to a guest's first exit, and back", ("startup",)),
    "exits": ("what an exit costs, each kind, and a console", ("exits", "exit_kinds", "console")),
    "paging": ("what memory costs that appears on first touch", ("paging",)),
    "faults": ("what a first touch costs, by which way, how much at a time", ("faults",)),
    "mm": (
        "what the memory manager costs: look-ups, faults, copy-on-write, fork",
        ("scaling", "fault", "fork"),
    ),
    "copies": (
        "what a copy between host and guest costs",
        ("copies_small", "copies_peers", "copies_large", "copies_many", "copies_cold"),
    ),
    "policy": ("what a choice of mechanism costs, over whole workloads", ("policies",)),
}
"""By name: what it measures, and the modules whose GROUPS it runs."""

COMMANDS: dict[str, tuple[str, str]] = {
    "crossover": ("kvmmm.bench.crossover.command", "where copies through the mirror win"),
    "compare": ("kvmmm.bench.crossover.command", "several crossover sweeps side by side"),
}
"""Commands of their own below `bench`: the module that has one of that name, and what it does."""

SWEEPS = {"faults": "kvmmm.bench.economics.command", "exits": "kvmmm.bench.economics.command"}
"""Benchmarks that --out makes a sweep of several processes, with a report: whose `sweep` it is."""

ALL = "all"


class UnknownBenchmarkError(KvmmmError, ValueError):
    """No benchmark or case has that name.

    Attributes:
        name: What was asked for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        known = ", ".join([*BENCHMARKS, ALL, *COMMANDS])
        super().__init__(
            f"no benchmark is called {name!r}: there are {known}; and single cases, as exits/pio"
        )


def groups_of(name: str) -> list[Group]:
    """Return the groups behind a benchmark (`exits`), one case (`exits/pio`), or `all`.

    Raises:
        UnknownBenchmarkError: There is none; the message lists them.
    """
    benchmark, _, case_name = name.partition("/")
    if name == ALL:
        return [group for known in BENCHMARKS for group in groups_of(known)]
    if benchmark not in BENCHMARKS:
        raise UnknownBenchmarkError(name)
    modules = [importlib.import_module(f"kvmmm.bench.{m}") for m in BENCHMARKS[benchmark][1]]
    groups: list[Group] = [group for module in modules for group in module.GROUPS]
    if not case_name:
        return groups
    chosen = [group.only({name}) for group in groups]
    if not any(group.cases for group in chosen):
        raise UnknownBenchmarkError(name)
    return [group for group in chosen if group.cases]
