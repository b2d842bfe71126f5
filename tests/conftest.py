"""What all tests share: when KVM tests run, hypothesis profiles, a check for what is left behind.

KVMMM_TEST_KVM  auto (the default): tests marked `kvm` are skipped, with the reason, where /dev/kvm
                does not open. require: there they fail. never: they are skipped in any case.
KVMMM_TEST_NPT  set inside the machine of `make test-npt` (1: nested, 0: shadow paging), where
                Python is some 16 times slower: repetitions shrink, checks do not.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What somebody once calibrated on this machine is not what is tested.
os.environ["KVMMM_CALIBRATION"] = "off"

IS_SLOW_MACHINE = "KVMMM_TEST_NPT" in os.environ
_SLOWNESS = 16

_QUIET = (HealthCheck.too_slow, HealthCheck.differing_executors)
settings.register_profile("dev", deadline=None, max_examples=100, suppress_health_check=_QUIET)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("slow", settings.get_profile("ci"), max_examples=10)
settings.load_profile("slow" if IS_SLOW_MACHINE else "ci" if "CI" in os.environ else "dev")


@functools.cache
def _kvm_problem() -> str:
    """Why KVM tests cannot run here, one line; empty when they can."""
    from kvmmm.errors import KvmUnavailableError
    from kvmmm.platform.kvm.device import open_device

    try:
        open_device()
    except KvmUnavailableError as e:
        return str(e).splitlines()[0]
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Decide whether a test marked `kvm` runs."""
    if item.get_closest_marker("kvm") is None:
        return
    mode = os.environ.get("KVMMM_TEST_KVM", "auto")
    if mode not in {"auto", "require", "never"}:
        raise pytest.UsageError(f"KVMMM_TEST_KVM={mode}: it is auto, require or never")
    if mode == "never":
        pytest.skip("KVMMM_TEST_KVM=never")
    problem = _kvm_problem()
    if problem and mode == "require":
        pytest.fail(f"KVMMM_TEST_KVM=require, but {problem}", pytrace=False)
    if problem:
        pytest.skip(problem)


@pytest.fixture(scope="session")
def is_slow_machine() -> bool:
    """Whether this is the emulated machine of `make test-npt`: nothing may be timed there."""
    return IS_SLOW_MACHINE


@pytest.fixture(scope="session")
def scaled() -> Callable[[int], int]:
    """Shrink a number of repetitions where the machine is slow."""
    return lambda n: max(1, n // _SLOWNESS) if IS_SLOW_MACHINE else n


class Footprint:
    """What VMs leave in a process: descriptors, mappings and threads, counted from /proc/self."""

    def __init__(self) -> None:
        names = []
        for fd in Path("/proc/self/fd").iterdir():
            try:
                names.append(str(fd.readlink()))
            except FileNotFoundError:
                continue  # the listing's own
        self.fds = sorted(n for n in names if "kvm-v" in n or "kvmmm" in n)
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        self.mappings = sorted(
            line.split(maxsplit=5)[5] for line in maps if "kvm-v" in line or "memfd:kvmmm" in line
        )
        self.n_threads = len(list(Path("/proc/self/task").iterdir()))

    def leaks_since(self, before: Footprint) -> str:
        """Return what is here and was not before; empty for nothing."""
        found = [
            f"{len(now)} {what} ({len(then)} before): {now}"
            for what, now, then in (
                ("descriptors", self.fds, before.fds),
                ("mappings", self.mappings, before.mappings),
            )
            if len(now) > len(then)
        ]
        if self.n_threads > before.n_threads:
            found.append(f"{self.n_threads} threads ({before.n_threads} before)")
        return "; ".join(found)


def wait_for_no_leak(before: Footprint, seconds: float = 10.0) -> str:
    """Return what is left behind since `before`; threads are given a moment to end."""
    deadline = time.monotonic() + seconds
    while True:
        gc.collect()
        leaks = Footprint().leaks_since(before)
        if not leaks or time.monotonic() > deadline:
            return leaks
        time.sleep(0.01)


@pytest.fixture
def footprint() -> Footprint:
    """What VMs had left in the process before this test."""
    gc.collect()
    return Footprint()


@pytest.fixture
def no_leak(footprint: Footprint) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a mapping or a thread behind."""
    yield
    leaks = wait_for_no_leak(footprint)
    assert not leaks, leaks


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing() -> Iterator[None]:
    gc.collect()
    # What is here now, stays: modules, tests, their reports. Each of the hundreds of collections to
    # come would look at these half a million objects again.
    gc.freeze()
    before = Footprint()
    yield
    leaks = wait_for_no_leak(before)
    assert not leaks, leaks
