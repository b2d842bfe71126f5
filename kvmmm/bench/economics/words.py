"""Costs, ways, windows and kinds of exits as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.report.words import ratio_text
from kvmmm.bench.economics.plan import BEFOREHAND, EXIT, FAULT, FLOOR, MAP, PAGE
from kvmmm.bench.fault_answer import LAZY, PF, SLOT

if TYPE_CHECKING:
    from kvmmm.bench.economics.verdicts import Comparison, Figure

WAY_NAMES = {
    SLOT: "EPT violation, a memslot a window",
    LAZY: "EPT violation below page tables",
    PF: "guest #PF, entries for a window",
}
SHORT_NAMES = {SLOT: "EPT violation", LAZY: "EPT violation below page tables", PF: "#PF"}
"""The same in running text."""
EXIT_NAMES = {
    "out": "OUT",
    "in": "IN",
    "out_nobody": "OUT to nobody's port",
    "mmio_read": "load without a memslot",
    "mmio_write": "store without a memslot",
    "page_fault": "#PF through its stub",
    "syscall": "SYSCALL through its stub",
    "out_ring0": "OUT, ring 0",
    "hlt": "HLT, ring 0",
    "deadline": "run(timeout) past its deadline",
    "ioeventfd": "OUT into an ioeventfd: no exit",
}
"""By the name of the kind; ring 3 where nothing else is said."""
FIGURE_NAMES = {
    PAGE: "page, all touched in order",
    BEFOREHAND: "page, mapped beforehand",
    FAULT: "one fault",
    MAP: "window mapped beforehand",
    EXIT: "exit under kvmmm",
    FLOOR: "exit under a loop in C",
}
PART_NAMES = {"loop": "the exit itself: KVM_RUN in a loop in C", "ours": "kvmmm and the handler"}
"""Of an exit's time."""


def ns_text(ns: float) -> str:
    """Return a time with three digits."""
    unit_ns, unit = _unit_of(ns)
    return f"{_digits(ns / unit_ns)} {unit}"


def _unit_of(ns: float) -> tuple[float, str]:
    return next((u for u in ((1e6, "ms"), (1e3, "us")) if ns >= u[0]), (1.0, "ns"))


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cost_text(one: Figure) -> str:
    """Return a figure with its interval."""
    unit_ns, unit = _unit_of(one.ns)
    value, low, high = (_digits(ns / unit_ns) for ns in (one.ns, one.low, one.high))
    return f"{value} {unit} [{low}, {high}]"


def times_text(one: Comparison) -> str:
    """Return a ratio with its interval."""
    return f"{ratio_text(one.ratio)} [{ratio_text(one.low)}, {ratio_text(one.high)}]"


def share_text(one: Comparison) -> str:
    """Return a ratio with its interval, as shares."""
    return f"{one.ratio:.0%} [{one.low:.0%}, {one.high:.0%}]"


def subject_text(part: str, subject: str) -> str:
    """Return what a cell is about: a way, a number of memslots, a kind of exit."""
    if part == "faults":
        return WAY_NAMES.get(subject, subject)
    if part == "memslots":
        return f"{int(subject):,} memslots"
    return EXIT_NAMES.get(subject, subject)
