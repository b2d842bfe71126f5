"""`bench mm`: fork of a program with a gigabyte of memory, while it runs."""

from __future__ import annotations

import os
import random
import threading
from contextlib import contextmanager
from time import perf_counter_ns, sleep
from typing import TYPE_CHECKING

from kvmmm.bench.case import MS, RATIO, Case, Group
from kvmmm.bench.guest import BenchmarkError
from kvmmm.bench.toucher import START, Toucher
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

_BYTES = 1 << 30
_PAGES = _BYTES // PAGE_BYTES
_WINDOWS = _BYTES // HUGE_PAGE_BYTES
_RUN_S = 20.0


class _Gigabyte:
    """A program with 1 GiB of resident memory, in 4 KiB leaves and as many pmas as windows."""

    def __init__(self) -> None:
        self.vm = vm = Toucher("1200M", max_leaf_bytes=PAGE_BYTES)
        vm.mm.mmap(_BYTES, READ_WRITE, addr=START, fixed=True)
        windows = list(range(_WINDOWS))
        random.shuffle(windows)
        for window in windows:  # so that hardly a frame lies beside its neighbour's
            vm.touch(START + window * HUGE_PAGE_BYTES, 512, write=True)
        self.n_pmas = len(vm.mm.pmas)
        if not 256 <= self.n_pmas <= 520:
            raise BenchmarkError(f"{self.n_pmas} pmas are not what is to be measured")

    def close(self) -> None:
        """Release everything."""
        self.vm.close()

    def fork(self) -> Sample:
        """Fork under a running vCPU; then read everything, twice: the second time after a zap."""
        vm = self.vm
        vm.touch(START, _PAGES, write=True)  # the last fork is forgotten
        vm.touch(START, _PAGES, write=False)
        child_space = vm.new_space()
        with self._running():
            start_ns = perf_counter_ns()
            child = vm.mm.fork(child_space)
            fork_ns = perf_counter_ns() - start_ns
        try:
            after_ns = vm.touch(START, _PAGES, write=False)
            vm.physical.zap()
            zapped_ns = vm.touch(START, _PAGES, write=False)
        finally:
            child.close()
            child_space.release()
        return {"fork": fork_ns, "after": after_ns, "zapped": zapped_ns}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Have the guest read, on another CPU, for as long as this lasts."""
        vm = self.vm
        vm.aim(START, 1 << 40, 0, write=False)
        answers: list[object] = []
        thread = threading.Thread(target=self._run, args=(answers,))
        thread.start()
        try:
            while not vm.vcpu.in_guest:
                sleep(0.0001)
            sleep(0.005)
            yield
        finally:
            vm.vcpu.stop()
            thread.join()
        if not answers or not isinstance(answers[0], int) or answers[0] >= 0:
            raise BenchmarkError(f"the guest did not run until it was stopped: {answers}")

    def _run(self, answers: list[object]) -> None:
        mine = os.sched_getaffinity(0)
        others = set(range(os.cpu_count() or 1)) - mine
        if others:
            os.sched_setaffinity(0, {max(others)})
        answers.append(self.vm.vcpu.run(int(_RUN_S * 1e9)))


@contextmanager
def _forking() -> Iterator[Mapping[str, Probe]]:
    gigabyte = _Gigabyte()
    try:
        yield {"fork": gigabyte.fork}
    finally:
        gigabyte.close()


GROUPS = (
    Group(
        "mm: fork",
        (
            Case(
                "mm/fork_1g", unit=MS, goal=5, product=("fork", "fork"),
                note="1 GiB resident in 4 KiB leaves, 512 pmas, a vCPU running: mm.fork",
            ),
            Case(
                "mm/fork_after", unit=RATIO, goal=1.5,
                product=("fork", "after"), floor=("fork", "zapped"),
                note="the parent's next read of every page; floor: one after everything was zapped",
            ),
        ),
        open=_forking, rounds=5, quick_rounds=1, warm_up=1,
    ),
)  # fmt: skip
"""One group, one program."""
