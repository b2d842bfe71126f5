"""`kvmmm bench crossover --self-check`: does the benchmark find what is there, and nothing else?

Sweeps in which every side is internal mappings in truth, analysed as any other:

- *planted*: one side spends some ns more an operation, the other some ns more a byte. Whatever
  the copy itself costs, they are equal where the two costs are. Found, if a crossover is stated
  and that size is inside its interval.
- *identical*: nothing is added. False, if any winner is named in any cell, or any crossover stated.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.case import RATIO, Case
from kvmmm.bench.crossover.crossing import Crossover
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.record import INTERNAL, INTERNAL_AGAIN, read_results
from kvmmm.bench.crossover.report.words import bytes_text, verdict_text
from kvmmm.bench.record import Record, write_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.verdicts import Analysis

PLANTED = Case(
    "selfcheck/planted", unit=RATIO, goal=0.9, better="higher", product=("selfcheck", "found"),
    note="share of planted crossovers that are stated, with the truth inside the 95 % interval",
)  # fmt: skip
FALSE = Case(
    "selfcheck/false", unit=RATIO, goal=0.05, product=("selfcheck", "false"),
    note="share of sweeps of identical sides in which a difference or a crossover is stated",
)  # fmt: skip

N_PLANTED, N_IDENTICAL = 10, 20
SIDE = "mirror"
RECORDS_NAME = "selfcheck.jsonl"
_SEED = 1
_EXIT_FAILED, _EXIT_INTERRUPTED = 1, 130
_LEAST_BYTES, _MOST_BYTES = 128, 32 << 10
_FACTORS = (2.0, 6.0)


class Trial(NamedTuple):
    """One sweep.

    Attributes:
        name: Its folder's.
        planted: What is added.
        crossover_bytes: Where the sides are equal; None if everywhere.
    """

    name: str
    planted: Planted
    crossover_bytes: float | None


class Finding(NamedTuple):
    """What came of one.

    Attributes:
        trial: Which.
        right: Whether it is what is there.
        said: What was said, in words.
    """

    trial: Trial
    right: bool
    said: str


def trials(
    seed: int = _SEED, n_planted: int = N_PLANTED, n_identical: int = N_IDENTICAL
) -> list[Trial]:
    """Return the sweeps to make, both kinds mixed; the same for the same seed."""
    choose = random.Random(seed)
    nothing = Planted({})
    made = [Trial(f"identical-{i:02}", nothing, None) for i in range(n_identical)]
    for i in range(n_planted):
        at = math.exp(choose.uniform(math.log(_LEAST_BYTES), math.log(_MOST_BYTES)))
        # A few times what a copy of that size takes: differences that matter, on both sides.
        ns = (60 + at / 20) * choose.uniform(*_FACTORS)
        made.append(Trial(f"planted-{i:02}", _planted(ns, ns / at, mirror_first=i % 2 == 0), at))
    choose.shuffle(made)
    return made


def _planted(ns_per_operation: float, ns_per_byte: float, *, mirror_first: bool) -> Planted:
    mirror, internal = (ns_per_operation, 0.0), (0.0, ns_per_byte)
    if not mirror_first:
        mirror, internal = internal, mirror
    return Planted({SIDE: mirror, INTERNAL: internal, INTERNAL_AGAIN: internal})


def check(made: Iterable[Trial], measure: Callable[[Trial], Results]) -> Iterator[Finding]:
    """Make sweeps, analyse each, and say whether it was right.

    Args:
        made: Which.
        measure: Makes one.
    """
    from kvmmm.bench.crossover.statistics import analyse

    for trial in made:
        results = measure(trial)
        yield finding_of(trial, analyse(results, seed=results.header.seed))


def finding_of(trial: Trial, analysis: Analysis) -> Finding:
    """Compare what an analysis says with what is there."""
    if trial.crossover_bytes is None:
        claims = _claims(analysis)
        return Finding(trial, not claims, "; ".join(claims) or "no difference")
    truth = f"{bytes_text(trial.crossover_bytes)} planted"
    for curve in analysis.curves:
        if curve.pair[0] == SIDE:
            verdict = curve.verdict
            right = isinstance(verdict, Crossover) and (
                verdict.low <= trial.crossover_bytes <= verdict.high
            )
            return Finding(trial, right, f"{truth}: {verdict_text(verdict)}")
    return Finding(trial, right=False, said=f"{truth}: not measured")


def _claims(analysis: Analysis) -> list[str]:
    cells = [
        f"{c.winner} faster at {bytes_text(c.cell.bytes)} ({c.pair[0]}, {c.ratio:.3f})"
        for c in analysis.cells
        if c.winner
    ]
    return cells + [
        f"{curve.pair[0]} {verdict_text(curve.verdict)}"
        for curve in analysis.curves
        if isinstance(curve.verdict, Crossover)
    ]


def records_of(findings: Sequence[Finding]) -> list[Record]:
    """Return the two cases; one without any finding is left out."""
    records = []
    for case, planted in ((PLANTED, True), (FALSE, False)):
        kind = [f for f in findings if (f.trial.crossover_bytes is not None) == planted]
        if kind:
            share = sum(f.right == planted for f in kind) / len(kind)
            records.append(Record(case, share, 0.0, len(kind)))
    return records


class _InterruptedError(Exception):
    # A sweep was; what it has is no finding.
    pass


def run(folder: Path, made: Sequence[Trial] | None = None) -> int:
    """Make all sweeps below `folder`, show what each said, write the cases; return a status.

    A folder that is there already is gone on with.
    """
    from rich.console import Console

    from kvmmm.bench.crossover.extras import need
    from kvmmm.bench.host import host_record
    from kvmmm.bench.table import table_of

    need("numpy", what="the self-check")
    made = trials() if made is None else made
    out, err = Console(), Console(stderr=True)
    findings: list[Finding] = []
    interrupted = False
    try:
        for finding in check(made, lambda trial: _sweep(trial, folder)):
            findings.append(finding)
            _show(finding, len(findings), len(made), err)
    except (_InterruptedError, KeyboardInterrupt):
        interrupted = True
    records = records_of(findings)
    if records:
        out.print(table_of(records))
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / RECORDS_NAME, host_record(), records)
    if interrupted:
        err.print(f"interrupted; --self-check --out {folder} goes on", soft_wrap=True)
        return _EXIT_INTERRUPTED
    return 0 if all(record.met for record in records) else _EXIT_FAILED


def _sweep(trial: Trial, folder: Path) -> Results:
    from kvmmm.bench.crossover import sweep
    from kvmmm.bench.crossover.plan import SELF_CHECK, plan_of

    here = Path(folder, trial.name)
    outcome = sweep.run(plan_of(SELF_CHECK), here, resume=True, planted=trial.planted)
    if outcome.interrupted:
        raise _InterruptedError
    return read_results(here)


def _show(finding: Finding, n_done: int, n_all: int, err: Console) -> None:
    word = "right" if finding.right else "WRONG"
    err.print(
        f"{n_done}/{n_all} {finding.trial.name}: {word}: {finding.said}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
