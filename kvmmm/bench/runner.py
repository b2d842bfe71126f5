"""Measures a group of cases: interleaved, everything twice, medians.

Load from outside comes in waves that are longer than a round, so a round's product and floor meet
the same wave, and are compared with each other before the median is taken.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvmmm.bench.case import RATIO, WORST
from kvmmm.bench.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Case, Group, Probe, Sample

LABELS = ("A", "B")

Samples = dict[tuple[str, str], list["Sample"]]
"""Samples by (probe, label), one a round."""


@contextmanager
def pinned() -> Iterator[int]:
    """Keep this thread, and those it starts, on one CPU; yields its number.

    A wake-up on another, idle CPU costs more than most of what is measured here. The first CPU it
    is, because the kernel does the RCU work behind each memslot change there (Linux
    kernel/rcu/srcutree.c, get_boot_cpu_id), and a change costs several times more elsewhere.
    """
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _no_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def measure(
    group: Group, *, quick: bool = False, progress: Callable[[int, int], object] | None = None,
    shuffle: Callable[[list[tuple[str, str]]], None] = random.shuffle,
) -> list[Record]:  # fmt: skip
    """Measure a group; returns one record a case.

    Args:
        group: What to measure.
        quick: Fewer rounds.
        progress: Called between rounds with (rounds done, rounds in all).
        shuffle: Puts the probes of a round into another order.

    Raises:
        Whatever a probe raises; nothing is kept of the group then.
    """
    n_rounds = group.quick_rounds if quick else group.rounds
    with pinned(), group.open() as probes:
        used = {name for case in group.cases for name in _probes_of(case)}
        order = [(name, label) for name in sorted(used) for label in LABELS]
        samples: Samples = {key: [] for key in order}
        with _no_gc():
            for number in range(-group.warm_up, n_rounds):
                if progress:
                    progress(max(number, 0), n_rounds)
                shuffle(order)
                _measure_round(probes, order, samples if number >= 0 else None)
                gc.collect(0)
        if progress:
            progress(n_rounds, n_rounds)
    return [record_of(case, samples) for case in group.cases]


def _measure_round(
    probes: Mapping[str, Probe], order: list[tuple[str, str]], samples: Samples | None
) -> None:
    for key in order:
        sample = probes[key[0]]()
        if samples is not None:
            samples[key].append(sample)


def _probes_of(case: Case) -> list[str]:
    named = [case.product[0], *(probe for probe, _ in case.shown)]
    return named if case.floor is None else [*named, case.floor[0]]


def record_of(case: Case, samples: Samples) -> Record:
    """Make a case's record from the samples of its group."""
    if case.each:
        return _worst_of_each(case, samples)
    by_label = {label: _values(case, samples, label) for label in LABELS}
    reduce = max if case.reduce == WORST else statistics.median
    every = [value for values in by_label.values() for value in values]
    value = reduce(every)
    a, b = (reduce(by_label[label]) for label in LABELS)
    product = _all(samples, case.product[0])
    over = []
    for name, limit in case.limits.items():
        most = max(int(sample[name]) for sample in product)
        if most > limit:
            over.append((name, most, limit))
    return Record(
        case, value, abs(a - b) / _scale(case, value), len(product),
        over_limit=over, extra=_extra(case, samples, every), samples=samples,
    )  # fmt: skip


def _worst_of_each(case: Case, samples: Samples) -> Record:
    # The worst of several medians; not the median of what was worst, which noise alone makes bad.
    records = {time: record_of(case.one_of_each(time), samples) for time in case.each}
    choose = max if case.better == "lower" else min
    worst = choose(records, key=lambda time: records[time].value)
    found = records[worst]
    extra = {"worst": worst} | {time: record.value for time, record in records.items()}
    return Record(
        case, found.value, found.aa, found.n, over_limit=found.over_limit,
        extra=extra | found.extra, samples=samples,
    )  # fmt: skip


def _scale(case: Case, value: float) -> float:
    # A difference may be next to nothing, and its noise many times that; what counts then is the
    # distance to the goal.
    return max(abs(value), abs(case.goal or 0) if case.unit != RATIO else 0) or 1.0


def _values(case: Case, samples: Samples, label: str) -> list[float]:
    product = samples[case.product[0], label]
    if case.floor is None:
        return [case.value_of(sample, None) for sample in product]
    floor = samples[case.floor[0], label]
    return [case.value_of(p, f) for p, f in zip(product, floor, strict=True)]


def _all(samples: Samples, probe: str) -> list[Sample]:
    return [sample for label in LABELS for sample in samples[probe, label]]


def _extra(case: Case, samples: Samples, values: list[float]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    shown = {"product_ns": case.product} if case.floor or case.unit != RATIO else {}
    if case.floor:
        shown["floor_ns"] = case.floor
    shown |= {f"{probe}_{key}_ns": (probe, key) for probe, key in case.shown}
    for name, (probe, key) in shown.items():
        extra[name] = float(statistics.median(sample[key] for sample in _all(samples, probe)))
    for name in case.limits:
        extra[name] = max(int(sample[name]) for sample in _all(samples, case.product[0]))
    if case.reduce == WORST:
        extra["median"] = float(statistics.median(values))
    return extra
