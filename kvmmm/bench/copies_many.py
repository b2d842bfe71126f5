"""`bench copies`: 64 bytes among many pmas, and beside a thread that spins."""

from __future__ import annotations

import os
import random
import threading
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import START, GuestMemory, empty_loop
from kvmmm.bench.guest import BenchmarkError
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample
    from kvmmm.mm import MemoryManager

PAGES = 100_000
_COPIES = 10_000
_BYTES = 64
_WARM_BYTES = 64 << 10
_ALONE_NS = 50_000_000
"""How long the spinner's loops take alone: with two threads a turn is 5 ms, so ten turns each."""
_BLOCK = 1000


def scattered(n: int) -> list[int]:
    """Return 0 to n - 1 so that no two neighbours are neighbours there, n above 3."""
    order = list(range(n))
    while any(b == a + 1 for a, b in pairwise(order)):
        random.shuffle(order)
    return order


def _random_copies(mm: MemoryManager) -> Probe:
    buffer, data = bytearray(_BYTES), bytes(_BYTES)
    # The next call's addresses are others, that no cache knows; but the same ones on both sides.
    draw = random.Random(PAGES)
    everywhere = range(START, START + PAGES * PAGE_BYTES - _BYTES + 1, 8)

    def probe() -> Sample:
        addresses = draw.choices(everywhere, k=_COPIES)
        loop_ns = empty_loop(addresses, 1)
        start_ns = perf_counter_ns()
        for addr in addresses:
            mm.copy_in(addr, buffer)
        in_ns = perf_counter_ns() - start_ns - loop_ns

        addresses = draw.choices(everywhere, k=_COPIES)
        start_ns = perf_counter_ns()
        for addr in addresses:
            mm.copy_out(addr, data)
        out_ns = perf_counter_ns() - start_ns - loop_ns
        return {"in": in_ns / _COPIES, "out": out_ns / _COPIES}

    return probe


@contextmanager
def _many_and_one() -> Iterator[Mapping[str, Probe]]:
    order = scattered(PAGES)
    with GuestMemory(PAGES * PAGE_BYTES) as memory:
        many = memory.map_again(order)
        last = START + (PAGES - 1) * PAGE_BYTES
        memory.mm.copy_out(last, b"the last page")
        if many.read(START + order.index(PAGES - 1) * PAGE_BYTES, 13) != b"the last page":
            raise BenchmarkError("the two do not have the same frames")
        yield {"one": _random_copies(memory.mm), "many": _random_copies(many)}


def _in_ns(mm: MemoryManager, addr: int) -> Callable[[int], int]:
    buffer, block = bytearray(_BYTES), range(_BLOCK)

    def run(n_blocks: int) -> int:
        start_ns = perf_counter_ns()
        for _ in range(n_blocks):
            for _i in block:
                mm.copy_in(addr, buffer)
        return perf_counter_ns() - start_ns

    return run


def _out_ns(mm: MemoryManager, addr: int) -> Callable[[int], int]:
    data, block = bytes(_BYTES), range(_BLOCK)

    def run(n_blocks: int) -> int:
        start_ns = perf_counter_ns()
        for _ in range(n_blocks):
            for _i in block:
                mm.copy_out(addr, data)
        return perf_counter_ns() - start_ns

    return run


def _empty_ns() -> Callable[[int], int]:
    # A C method called in the same way, that has nothing to do: it looks into an empty set.
    segments: SegmentSet[int] = SegmentSet()
    block = range(_BLOCK)

    def run(n_blocks: int) -> int:
        start_ns = perf_counter_ns()
        for _ in range(n_blocks):
            for _i in block:
                segments.find(0)
        return perf_counter_ns() - start_ns

    return run


@contextmanager
def spinning() -> Iterator[None]:
    """Have a Python thread compute for as long as this lasts, on another CPU if there is one."""
    started, ended = threading.Event(), False

    def spin() -> None:
        others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
        if others:
            os.sched_setaffinity(0, {max(others)})
        started.set()
        while not ended:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        started.wait()
        yield
    finally:
        ended = True
        thread.join()


def _slow_down(run: Callable[[int], int]) -> float:
    # The number of calls is found each time: the machine's speed is not always the same.
    n_blocks = max(1, _ALONE_NS * 4 // max(run(4), 1))
    alone_ns = run(n_blocks)
    with spinning():
        return run(n_blocks) / alone_ns


@contextmanager
def _beside_a_spinner() -> Iterator[Mapping[str, Probe]]:
    empty = _empty_ns()
    with GuestMemory(_WARM_BYTES) as memory:
        copies = {"in": _in_ns(memory.mm, START), "out": _out_ns(memory.mm, START)}

        def copy() -> Sample:
            return {direction: _slow_down(run) for direction, run in copies.items()}

        def nothing() -> Sample:
            return dict.fromkeys(copies, _slow_down(empty))

        yield {"copy": copy, "empty": nothing}


GROUPS = (
    Group(
        "copies: many pmas",
        (
            Case(
                "copies/pma_scaling", unit=RATIO, goal=1.15, each=("in", "out"),
                product=("many", EACH), floor=("one", EACH),
                note="64 bytes at the same random places of 400 MB: 100 000 scattered pmas by one",
            ),
        ),
        open=_many_and_one, rounds=80, quick_rounds=8, warm_up=2,
    ),
    Group(
        "copies: beside a thread that spins",
        (
            Case(
                "copies/spinner", unit=RATIO, goal=1.15, each=("in", "out"),
                product=("copy", EACH), floor=("empty", EACH),
                note="64 bytes: how much slower by a spinning Python thread, divided by the same "
                "of an empty C method",
            ),
        ),
        open=_beside_a_spinner, rounds=30, quick_rounds=3, warm_up=1,
    ),
)  # fmt: skip
"""Many pmas, and two threads."""
