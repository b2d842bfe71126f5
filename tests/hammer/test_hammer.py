"""Removal works: no vCPU reads or writes through a translation that was taken away.

A guest in ring 3 stamps and reads in a loop, on one vCPU or on two, while the host unmaps, remaps,
protects, moves, forks and truncates under it (`hammer`).
"""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.hammer.hammer import Hammer
from tests.hammer.machine import UserMachine
from tests.hammer.watch import Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(600), pytest.mark.usefixtures("hasty_threads")]

PAGE, HUGE = 4096, 2 << 20


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Have threads of Python take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0003)
    yield
    sys.setswitchinterval(before)


def nap() -> None:
    if random.random() < 0.1:
        time.sleep(random.random() * 0.0001)


def test_hammer():
    import os
    n = int(os.environ.get("N", 300)); seed=int(os.environ.get("SEED", 1))
    machine = UserMachine(int(os.environ.get("V", 1)), int(os.environ.get("STRIDE", PAGE)), nap, max_leaf_bytes=int(os.environ.get("LEAF", PAGE)), has_shootdown="NOSHOOT" not in os.environ)
    hammer = Hammer(machine, seed)
    t = time.monotonic()
    import cProfile, pstats
    pr = cProfile.Profile()
    if "PROF" in os.environ: pr.enable()
    hammer.run(n)
    pr.disable()
    if "PROF" in os.environ: pstats.Stats(pr).sort_stats("tottime").print_stats(25)
    print(time.monotonic() - t, "s", hammer.counts, hammer.n_turns, machine.n_faults, machine.n_refused, machine.space.statistics, [ (s.n_failed, s.n_stops) for s in machine.stampers], hammer.cells.graveyard.n_buried)
    machine.close()
