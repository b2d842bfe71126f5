"""Whether two runs of one host agree, in two senses.

- The intervals of every crossover that both state overlap, and the same side wins below it.
- No cell is clearly won (`CLEARLY`) by different sides.

A crossover that one run alone states is told, with what the other says of that curve; it is no
disagreement: the other may know less, and where it knows otherwise, cells say so. Runs that claim
nothing do not agree: nobody can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.crossing import Crossover

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.compare import Comparison, Difference, Key
    from kvmmm.bench.crossover.crossing import Verdict

CLEARLY = 1.1
"""A cell is won clearly by this factor; two runs that agree do not contradict each other so."""

_ONE_HOST = ("cpu", "microcode", "kernel", "kvm")


class Said(NamedTuple):
    """What two runs say of one curve.

    Attributes:
        key: Dimensions and pair.
        first: By the first run.
        other: By the other.
    """

    key: Key
    first: Verdict
    other: Verdict


class Agreement(NamedTuple):
    """Two runs, judged.

    Attributes:
        n_curves: Curves that both measured.
        n_cells: Cells and pairs that both measured.
        overlapping: Crossovers stated by both, with intervals that overlap.
        apart: Stated by both: intervals that do not, or sides exchanged.
        alone: Stated by one of them only.
        contradicting: Cells clearly won by different sides.
        doubts: Why a run claims nothing, if so.
        facts: Facts that should be the same on one host, and are not.
    """

    n_curves: int
    n_cells: int
    overlapping: Sequence[Said]
    apart: Sequence[Said]
    alone: Sequence[Said]
    contradicting: Sequence[Difference]
    doubts: Sequence[str]
    facts: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether the runs agree; not where that cannot be told."""
        return not (self.apart or self.contradicting or self.doubts)


def agreement_of(one: Comparison) -> Agreement:
    """Judge a comparison of two runs."""
    first, other = one.first.curves, one.other.curves
    said = [Said(key, first[key].verdict, other[key].verdict) for key in first if key in other]
    stated = [s for s in said if isinstance(s.first, Crossover) or isinstance(s.other, Crossover)]
    overlapping, apart, alone = [], [], []
    for each in stated:
        if not (isinstance(each.first, Crossover) and isinstance(each.other, Crossover)):
            alone.append(each)
        elif _overlap(each.first, each.other):
            overlapping.append(each)
        else:
            apart.append(each)
    return Agreement(
        len(said), one.n_common, overlapping, apart, alone, one.contradicting, one.doubts,
        _facts(one),
    )  # fmt: skip


def _overlap(a: Crossover, b: Crossover) -> bool:
    return a.below == b.below and a.low <= b.high and b.low <= a.high


def _facts(one: Comparison) -> list[str]:
    hosts = [run.results.header.host for run in (one.first, one.other)]
    return [name for name in _ONE_HOST if hosts[0].get(name) != hosts[1].get(name)]


def agreement_text(one: Agreement) -> str:
    """Return the judgement as one sentence, with what it counts."""
    n_both = len(one.overlapping) + len(one.apart)
    hosts = f" (not one host: {', '.join(one.facts)} differ)" if one.facts else ""
    if one.doubts:
        return f"Whether the two runs agree{hosts} cannot be told: {'; '.join(one.doubts)}."
    verb = "agree" if one.holds else "do not agree"
    return (
        f"The two runs {verb}{hosts}: of {n_both} crossovers that both state, the intervals of "
        f"{len(one.overlapping)} overlap; of {one.n_cells} ratios, {len(one.contradicting)} are "
        f"won by different sides, each by more than {CLEARLY - 1:.0%}; crossovers that one run "
        f"alone states: {len(one.alone)}."
    )
