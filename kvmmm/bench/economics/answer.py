"""The answer in some ten lines: which windows here, what exits cost, how surely."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.report.words import host_line
from kvmmm.bench.economics.asked import (
    BREAK_EVEN,
    COUNT,
    FEW,
    IN_ORDER,
    OVER_C,
    REFERENCE_WAY,
    SHARE,
    WAY,
    Key,
)
from kvmmm.bench.economics.plan import (
    EXIT,
    EXITS,
    FAULT,
    FAULTS,
    MAP,
    MEMSLOTS,
    PAGE,
    READ,
    WRITE,
)
from kvmmm.bench.economics.verdicts import ABOVE, BELOW
from kvmmm.bench.economics.words import (
    EXIT_NAMES,
    SHORT_NAMES,
    cost_text,
    ns_text,
    share_text,
    times_text,
)
from kvmmm.bench.fault_answer import SLOT_COUNTS, WINDOWS, window_text
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.economics.verdicts import Comparison, Economics

FULL_PROCESSES = 5
_SHOWN_EXITS = ("out", "mmio_write", "page_fault", "syscall", "hlt")


def answer_of(results: Results, said: Economics) -> list[str]:
    """Return the answer, a line each; or why there is none."""
    first = _provenance(results, said)
    if said.refusal:
        return [first, f"No answer: {said.refusal}"]
    parts = {key.part for key in said.figures}
    lines = [first]
    if FAULTS in parts:
        lines += [_way_line(way, said) for way in SHORT_NAMES]
        lines += [_reads(said), _in_order(said), _ways(said)]
    if MEMSLOTS in parts:
        lines.append(_counts(said))
    if EXITS in parts:
        lines += [_exits(said), _over_c(said)]
    return [*(line for line in lines if line), _unsaid(said)]


def _provenance(results: Results, said: Economics) -> str:
    host = host_line(results.header.host) or "a host that says nothing of itself"
    line = f"This host alone: {host}; {len(results.cells)} cells, {said.n_processes} processes, "
    line += f"at most {said.n_rounds} rounds. Ring 3, 4 KiB pages, frames resident; [95 %]."
    if said.n_processes < FULL_PROCESSES:
        line += f" Fewer than {FULL_PROCESSES} processes: intervals are wide, less may be said."
    if results.footer is None or not results.footer.complete:
        line += " The sweep did not come to its end."
    return line


def _key(way: str, window: int, name: str, access: str = WRITE) -> Key:
    return Key(FAULTS, way, access, window, name)


def advised(said: Economics, way: str, access: str) -> int:
    """Return the largest window that surely pays from the second touched page on."""
    fit = [PAGE_BYTES]
    for window in WINDOWS:
        one = said.of(BREAK_EVEN, _key(way, window, FAULT, access), FEW)
        if one is not None and one.told == BELOW:
            fit.append(window)
    return max(fit)


def _way_line(way: str, said: Economics) -> str:
    costs = [
        f"{window_text(w)} {cost_text(one)}"
        for w in (PAGE_BYTES, HUGE_PAGE_BYTES)
        if (one := said.figures.get(_key(way, w, FAULT)))
    ]
    if not costs:
        return ""
    window = advised(said, way, WRITE)
    pays = f"windows of {window_text(window)} surely pay from the second touched page on"
    if window == PAGE_BYTES:
        pays = "no larger window surely pays from the second touched page on"
    text = f"{SHORT_NAMES[way]}: {pays}. A write fault costs {', '.join(costs)}"
    shown = window if window != PAGE_BYTES else HUGE_PAGE_BYTES
    even = said.of(BREAK_EVEN, _key(way, shown, FAULT))
    if even is not None:
        told = {ABOVE: "dearer", BELOW: "cheaper: it always pays"}.get(even.told, "not told apart")
        text += f" ({window_text(shown)} ÷ 4 KiB: {times_text(even)}, {told})"
    return f"{text}. {_beforehand(way, said)}"


def _beforehand(way: str, said: Economics) -> str:
    share = said.of(SHARE, _key(way, HUGE_PAGE_BYTES, MAP))
    if share is None or share.told not in {ABOVE, BELOW}:
        shown = "" if share is None else f" (÷ a fault: {share_text(share)})"
        return f"Whether mapping 2 MiB beforehand ever pays is not to be told{shown}."
    if share.told == ABOVE:
        return f"Mapping 2 MiB beforehand never pays ({share_text(share)} of a fault)."
    return f"Mapping 2 MiB beforehand pays where more than {share_text(share)} get touched."


def _reads(said: Economics) -> str:
    both = {way: (advised(said, way, WRITE), advised(said, way, READ)) for way in SHORT_NAMES}
    if all(write == read for write, read in both.values()):
        return "Reads: the same windows surely pay."
    found = (f"{SHORT_NAMES[way]} {window_text(read)}" for way, (_, read) in both.items())
    return f"Windows that surely pay so for reads: {'; '.join(found)}."


def _in_order(said: Economics) -> str:
    parts = []
    for way in SHORT_NAMES:
        small, large = (said.figures.get(_key(way, w, PAGE)) for w in (PAGE_BYTES, HUGE_PAGE_BYTES))
        if small is None or large is None:
            continue
        text = f"{SHORT_NAMES[way]} {ns_text(small.ns)} and {cost_text(large)}"
        parts.append(f"{text}, {_enough(way, said)}")
    title = "All pages written in order, each in windows of 4 KiB and of 2 MiB"
    return f"{title}: {'; '.join(parts)}." if parts else ""


def _enough(way: str, said: Economics) -> str:
    # Of the smaller windows: those that are cheaper, else those that are not told apart.
    found: dict[int, list[int]] = {}
    for window in WINDOWS:
        one = said.of(IN_ORDER, _key(way, window, PAGE))
        if one is not None:
            found.setdefault(one.told, []).append(window)
    if cheaper := found.get(BELOW):
        return f"cheaper still in {', '.join(map(window_text, cheaper))}"
    dearer = max(found.get(ABOVE, [0]))
    alike = [window for window in found.get(0, []) if window > dearer]
    return f"from {window_text(min(alike))} on not told apart" if alike else "the cheapest"


def _ways(said: Economics) -> str:
    told: list[str] = []
    rest: list[str] = []
    for way in SHORT_NAMES:
        for window in (PAGE_BYTES, HUGE_PAGE_BYTES):
            one = said.of(WAY, _key(way, window, FAULT))
            if one is not None:
                text = f"{SHORT_NAMES[way]}, {window_text(window)}: {times_text(one)}"
                (told if one.told else rest).append(text)
    if not told + rest:
        return ""
    parts = ["; ".join(told) or "nothing to be told"]
    if rest:
        parts.append(f"Not told apart: {'; '.join(rest)}")
    return f"A write fault ÷ one by {SHORT_NAMES[REFERENCE_WAY]}: {'. '.join(parts)}."


def _counts(said: Economics) -> str:
    asked: list[Comparison] = []
    for count in SLOT_COUNTS[1:]:
        for window in (PAGE_BYTES, HUGE_PAGE_BYTES):
            one = said.of(COUNT, Key(MEMSLOTS, str(count), WRITE, window, FAULT))
            if one is not None:
                asked.append(one)
    if not asked:
        return ""
    told = [one for one in asked if one.told]
    worst = max(asked, key=lambda one: one.ratio)
    if not told:
        return (
            f"Memslots that are there: up to {max(SLOT_COUNTS):,}, no difference of a fault to be "
            f"told (at most {times_text(worst)} times, {_count_text(worst)})."
        )
    texts = (f"{times_text(one)} times ({_count_text(one)})" for one in told)
    return f"Memslots that are there make a write fault cost {'; '.join(texts)}; else untold."


def _count_text(one: Comparison) -> str:
    over = one.question.over
    return f"{int(over.subject):,} slots, {window_text(over.window)}"


def _exits(said: Economics) -> str:
    costs = [
        f"{EXIT_NAMES[kind]} {cost_text(one)}"
        for kind in _SHOWN_EXITS
        if (one := said.figures.get(Key(EXITS, kind, EXIT, 1, EXIT)))
    ]
    return f"An exit, from exit to exit, the least handler included: {'; '.join(costs)}."


def _over_c(said: Economics) -> str:
    asked = [one for one in said.comparisons if one.question.name == OVER_C]
    if not asked:
        return ""
    told = [
        f"{EXIT_NAMES[one.question.over.subject]} {times_text(one)}" for one in asked if one.told
    ]
    rest = [one for one in asked if not one.told]
    parts = ["; ".join(told) or "nothing to be told"]
    if rest:
        most = max(rest, key=lambda one: one.high)
        name = EXIT_NAMES[most.question.over.subject]
        kinds = f"{len(rest)} {'other ' if told else ''}kinds"
        parts.append(f"Not told apart: {kinds}, at most {times_text(most)} ({name})")
    return f"An exit ÷ the same under a loop in C: {'. '.join(parts)}."


def _unsaid(said: Economics) -> str:
    finite = [value for value in said.noise.smallest_of.values() if math.isfinite(value)]
    below = f"differences below {min(finite):.1%} to {max(finite):.1%} (by figure; A/A noise)"
    return (
        f"Not said here: {below}; frames that are not resident, which cost the same more in every "
        "way; copies on write (mm/cow_break_window); other hosts, bare metal, NUMA."
    )
