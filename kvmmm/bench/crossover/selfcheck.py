"""`kvmmm bench crossover --self-check`: does the benchmark find what is there, and nothing else?

Sweeps in which every side is internal mappings in truth, analysed as any other:

- *planted*: one side spends some ns more an operation, the other some ns more a byte. Whatever
  the copy itself costs, they are equal where the two costs are. Found, if a crossover is stated
  and that size is inside its interval.
- *identical*: nothing is added. False, if any winner is named in any cell, or any crossover stated.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmmm.bench.case import RATIO, Case
from kvmmm.bench.crossover.crossing import Crossover
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.record import FILE_NAME, INTERNAL, INTERNAL_AGAIN, read_results
from kvmmm.bench.crossover.report.words import bytes_text, verdict_text
from kvmmm.bench.record import Record, write_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.sweep import Progress
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
_BESIDE_S = 1.0  # a sweep's analysis


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
        factor: How wide the interval of a crossover that is stated is: its upper end by its lower.
    """

    trial: Trial
    right: bool
    said: str
    factor: float | None = None


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
            factor = verdict.high / verdict.low if isinstance(verdict, Crossover) else None
            return Finding(trial, right, f"{truth}: {verdict_text(verdict)}", factor)
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
    for case, kind in ((PLANTED, _of_kind(findings, planted=True)),
                       (FALSE, _of_kind(findings, planted=False))):  # fmt: skip
        if kind:
            n_counted = sum(f.right == (case is PLANTED) for f in kind)
            factors = [f.factor for f in kind if f.factor]
            extra = {"interval_factor": statistics.median(factors)} if factors else {}
            records.append(Record(case, n_counted / len(kind), 0.0, len(kind), extra=extra))
    return records


def _of_kind(findings: Sequence[Finding], *, planted: bool) -> list[Finding]:
    return [f for f in findings if (f.trial.crossover_bytes is not None) == planted]


def summary_of(findings: Sequence[Finding], n_all: int) -> str:
    """Return in one line what came of it, to be read by itself."""
    planted = _of_kind(findings, planted=True)
    identical = _of_kind(findings, planted=False)
    found, false = sum(f.right for f in planted), sum(not f.right for f in identical)
    factors = [f.factor for f in planted if f.factor]
    width = f", median width a factor of {statistics.median(factors):.2f}" if factors else ""
    met = all(record.met for record in records_of(findings)) and len(findings) == n_all
    verdict = "passed" if met else "failed" if len(findings) == n_all else "not finished"
    return (
        f"self-check {verdict}: {found} of {len(planted)} planted crossovers stated with the truth "
        f"inside the 95 % interval (90 % are needed{width}); a false difference or crossover in "
        f"{false} of {len(identical)} sweeps of identical sides (5 % are allowed)"
    )


class _InterruptedError(Exception):
    # A sweep was; what it has is no finding.
    pass


def run(folder: Path, made: Sequence[Trial] | None = None) -> int:
    """Make all sweeps below `folder`, show what each said, write the cases; return a status.

    A folder that is there already is gone on with.

    Raises:
        MissingExtraError: numpy is not installed.
        SweepError: The folder holds something else.
        ResultsError: What it holds is malformed.
        OSError: It cannot be written.
    """
    from rich.console import Console

    from kvmmm.bench.crossover.extras import need
    from kvmmm.bench.host import host_record
    from kvmmm.bench.progress import progress_bar
    from kvmmm.bench.table import table_of

    need("numpy", what="the self-check")
    made = trials() if made is None else made
    out, err = Console(), Console(stderr=True)
    findings: list[Finding] = []
    interrupted = False
    try:
        with progress_bar(err, "self-check") as progress:
            sweeps = _Sweeps(folder, len(made), progress, err)
            for finding in check(made, sweeps.make):
                findings.append(finding)
                _show(finding, len(findings), len(made), err)
    except (_InterruptedError, KeyboardInterrupt):
        interrupted = True
    if records := records_of(findings):
        out.print(table_of(records))
        out.print(summary_of(findings, len(made)), highlight=False, soft_wrap=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / RECORDS_NAME, host_record(), records)
    if interrupted:
        err.print(
            f"interrupted; --self-check --out {folder} goes on", highlight=False, soft_wrap=True
        )
        return _EXIT_INTERRUPTED
    return 0 if all(record.met for record in records) else _EXIT_FAILED


class _Sweeps:
    # Makes them one after the other: what they have in common, and how much is left.

    def __init__(self, folder: Path, n_all: int, progress: Progress, err: Console) -> None:
        from kvmmm.bench.crossover.plan import SELF_CHECK, plan_of

        self._folder = folder
        self._plan = plan_of(SELF_CHECK)
        self._n_all = n_all
        self._n_begun = 0
        self._progress = progress
        self._err = err
        self._host: dict[str, Any] | None = None

    def make(self, trial: Trial) -> Results:
        from kvmmm.bench.crossover import facts, sweep

        self._n_begun += 1
        here = Path(self._folder, trial.name)
        if (results := _complete(here)) is None:
            if self._host is None:
                self._host = facts.host_facts()  # takes a second
            outcome = sweep.run(
                self._plan, here, resume=True, planted=trial.planted, host=self._host,
                progress=self._show,
            )  # fmt: skip
            for error in outcome.errors:
                self._err.print(f"{trial.name}: {error}", markup=False, soft_wrap=True)
            if outcome.interrupted:
                raise _InterruptedError
            results = read_results(here)
        if [other for other in results.others if other["kind"] == "planted"] != [
            _as_written({"kind": "planted", **trial.planted.as_json()})
        ]:
            raise sweep.SweepError(f"{here} is of another self-check: --out takes another folder")
        return results

    def _show(self, done: float, left: float | None, _text: str) -> None:
        n_left = self._n_all - self._n_begun
        left_s = n_left * ((self._plan.seconds or 0) + _BESIDE_S)
        text = f"self-check, sweep {self._n_begun} of {self._n_all}"
        fraction = (self._n_begun - 1 + done) / self._n_all
        self._progress(fraction, None if left is None else left + left_s, text)


def _complete(folder: Path) -> Results | None:
    if not (folder / FILE_NAME).exists():
        return None
    results = read_results(folder)
    return results if results.footer is not None and results.footer.complete else None


def _as_written(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    return json.loads(json.dumps(fields))  # tuples become lists


def _show(finding: Finding, n_done: int, n_all: int, err: Console) -> None:
    word = "right" if finding.right else "WRONG"
    err.print(
        f"{n_done}/{n_all} {finding.trial.name}: {word}: {finding.said}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
