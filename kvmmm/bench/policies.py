"""`bench policy`: three workloads, from an empty address space to its end, under several policies.

    random   thousands of copies of 8 to 256 bytes, anywhere, in and out
    stream   all of the memory in and out, in pieces of 64 KiB and 1 MiB
    fork     a child for a program with memory, and both write and read all over it; several times

The values: the time under a policy divided by that under each single fixed policy, of which the
worst counts. So below 1 no fixed policy would have been better, for any workload. Noise makes that
larger, never smaller: it is the largest of many medians, of which those of equal policies are 1.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Self

from kvmmm.arena import Arena
from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import START, FixedFrames, GuestMemory
from kvmmm.bench.no_cpu import NoCpu
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.mm import MemoryManager
from kvmmm.mm.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES = 16 * MIB
_END = START + MEMORY_BYTES
_RUN_BYTES = 256 * KIB
"""Frames side by side, as faults of 256 KiB leave them."""
RANDOM_COPIES = 8_000
_RANDOM_SIZES = (8, 16, 64, 256)
STREAM_PASSES = 1
_STREAM_SIZES = (64 * KIB, MIB)
FORK_BYTES = 2 * MIB
FORKS = 2
_FORK_STRIDE = 8 * PAGE_BYTES
_FORK_WRITE_BYTES = 64
_FORK_READ_BYTES = 16 * KIB

_TRIES = 3

_ALWAYS = {"mirror": 1, "mirror_reuses": 1, "mirror_min_run_pages": 1}
FIXED: dict[str, dict[str, int]] = {
    "internal": {"mirror": 0},
    "mirror_always": _ALWAYS,
    "mirror_16": {"mirror": 1, "mirror_reuses": 16},
    "mirror_128": {"mirror": 1, "mirror_reuses": 128},
    "mirror_1024": {"mirror": 1, "mirror_reuses": 1024},
    "release_16k": {"mirror": 0, "release_bytes": 16 * KIB},
    "release_never": {"mirror": 0, "release_bytes": (1 << 32) - 1},
}
"""The single fixed policies, all else by default."""


class Workloads:
    """The three, over memory that is the same for every policy, and touched before.

    A context manager.
    """

    def __init__(self) -> None:
        self._memory = GuestMemory(MEMORY_BYTES)
        self._arena = Arena((FORKS + 2) * FORK_BYTES)
        n_runs = MEMORY_BYTES // _RUN_BYTES
        self._runs = [*range(1, n_runs, 2), *range(0, n_runs, 2)]  # no neighbours
        self._mappable = FixedFrames(self._memory.arena, self._memory.frames)
        draw = random.Random(MEMORY_BYTES)
        self._copies = [
            (START + draw.randrange(0, MEMORY_BYTES - 256, 8), draw.choice(_RANDOM_SIZES))
            for _ in range(RANDOM_COPIES)
        ]
        # The same for every run, and touched: how a buffer lies in its page matters more than most
        # policies do.
        self._small = {n: memoryview(bytearray(n)) for n in _RANDOM_SIZES}
        self._large = [bytearray(n) for n in (*_STREAM_SIZES, FORK_BYTES, _FORK_READ_BYTES)]
        self.all: dict[str, Callable[[Policy], int]] = {
            "random": self.random, "stream": self.stream, "fork": self.fork,
        }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._arena.close()
        self._memory.__exit__(None, None, None)

    def _new_mm(self, policy: Policy) -> MemoryManager:
        mm = MemoryManager(self._memory.arena, NoCpu(_END), policy=policy)
        # Placed by hand, one at a time: by frames' order it takes longer than what is measured.
        for addr, run in zip(range(START, _END, _RUN_BYTES), self._runs, strict=True):
            mm.mmap(
                _RUN_BYTES, READ_WRITE, addr=addr, fixed=True, private=False,
                mappable=self._mappable, offset=run * _RUN_BYTES,
            )  # fmt: skip
        mm.populate(START, MEMORY_BYTES)  # small copies would have one page each
        return mm

    def random(self, policy: Policy) -> int:
        """Return the ns of small copies anywhere; three of four are in."""
        mm = self._new_mm(policy)
        buffers, copies = self._small, self._copies
        start_ns = perf_counter_ns()
        for number, (addr, n_bytes) in enumerate(copies):
            if number & 3:
                mm.copy_in(addr, buffers[n_bytes])
            else:
                mm.copy_out(addr, buffers[n_bytes])
        mm.close()
        return perf_counter_ns() - start_ns

    def stream(self, policy: Policy) -> int:
        """Return the ns of large copies, one behind the other."""
        mm = self._new_mm(policy)
        buffers = self._large[: len(_STREAM_SIZES)]
        start_ns = perf_counter_ns()
        for _ in range(STREAM_PASSES):
            for buffer in buffers:
                for addr in range(START, _END, 2 * len(buffer)):
                    mm.copy_in(addr, buffer)
                    mm.copy_out(addr + len(buffer), buffer)
        mm.close()
        return perf_counter_ns() - start_ns

    def fork(self, policy: Policy) -> int:
        """Return the ns of forks, and of what parent and child touch after each."""
        space = NoCpu(START + FORK_BYTES)
        data, (*_, piece, buffer) = bytes(_FORK_WRITE_BYTES), self._large
        start_ns = perf_counter_ns()
        mm = MemoryManager(self._arena, space, policy=policy)
        mm.mmap(FORK_BYTES, READ_WRITE, addr=START, fixed=True)
        mm.copy_out(START, piece)
        for _ in range(FORKS):
            child = mm.fork(NoCpu(START + FORK_BYTES))
            for addr in range(START, START + FORK_BYTES, _FORK_STRIDE):
                child.copy_out(addr, data)
                mm.copy_out(addr + PAGE_BYTES, data)
            for addr in range(START, START + FORK_BYTES, _FORK_READ_BYTES):
                child.copy_in(addr, buffer)
                mm.copy_in(addr, buffer)
            child.close()
        mm.close()
        return perf_counter_ns() - start_ns


WORKLOADS = ("random", "stream", "fork")
CALIBRATED, DEFAULT = "calibrated", "default"


def ratios_of(policy: str) -> tuple[str, ...]:
    """Return the names of the ratios of a policy to each fixed one, in each workload."""
    return tuple(f"{policy} {workload}/{name}" for workload in WORKLOADS for name in FIXED)


def compare(
    workloads: Mapping[str, Callable[[Policy], int]], policies: Mapping[str, Policy]
) -> Sample:
    """Run each workload under each policy; return the ratios of the first two to the others.

    Made here, and not from medians: what is compared ran within the same tenth of a second. Each
    runs several times, and its quickest counts, so that an interruption says nothing.
    """
    sample = {}
    for workload, run in workloads.items():
        ns = dict.fromkeys(policies, 1 << 62)
        for name in random.sample([*policies] * _TRIES, len(policies) * _TRIES):
            ns[name] = min(ns[name], run(policies[name]))
        for policy in (CALIBRATED, DEFAULT):
            for name in FIXED:
                sample[f"{policy} {workload}/{name}"] = ns[policy] / ns[name]
    return sample


@contextmanager
def _policies() -> Iterator[Mapping[str, Probe]]:
    from kvmmm.bench.calibrate import calibrate

    policies = {name: Policy(source=name, **numbers) for name, numbers in FIXED.items()}
    # Measured here and now: what a file says may be from a quieter hour.
    policies[CALIBRATED] = Policy(source=CALIBRATED, **calibrate().numbers)
    policies[DEFAULT] = Policy(source=DEFAULT)
    with Workloads() as workloads:
        yield {"all": partial(compare, workloads.all, policies)}


GROUPS = (
    Group(
        "policy: three workloads",
        (
            Case(
                "policy/calibrated_worst", unit=RATIO, goal=1.05, each=ratios_of(CALIBRATED),
                product=("all", EACH),
                note="small random, streaming, fork-and-touch: the policy that `kvmmm calibrate` "
                "derives, divided by the best fixed one, for the worst workload",
            ),
            Case(
                "policy/default_worst", unit=RATIO, goal=1.15, each=ratios_of(DEFAULT),
                product=("all", EACH),
                note="the same for the policy of a host that was never calibrated",
            ),
        ),
        open=_policies, rounds=40, quick_rounds=8, warm_up=2,
    ),
)  # fmt: skip
"""One group: all of it is measured together."""
