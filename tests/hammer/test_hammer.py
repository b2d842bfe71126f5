"""Removal works: no vCPU uses a translation that was taken away.

A guest reads and stamps in a loop, on one vCPU or on two, while the host unmaps, remaps, protects,
moves, forks and truncates under it. `hammer` says what is checked after each operation; what there
is of them stands in `operations` and `children`, what the guest does in `guest`.
"""

from __future__ import annotations

import random
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.mm import debug
from kvmmm.platform.kvm.shootdown_trial import proven_on
from tests.hammer.hammer import Hammer
from tests.hammer.kernel_machine import KernelMachine
from tests.hammer.machine import UserMachine
from tests.hammer.watch import Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Hammering = Callable[..., Hammer]

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("hasty_threads"),
    # It holds references on frames that nobody else must have, as far as the check knows.
    pytest.mark.skipif(debug.ENABLED, reason="KVMMM_DEBUG counts references after each operation"),
]

HUGE = 2 << 20


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Have threads of Python take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0003)
    yield
    sys.setswitchinterval(before)


def nap() -> None:
    """A vCPU's thread is slow at times, between its fault and the answer."""
    if random.random() < 0.1:
        time.sleep(random.random() * 0.0001)


@pytest.fixture
def hammered(is_slow_machine: bool) -> Callable[..., None]:
    """Hammer a machine; fewer rounds where Python is slow."""

    def hammer(machine: Any, n_rounds: int, *, seed: int, n_slow: int = 60, **options: Any) -> None:
        if is_slow_machine:
            n_rounds = n_slow
            options["round_s"] = 0.1
        with Hammer(machine, seed, **options) as one:
            one.run(n_rounds)
            assert one.n_turns > n_rounds // 10  # it was no still life, even where ring 0 is slow
            assert one.n_overlaps >= n_rounds // 50
            assert min(one.counts.values()) > 0

    return hammer


@pytest.mark.npt
@pytest.mark.slow
def test_one_vcpu(hammered: Hammering):
    hammered(UserMachine(1, nap=nap), 10_000, seed=1, n_slow=400)


@pytest.mark.npt
@pytest.mark.slow
def test_two_vcpus(hammered: Hammering):
    hammered(UserMachine(2, fills=True, nap=nap), 10_000, seed=2, n_slow=400)


@pytest.mark.npt
def test_a_vcpu_in_a_fork(hammered: Hammering):
    """One of two vCPUs changes between the parent and its children."""
    hammered(UserMachine(2, hops=True, nap=nap), 1500, seed=3)


@pytest.mark.npt
def test_superpages(hammered: Hammering):
    """They are split and replaced, which takes new roots."""
    machine = UserMachine(2, HUGE // 32, nap=nap, max_leaf_bytes=HUGE)
    hammered(machine, 1000, seed=4)


def test_many_tables(hammered: Hammering):
    """A table for each cell: they come and go, wait, and are used again."""
    machine = UserMachine(2, HUGE, hops=True, nap=nap)
    hammered(machine, 600, seed=5, n_slow=30, round_s=0.04)


@pytest.mark.npt
def test_memslots(hammered: Hammering):
    hammered(KernelMachine(ring=3, nap=nap), 1500, seed=6, can_fork=False)


@pytest.mark.parametrize("ring", [0, 3])
def test_few_memslots(hammered: Hammering, ring: int):
    """None is free most of the time, and all go when another is needed."""
    hammered(KernelMachine(ring, nap=nap, max_memslots=12), 500, seed=7, can_fork=False, n_slow=30)


@pytest.mark.npt
@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_without_shootdown_it_shows(n_vcpus: int, is_slow_machine: bool):
    machine = UserMachine(n_vcpus, nap=nap, has_shootdown=False)
    is_nested = proven_on(machine.vm.device).is_nested
    with Hammer(machine, seed=8) as hammer:
        if not is_nested:
            with pytest.raises(Violation, match="lately:"):
                hammer.run(300)
            return
        # It is the CPU that remembers, or does not.
        try:
            hammer.run(100 if is_slow_machine else 300)
        except Violation:
            return
    pytest.skip("this CPU has looked at the tables again by itself, whatever the host did not do")
