"""`bench faults`: the economics of first touches: which way, and how much at a time.

A fault maps a window: from one page to 2 MiB. Larger ones save later faults, if the pages around
are touched at all, and cost more now. Three figures a window, of one round each:

page:  every page touched, in order: ns per page, faults and all
fault: one page touched in each window: what that costs over the same with all windows there
map:   a window mapped by the host beforehand, in a loop

These are groups of one process. `bench faults --out DIR` is a sweep over several: `economics`.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import NS, RATIO, Case, Group
from kvmmm.bench.fault_answer import (
    LAZY,
    PF,
    SLOT,
    SLOT_COUNTS,
    WINDOW_NAMES,
    WINDOWS,
    tell_slot_counts,
    tell_windows,
)
from kvmmm.bench.fault_grounds import Ground, SlotGround
from kvmmm.bench.fault_table_grounds import LazySlotGround, PageFaultGround
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

_N_APART = 16
"""Windows of which one page is touched."""
_PAGES_MIN, _WINDOWS_MIN = 128, 4
"""So many pages, or windows, are touched in a row, whichever is more."""
_LENGTH = _N_APART * HUGE_PAGE_BYTES


def _in_order(ground: Ground, window: int, *, write: bool) -> float:
    n = max(_PAGES_MIN, _WINDOWS_MIN * window // PAGE_BYTES)
    ground.forget()
    ground.set_window(window)
    n_faults = n * PAGE_BYTES // window
    return ground.touch(ground.start, n, PAGE_BYTES, write=write, n_faults=n_faults) / n


def _apart(ground: Ground, window: int, *, write: bool) -> tuple[float, float]:
    """Return ns per fault, and per window mapped beforehand."""
    start, n = ground.start, _N_APART
    ground.forget()
    ground.set_window(window)
    lazy_ns = ground.touch(start, n, window, write=write, n_faults=n)
    ground.forget()
    start_ns = perf_counter_ns()
    for addr in range(start, start + n * window, window):
        ground.serve(addr)
    map_ns = perf_counter_ns() - start_ns
    there_ns = ground.touch(start, n, window, write=write, n_faults=0)
    return (lazy_ns - there_ns) / n, map_ns / n


def _there(ground: Ground, *, write: bool) -> float:
    """Return ns per page with everything there: what KVM itself does about a page."""
    n = _WINDOWS_MIN * HUGE_PAGE_BYTES // PAGE_BYTES
    ground.forget()
    ground.set_window(HUGE_PAGE_BYTES)
    for at in range(0, n * PAGE_BYTES, HUGE_PAGE_BYTES):
        ground.serve(ground.start + at)
    return ground.touch(ground.start, n, PAGE_BYTES, write=write, n_faults=0) / n


def _probe(ground: Ground, *, write: bool) -> Probe:
    def measure() -> Sample:
        sample = {"there": _there(ground, write=write)}
        for window in random.sample(WINDOWS, len(WINDOWS)):
            name = WINDOW_NAMES[window]
            sample[f"page_{name}"] = _in_order(ground, window, write=write)
            fault_ns, map_ns = _apart(ground, window, write=write)
            sample[f"fault_{name}"], sample[f"map_{name}"] = fault_ns, map_ns
        n_pages = HUGE_PAGE_BYTES // PAGE_BYTES
        largest = WINDOW_NAMES[HUGE_PAGE_BYTES]
        sample["beforehand"] = sample["there"] + sample[f"map_{largest}"] / n_pages
        return sample

    return measure


@contextmanager
def _windows() -> Iterator[Mapping[str, Probe]]:
    with ExitStack() as stack:
        grounds: dict[str, Ground] = {
            SLOT: SlotGround(stack, _LENGTH),
            LAZY: LazySlotGround(stack, _LENGTH),
            PF: PageFaultGround(stack, _LENGTH),
        }
        yield {
            f"{way}_{'write' if write else 'read'}": _probe(ground, write=write)
            for way, ground in grounds.items()
            for write in (True, False)
        }


def _window_cases() -> Iterator[Case]:
    how = {
        SLOT: "EPT violation, a memslot a window",
        LAZY: "EPT violation below page tables, a memslot a window",
        PF: "#PF, entries for a window",
    }
    for way, what in how.items():
        for access in ("write", "read"):
            probe = f"{way}_{access}"
            for name in WINDOW_NAMES.values():
                yield Case(
                    f"faults/{probe}_{name}", unit=NS, goal=None,
                    product=(probe, f"page_{name}"),
                    shown=((probe, f"fault_{name}"), (probe, f"map_{name}")),
                    note=f"per page, {access}s of all in order, ring 3, resident; {what}",
                )  # fmt: skip
            yield Case(
                f"faults/{probe}_beforehand", unit=NS, goal=None, product=(probe, "beforehand"),
                shown=((probe, "there"),),
                note=f"the same, all mapped beforehand in pieces of 2 MiB; {what.split(',')[0]}",
            )  # fmt: skip


def _count_probe(ground: SlotGround) -> Probe:
    def measure() -> Sample:
        sample: dict[str, float] = {"slots": ground.n_slots}
        for window in random.sample((PAGE_BYTES, HUGE_PAGE_BYTES), 2):
            name = WINDOW_NAMES[window]
            sample[f"fault_{name}"], sample[f"map_{name}"] = _apart(ground, window, write=True)
        return sample

    return measure


@contextmanager
def _slot_counts() -> Iterator[Mapping[str, Probe]]:
    with ExitStack() as stack:
        yield {
            f"slots_{count}": _count_probe(SlotGround(stack, _LENGTH, n_slots=count))
            for count in SLOT_COUNTS
        }


def _count_cases() -> Iterator[Case]:
    largest, smallest = WINDOW_NAMES[HUGE_PAGE_BYTES], WINDOW_NAMES[PAGE_BYTES]
    for count in SLOT_COUNTS:
        probe = f"slots_{count}"
        yield Case(
            f"faults/{probe}", unit=RATIO, goal=None, product=(probe, f"fault_{largest}"),
            floor=(f"slots_{SLOT_COUNTS[0]}", f"fault_{largest}"),
            shown=((probe, f"map_{largest}"), (probe, f"fault_{smallest}")),
            note=f"a fault with {count} memslots there (or the few that a VM needs anyway) ÷ the "
            "same with those few; writes, windows of 2 MiB",
        )  # fmt: skip


GROUPS = (
    Group(
        "faults: windows", tuple(_window_cases()), open=_windows, rounds=40, quick_rounds=6,
        tell=tell_windows,
    ),
    Group(
        "faults: memslots there", tuple(_count_cases()), open=_slot_counts, rounds=60,
        quick_rounds=10, tell=tell_slot_counts,
    ),
)  # fmt: skip
"""Ways and windows; then how many memslots there are already."""
