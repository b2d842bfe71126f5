"""A comparison of runs as lines of text: what the command prints, and the page opens with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.agreement import CLEARLY, agreement_of, agreement_text
from kvmmm.bench.crossover.report import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.agreement import Agreement, Said
    from kvmmm.bench.crossover.compare import Comparison, Difference, Key, Run

_MOST_LINES = 10


def lines_of(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    """Return the comparison as lines of text."""
    lines = ["Runs"]
    for run in runs:
        header = run.results.header
        commit = f", commit {header.commit}" if header.commit else ""
        lines.append(
            f"  {run.name}: {words.host_line(header.host)}; kvmmm {header.kvmmm}{commit}; "
            f"{header.mode}, {header.started}"
        )
    lines.append("What is not the same about them")
    lines += [f"  {name}: {' | '.join(texts)}" for name, texts in facts_that_differ(runs)] or [
        "  nothing that is recorded"
    ]
    for one in comparisons:
        lines += _comparison_lines(one)
    return lines


def facts_that_differ(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the facts that are not the same in all runs: name, and each run's."""
    facts = []
    for run in runs:
        header = run.results.header
        of_run = {"kvmmm": header.kvmmm, "commit": header.commit, "mode": header.mode}
        facts.append({**of_run, **header.host})
    names = dict.fromkeys(name for one in facts for name in one)
    rows = [(name, [words.fact_text(one.get(name)) for one in facts]) for name in names]
    return [(name, texts) for name, texts in rows if len(set(texts)) > 1]


def _comparison_lines(one: Comparison) -> list[str]:
    agreement = agreement_of(one)
    lines = [f"{one.other.name} beside {one.first.name}", f"  {agreement_text(agreement)}"]
    lines += [f"  {line}" for line in crossover_lines(agreement)]
    if one.contradicting:
        lines.append(f"  won by different sides, each by more than {CLEARLY - 1:.0%}:")
        lines += _some_lines(one.contradicting)
    if one.doubts:
        lines.append(f"  no difference is claimed: {'; '.join(one.doubts)}")
        return lines
    noise = [run.analysis.noise.smallest for run in (one.first, one.other)]
    lines.append(
        f"  {len(one.differing)} of {one.n_common} ratios differ beyond noise (A/A "
        f"{noise[0]:.1%} and {noise[1]:.1%})"
    )
    return lines + _some_lines(one.differing)


def _some_lines(differences: Sequence[Difference]) -> list[str]:
    lines = [f"    {difference_text(one)}" for one in differences[:_MOST_LINES]]
    if len(differences) > _MOST_LINES:
        lines.append(f"    and {len(differences) - _MOST_LINES} more")
    return lines


def key_text(key: Key) -> str:
    """Return dimensions (and bytes) and pair as text."""
    *values, pair = key
    dims = values[: len(words.DIMENSIONS)]
    names = [words.dim_name(k, value) for (k, _), value in zip(words.DIMENSIONS, dims, strict=True)]
    names += [words.bytes_text(int(n)) for n in values[len(words.DIMENSIONS) :]]
    return f"{', '.join(names)}: {words.pair_name(pair)} ÷ internal"


def difference_text(one: Difference) -> str:
    """Return a difference as one line."""
    a, b = one.first, one.other
    return (
        f"{key_text(one.key)}: {words.ratio_text(a.ratio)} {words.interval_text(a.low, a.high)} "
        f"| {words.ratio_text(b.ratio)} {words.interval_text(b.low, b.high)}"
    )


def crossover_lines(one: Agreement) -> list[str]:
    """Return the crossovers that two runs do not say alike, as lines."""
    kinds = (("crossovers apart", one.apart), ("a crossover in one only", one.alone))
    return [f"{kind}: {_said_text(said)}" for kind, some in kinds for said in some]


def _said_text(said: Said) -> str:
    first, other = map(words.verdict_text, (said.first, said.other))
    return f"{key_text(said.key)}: {first} | {other}"
