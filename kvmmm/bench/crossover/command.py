"""`kvmmm bench crossover` and `kvmmm bench compare`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kvmmm.bench.crossover.sweep import Outcome

EXIT_INTERRUPTED = 130
EXIT_FAILED = 1
_ERRORS_SHOWN = 8
_FEWEST = 2
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("crossover")
@click.option("--quick", "mode", flag_value="quick", help="At most a minute: fewer cells.")
@click.option("--full", "mode", flag_value="full", help="Every combination: hours.")
@click.option(
    "--self-check", "mode", flag_value="self-check",
    help="Plant crossovers, and none, and see whether they are found: up to 20 minutes.",
)  # fmt: skip
@click.option("--out", metavar="DIR", type=_FOLDER, help="Where results and report go.")
@click.option("--resume", is_flag=True, help="Go on with what DIR holds.")
@click.option("--seed", type=int, help="Of all random choices.")
@click.option("--cluster", metavar="ADDRESS", help="On every worker of a Dask cluster.")
def crossover(
    mode: str | None, out: Path | None, resume: bool, seed: int | None, cluster: str | None
) -> None:
    """Measure where copies through the address space beat internal mappings on this host.

    Up to ten minutes by default. Ctrl-C keeps what is done; --resume goes on with it. The answer
    comes in ten lines, with a report (report.html) in DIR.
    """
    if resume and out is None:
        raise click.UsageError("--resume needs --out: which sweep?")
    folder = out or Path(time.strftime("crossover-%Y%m%d-%H%M%S"))
    mode = mode or "default"
    if cluster is not None:
        raise SystemExit(_elsewhere("cluster", cluster, mode, folder))
    if mode == "self-check":
        raise SystemExit(_elsewhere("selfcheck", folder))
    raise SystemExit(_sweep(mode, folder, resume=resume, seed=seed))


@click.command("compare")
@click.argument("folders", metavar="A B...", nargs=-1, required=True, type=_FOLDER)
@click.option("--out", metavar="DIR", type=_FOLDER, help="Where the comparing page goes.")
@click.option(
    "--agree", is_flag=True,
    help="Exit with 1 unless the others agree with the first: the intervals of every crossover "
    "that both state overlap, and no cell is won by more than 10 % by different sides.",
)  # fmt: skip
def compare(folders: Sequence[Path], out: Path | None, *, agree: bool) -> None:
    """Put several sweeps side by side (hosts, or commits), and say what differs beyond noise."""
    from kvmmm.bench.crossover.finish import module_of

    if len(folders) < _FEWEST:
        raise click.UsageError("name at least two folders")
    module = module_of("compare")
    if module is None:
        raise click.UsageError("this kvmmm has no compare")
    compared = module.main(list(folders), out)
    click.echo(compared.text)
    if agree and not compared.agree:
        raise SystemExit(EXIT_FAILED)


def _elsewhere(module_name: str, *args: object) -> int:
    # Each of these modules has a run(...) that answers with lines to show, or an exit status.
    from kvmmm.bench.crossover.finish import module_of

    module: Any = module_of(module_name)
    if module is None:
        raise click.UsageError(f"this kvmmm has no {module_name}")
    answer = module.run(*args)
    if isinstance(answer, int):
        return answer
    for line in answer or ():
        click.echo(line)
    return 0


def _sweep(mode: str, folder: Path, *, resume: bool, seed: int | None) -> int:
    from rich.console import Console

    from kvmmm.bench.crossover.plan import estimate_s, plan_of
    from kvmmm.bench.crossover.pool import offers_huge_pages
    from kvmmm.bench.crossover.record import ResultsError
    from kvmmm.bench.crossover.sweep import SweepError, run
    from kvmmm.bench.progress import progress_bar

    err = Console(stderr=True)
    plan = plan_of(mode, huge_pages=offers_huge_pages())
    if plan.seconds is None:
        hours = estimate_s(plan) / 3600
        err.print(
            f"{len(plan.cells)} cells, about {hours:.1f} hours; Ctrl-C keeps what is done",
            highlight=False,
        )
    try:
        with progress_bar(err, "crossover") as progress:
            outcome = run(plan, folder, seed=seed, resume=resume, progress=progress)
    except (SweepError, ResultsError) as e:
        raise click.UsageError(str(e)) from e
    _tell(outcome, folder, err)
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    _conclude(folder, err)
    return 0 if outcome.complete else EXIT_FAILED


def _tell(outcome: Outcome, folder: Path, err: Console) -> None:
    for error in outcome.errors[:_ERRORS_SHOWN]:
        err.print(error, style="red", highlight=False, markup=False, soft_wrap=True)
    if (more := len(outcome.errors) - _ERRORS_SHOWN) > 0:
        err.print(f"... and {more} more, all in {folder}")
    what = "interrupted; " if outcome.interrupted else "" if outcome.complete else "incomplete; "
    again = "" if outcome.complete else f"; --resume --out {folder} goes on"
    err.print(
        f"{what}{outcome.n_samples} samples in {outcome.seconds:.0f} s: {folder}{again}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _conclude(folder: Path, err: Console) -> None:
    from kvmmm.bench.crossover.extras import MissingExtraError
    from kvmmm.bench.crossover.finish import conclude

    try:
        conclude(folder, click.echo)
    except MissingExtraError as e:
        err.print(f"no answer: {e}", markup=False, soft_wrap=True)
