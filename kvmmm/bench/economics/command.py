"""`kvmmm bench faults --out DIR` and `kvmmm bench exits --out DIR`, from beginning to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from kvmmm.bench.crossover.sweep import Outcome

EXIT_INTERRUPTED = 130
EXIT_INCOMPLETE = 1
ANSWER_NAME, REPORT_NAME = "answer.txt", "report.html"
_ERRORS_SHOWN = 8


def sweep(
    subject: str, folder: Path, *, quick: bool, resume: bool = False, seed: int | None = None
) -> int:
    """Measure, analyse, write the report; return an exit status.

    Args:
        subject: What is measured; one of `plan.SUBJECTS`.
        folder: Where results and report go.
        quick: Within a minute.
        resume: Go on with what the folder holds.
        seed: Of all random choices.

    Raises:
        click.UsageError: There is something else in the folder.
    """
    from rich.console import Console

    from kvmmm.bench.crossover.extras import MissingExtraError
    from kvmmm.bench.crossover.record import ResultsError
    from kvmmm.bench.crossover.sweep import SweepError, run
    from kvmmm.bench.economics.plan import plan_of
    from kvmmm.bench.economics.worker import COMMAND
    from kvmmm.bench.progress import progress_bar

    err = Console(stderr=True)
    plan = plan_of(subject, quick=quick)
    try:
        with progress_bar(err, f"bench {subject}") as progress:
            outcome = run(
                plan, folder, seed=seed, resume=resume, progress=progress, command=COMMAND
            )  # fmt: skip
    except (SweepError, ResultsError) as e:
        raise click.UsageError(str(e)) from e
    again = f"kvmmm bench {subject}{' --quick' if quick else ''} --resume --out {folder}"
    _tell(outcome, folder, again, err)
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    try:
        conclude(folder, click.echo, figures=not quick)
    except MissingExtraError as e:
        err.print(f"no answer: {e}", markup=False, soft_wrap=True)
    except OSError as e:
        err.print(f"no report: {e}; the results are kept", markup=False, soft_wrap=True)
        return EXIT_INCOMPLETE
    return 0 if outcome.complete else EXIT_INCOMPLETE


def conclude(folder: Path, tell: Callable[[str], object], *, figures: bool = True) -> None:
    """Analyse what a folder holds, and write answer, report and figures into it.

    Args:
        folder: Where results.jsonl is.
        tell: Called with each line of the answer, and of what was written.
        figures: Whether to draw them: they are for papers, and take their time.

    Raises:
        MissingExtraError: numpy is not installed; the results are there nevertheless.
        ResultsError: The results are malformed, or of something else.
        OSError: Something cannot be read or written.
    """
    from kvmmm.bench.crossover.record import read_results
    from kvmmm.bench.crossover.report.figures import MISSING, have_matplotlib
    from kvmmm.bench.economics.analysis import analyse
    from kvmmm.bench.economics.answer import answer_of
    from kvmmm.bench.economics.figures import write_figures
    from kvmmm.bench.economics.page import report_page

    results = read_results(folder)
    said = analyse(results, seed=results.header.seed)
    answer = answer_of(results, said)
    (folder / ANSWER_NAME).write_text("\n".join(answer) + "\n", encoding="utf-8")
    for line in answer:
        tell(line)
    path = folder / REPORT_NAME
    path.write_text(report_page(results, said, answer), encoding="utf-8")
    tell(f"report: {path}")
    if figures and not have_matplotlib():
        tell(MISSING)
    elif figures:
        n_files = len(write_figures(folder / "figures", results, said))
        tell(f"figures: {folder / 'figures'} ({n_files} files)")


def _tell(outcome: Outcome, folder: Path, again: str, err: Console) -> None:
    for error in outcome.errors[:_ERRORS_SHOWN]:
        err.print(error, style="red", highlight=False, markup=False, soft_wrap=True)
    if (more := len(outcome.errors) - _ERRORS_SHOWN) > 0:
        err.print(f"... and {more} more, all in {folder}", highlight=False, soft_wrap=True)
    what = "interrupted; " if outcome.interrupted else "" if outcome.complete else "incomplete; "
    goes_on = "" if outcome.complete else f"; {again} goes on"
    err.print(
        f"{what}{outcome.n_samples} samples in {outcome.seconds:.0f} s: {folder}{goes_on}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
