"""What a benchmark consists of, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from kvmmm.bench.record import Record

    Sample = Mapping[str, float]
    """One measurement by a probe: times in ns and counts, by name."""
    Probe = Callable[[], Sample]

RATIO, NS, MS = "ratio", "ns", "ms"
"""Units of a value: product ÷ floor; product minus floor, in ns or in ms.

A RATIO without a floor is one already: its probe has divided what it measured side by side."""

MEDIAN, WORST = "median", "worst"
"""What becomes of the rounds' values: the median, or (of a bound that must hold) the largest."""

EACH = "*"
"""In place of the name of a time: each of those in `Case.each`."""


class Case:
    """One line of a benchmark: how its value is made from samples, and what it should be.

    Attributes:
        name: `exits/pio`.
        unit: RATIO, NS or MS.
        goal: The value that it should reach; None for a figure that is only told.
        product: Which probe measures the product, and which of its times: `("product", "run")`.
        floor: The same for what it is divided by, or what is subtracted; None for nothing.
        each: The value is the worst of several, each for itself reduced over the rounds: the names
            of times that `product` and `floor` both have, with EACH in place of the one name.
        better: `"lower"` or `"higher"`.
        limits: Counts of the product's samples that may never be exceeded, whatever the time.
        shown: More times of the product or floor that the record should carry, as medians.
        reduce: MEDIAN or WORST.
        note: What a reader must know: ring, kind of memory, what the floor does.
    """

    __slots__ = (
        "better", "each", "floor", "goal", "limits", "name", "note", "product", "reduce", "shown",
        "unit",
    )  # fmt: skip

    def __init__(
        self, name: str, *, unit: str, goal: float | None, product: tuple[str, str],
        floor: tuple[str, str] | None = None, better: str = "lower",
        limits: Mapping[str, int] | None = None, shown: Sequence[tuple[str, str]] = (),
        reduce: str = MEDIAN, note: str = "", each: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.each = tuple(each)
        self.name = name
        self.unit = unit
        self.goal = goal
        self.product = product
        self.floor = floor
        self.better = better
        self.limits = dict(limits or {})
        self.shown = tuple(shown)
        self.reduce = reduce
        self.note = note

    def value_of(self, product: Sample, floor: Sample | None) -> float:
        """Return the value of one round."""
        ns = product[self.product[1]]
        if floor is None or self.floor is None:
            return ns / 1e6 if self.unit == MS else ns
        floor_ns = floor[self.floor[1]]
        if self.unit == RATIO:
            return ns / floor_ns
        return (ns - floor_ns) / (1e6 if self.unit == MS else 1)

    def one_of_each(self, time: str) -> Case:
        """Return the same case for one of the times in `each`."""
        return Case(
            self.name, unit=self.unit, goal=self.goal, product=(self.product[0], time),
            floor=None if self.floor is None else (self.floor[0], time), better=self.better,
            limits=self.limits, shown=self.shown, reduce=self.reduce, note=self.note,
        )  # fmt: skip


class Group:
    """Cases that are measured together, in one interleaving.

    Attributes:
        title: Shown while it runs.
        cases: What comes of it.
        open: Makes the probes, by name; what they need lives as long as the context.
        rounds: How often; `quick_rounds` with --quick.
        warm_up: Rounds before those, not counted.
        missing: Says what is not here that it needs, and where it comes from; empty for nothing.
            A group that misses something is skipped, by the names of its cases.
        tell: Makes the text for a person from its records, in place of rows of the table.
    """

    __slots__ = ("cases", "missing", "open", "quick_rounds", "rounds", "tell", "title", "warm_up")

    def __init__(
        self, title: str, cases: Sequence[Case], *,
        open: Callable[[], AbstractContextManager[Mapping[str, Probe]]],  # noqa: A002
        rounds: int, quick_rounds: int, warm_up: int = 1, missing: Callable[[], str] = str,
        tell: Callable[[Sequence[Record]], str] | None = None,
    ) -> None:  # fmt: skip
        self.missing = missing
        self.tell = tell
        self.title = title
        self.cases = tuple(cases)
        self.open = open
        self.rounds = rounds
        self.quick_rounds = quick_rounds
        self.warm_up = warm_up

    def only(self, names: set[str]) -> Group:
        """Return the same group with only the cases named."""
        cases = [case for case in self.cases if case.name in names]
        return Group(
            self.title, cases, open=self.open, rounds=self.rounds, quick_rounds=self.quick_rounds,
            warm_up=self.warm_up, missing=self.missing,
        )  # fmt: skip
