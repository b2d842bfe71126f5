"""What `bench faults` says: how large a window should be here, and how sure that is."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from kvmmm.bench.table import number_text
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmmm.bench.case import Sample
    from kvmmm.bench.record import Record

SLOT, LAZY, PF = "slot", "lazy", "pf"
WAYS = {
    SLOT: "EPT violation, memslot",
    LAZY: "EPT violation, lazy slot",
    PF: "guest #PF",
}
WINDOW_NAMES = {1 << 12: "4k", 1 << 14: "16k", 1 << 16: "64k", 1 << 18: "256k", 1 << 21: "2m"}
WINDOWS = tuple(WINDOW_NAMES)
SLOT_COUNTS = (1, 100, 1000, 4000)
_CLOSE = 1.1
"""Within 10 % of the best is as good as the best."""
_BUSY = 0.05
_FEW = 2.0
"""A window that pays from the second touched page on needs no guess about the program."""


class Estimate:
    """A median over rounds.

    Attributes:
        value: It.
        low, high: Its interval, of 95 % if the rounds were independent (order statistics); of
            five values or less, all there is.
    """

    __slots__ = ("high", "low", "value")

    def __init__(self, values: Sequence[float]) -> None:
        ordered = sorted(values)
        n = len(ordered)
        skip = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2)) if n > 5 else 0
        self.value = median(ordered)
        self.low, self.high = ordered[skip], ordered[n - 1 - skip]

    def __str__(self) -> str:
        return f"{number_text(self.value)} [{number_text(self.low)}, {number_text(self.high)}]"


class Way:
    """The samples of one way and access, both labels, pair by pair."""

    def __init__(self, records: Sequence[Record], probe: str) -> None:
        self._all = _both(records, probe)

    def of(self, value: Callable[[Sample], float]) -> Estimate:
        """Return the median of what is made of each sample."""
        return Estimate([value(sample) for sample in self._all])

    def figure(self, key: str, window: int) -> Estimate:
        """Return `page`, `fault` or `map` of a window."""
        return self.of(lambda s: s[f"{key}_{WINDOW_NAMES[window]}"])

    def break_even(self, window: int) -> Estimate:
        """Return how many faults of one page a fault of a window costs: so many pages pay it."""
        one = WINDOW_NAMES[PAGE_BYTES]
        return self.of(lambda s: s[f"fault_{WINDOW_NAMES[window]}"] / s[f"fault_{one}"])

    def share(self, window: int) -> Estimate:
        """Return of mapping beforehand ÷ fault: more windows than that touched, and it pays."""
        name = WINDOW_NAMES[window]
        return self.of(lambda s: s[f"map_{name}"] / s[f"fault_{name}"])

    def advised(self) -> int:
        """Return the largest window that pays from the second touched page on, surely."""
        fit = [w for w in WINDOWS if w == PAGE_BYTES or self.break_even(w).high <= _FEW]
        return fit[-1]

    def enough(self) -> int:
        """Return the smallest window that is as good as the best where all pages are touched."""
        best = min(self.figure("page", w).value for w in WINDOWS)
        return next(w for w in WINDOWS if self.figure("page", w).value <= best * _CLOSE)


def window_text(window: int) -> str:
    """Return a window's size for a person."""
    return f"{window >> 20} MiB" if window >> 20 else f"{window >> 10} KiB"


def tell_windows(records: Sequence[Record]) -> str:
    """Return tables and advice.

    Args:
        records: Of all cases of the group.
    """
    lines = ["How large should a window be here? Ring 3, 4 KiB pages, frames resident;"]
    lines += ["medians [interval of 95 %]."]
    for access in ("write", "read"):
        ways = {way: Way(records, f"{way}_{access}") for way in WAYS}
        lines += ["", f"every page touched in order, {access}s: ns per page"]
        lines += _table(ways, lambda way, w: str(way.figure("page", w)))
        there = [str(way.of(lambda s: s["beforehand"])) for way in ways.values()]
        lines.append(_row("beforehand", there))
    ways = {way: Way(records, f"{way}_write") for way in WAYS}
    lines += ["", "one fault, over the page's own cost: us"]
    lines += _table(ways, _in_us)
    lines += [
        "",
        "one fault ÷ one fault of 4 KiB: the window pays if more of its pages are touched",
    ]
    lines += _table(ways, lambda way, w: "-" if w == PAGE_BYTES else str(way.break_even(w)))
    lines += ["", *(_advice(name, ways[way]) for way, name in WAYS.items()), ""]
    return "\n".join([*lines, _noise(records, len(records[0].samples[f"{SLOT}_write", "A"]))])


def _in_us(way: Way, window: int) -> str:
    name = WINDOW_NAMES[window]
    return str(way.of(lambda s: s[f"fault_{name}"] / 1000))


def _table(ways: dict[str, Way], cell: Callable[[Way, int], str]) -> list[str]:
    head = _row("window", list(WAYS.values()))
    return [head, *(_row(window_text(w), [cell(way, w) for way in ways.values()]) for w in WINDOWS)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:>10}" + "".join(f"  {cell:>27}" for cell in cells)


def _cost(cost: Estimate) -> str:
    if cost.low > 1:
        return f"A fault costs {cost} of a page's: it pays if two pages are touched."
    if cost.high <= _CLOSE:
        return f"A fault costs no more than a page's ({cost}): it always pays."
    return (
        f"A fault costs about what a page's does ({cost}; the noise hides which is dearer): it "
        "pays if two pages are touched."
    )


def _advice(name: str, way: Way) -> str:
    window, enough = way.advised(), way.enough()
    sentences = [f"{name}: {window_text(window)}."]
    if window == PAGE_BYTES:
        sentences.append("Nothing larger surely pays from the second touched page on here;")
        sentences.append(f"2 MiB cost {way.break_even(HUGE_PAGE_BYTES)} faults of a page.")
    else:
        sentences.append(_cost(way.break_even(window)))
    sentences.append(f"Touching all, {window_text(enough)} is within 10 % of the best.")
    share = way.share(HUGE_PAGE_BYTES)
    if share.low >= 1:
        sentences.append("Mapping beforehand never pays.")
    else:
        sentences.append(
            "Mapping 2 MiB windows beforehand pays where more than "
            f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of them get touched."
        )
    return " ".join(sentences)


def _noise(records: Sequence[Record], n_rounds: int) -> str:
    typical, worst = median(r.aa for r in records), max(r.aa for r in records)
    busy = " That is much: measure again when the host is less busy." if typical > _BUSY else ""
    return (
        f"Noise: the same measured twice differs by {typical:.1%}, at worst {worst:.1%}, over "
        f"{n_rounds} rounds in one process; what differs by less than that is not told apart, and "
        f"intervals take rounds as independent (--out DIR asks several processes).{busy}\nFrames "
        "that are not resident cost the same more in every way; copies on write are another "
        "question (mm/cow_break_window)."
    )


def tell_slot_counts(records: Sequence[Record]) -> str:
    """Return what memslots that are there already make of a fault.

    Args:
        records: Of all cases of the group.
    """
    lines = ["", "What do memslots cost that are there? One write fault over the page's own, us"]
    lines.append(_row("memslots", ["4 KiB window", "2 MiB window", "the latter ÷ the fewest"]))
    fewest = _both(records, f"slots_{SLOT_COUNTS[0]}")
    for count in SLOT_COUNTS:
        samples = _both(records, f"slots_{count}")
        cells = [Estimate([s[f"fault_{w}"] / 1000 for s in samples]) for w in ("4k", "2m")]
        pairs = zip(samples, fewest, strict=True)
        cells.append(Estimate([s["fault_2m"] / few["fault_2m"] for s, few in pairs]))
        lines.append(_row(f"{int(samples[0]['slots']):,}", [str(cell) for cell in cells]))
    worst = max(r.aa for r in records)
    lines.append(f"Noise: the same measured twice differs by {worst:.1%} at worst.")
    return "\n".join(lines)


def _both(records: Sequence[Record], probe: str) -> list[Sample]:
    return [sample for label in "AB" for sample in records[0].samples[probe, label]]
