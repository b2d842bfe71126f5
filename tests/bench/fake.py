"""Fake benchmarks: samples as a test wants them, and a record of what the runner did."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmmm.bench.case import RATIO, Case, Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvmmm.bench.case import Probe, Sample


class FakeProbes:
    """Probes whose samples come from a function of how often they were called.

    Attributes:
        calls: Names in the order in which they were called.
        is_open: Whether the group's context is open now.
        gc_was_on: Whether any call saw the garbage collector enabled.
        cpus: The affinities seen by calls.
    """

    def __init__(self, **samples: Callable[[int], Sample]) -> None:
        self._samples = samples
        self.calls: list[str] = []
        self.is_open = False
        self.gc_was_on = False
        self.cpus: list[set[int]] = []

    def _probe(self, name: str) -> Probe:
        def call() -> Sample:
            self.calls.append(name)
            self.gc_was_on |= gc.isenabled()
            self.cpus.append(os.sched_getaffinity(0))
            return self._samples[name](self.calls.count(name))

        return call

    @contextmanager
    def open(self) -> Iterator[Mapping[str, Probe]]:
        self.is_open = True
        try:
            yield {name: self._probe(name) for name in self._samples}
        finally:
            self.is_open = False


def ratio_case(name: str = "fake/ratio", **options: object) -> Case:
    """Return a case that divides the time `t` of probe `p` by that of probe `f`."""
    wanted: dict[str, object] = {
        "unit": RATIO,
        "goal": 2.0,
        "product": ("p", "t"),
        "floor": ("f", "t"),
    }
    return Case(name, **(wanted | options))  # type: ignore[arg-type]


def group_of(probes: FakeProbes, cases: Sequence[Case], *, rounds: int = 5) -> Group:
    """Return a group over fake probes."""
    return Group("fake", cases, open=probes.open, rounds=rounds, quick_rounds=2)
