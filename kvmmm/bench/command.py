"""`kvmmm bench NAME`: measures, shows a table, writes JSON Lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmmm.bench.registry import ALL, BENCHMARKS, UnknownBenchmarkError, groups_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kvmmm.bench.case import Group
    from kvmmm.bench.record import Record

EXIT_INTERRUPTED = 130
EXIT_OVER_LIMIT = 1


@click.command("bench")
@click.argument("name", required=False)
@click.option("--quick", is_flag=True, help="Fewer rounds: seconds, and more noise.")
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Write one JSON record a line: the host, then each case.",
)  # fmt: skip
@click.option("--list", "list_only", is_flag=True, help="List the benchmarks and their cases.")
def bench(name: str | None, quick: bool, json_path: Path | None, list_only: bool) -> None:
    """Measure kvmmm beside floors in C: NAME is a benchmark, one case (exits/pio), or `all`.

    Each value is a median over interleaved rounds; "A/A noise" is by how much the same thing,
    measured twice, differs. A missed goal does not fail the command; a count above its limit does
    (status 1).
    """
    if list_only:
        _list()
        return
    if name is None:
        names = ", ".join([*BENCHMARKS, ALL])
        raise click.UsageError(f"say which: {names} (--list shows their cases)")
    try:
        groups = groups_of(name)
    except UnknownBenchmarkError as e:
        raise click.UsageError(str(e)) from e
    if json_path is not None and not json_path.parent.is_dir():
        raise click.UsageError(f"--json {json_path}: there is no directory {json_path.parent}")
    raise SystemExit(_run(groups, quick=quick, json_path=json_path))


def _list() -> None:
    for name, (what, _) in BENCHMARKS.items():
        click.echo(f"{name}: {what}")
        for group in groups_of(name):
            for case in group.cases:
                sign = "<=" if case.better == "lower" else ">="
                goal = f" {sign} {case.goal:g}" if case.goal is not None else ""
                click.echo(f"    {case.name} [{case.unit}]{goal}")
                if case.note:
                    click.echo(f"        {case.note}")


def _run(groups: Sequence[Group], *, quick: bool, json_path: Path | None) -> int:
    from rich.console import Console

    from kvmmm.bench.record import write_json_lines
    from kvmmm.bench.table import table_of

    out, err = Console(), Console(stderr=True)
    records: list[Record] = []
    host = None
    try:
        if json_path is not None:
            from kvmmm.bench.host import host_record

            host = host_record()
        for group in groups:
            if missing := group.missing():
                names = ", ".join(case.name for case in group.cases)
                err.print(f"{names}: skipped: {missing}", highlight=False, soft_wrap=True)
            else:
                records += _measure(group, err, quick=quick)
    except KeyboardInterrupt:
        if records:
            out.print(table_of(records))
        err.print("interrupted" + (f"; {json_path} was not written" if json_path else ""))
        return EXIT_INTERRUPTED
    out.print(table_of(records))
    if json_path is not None and host is not None:
        write_json_lines(json_path, host, records)
    return EXIT_OVER_LIMIT if any(record.over_limit for record in records) else 0


def _measure(group: Group, err: Console, *, quick: bool) -> list[Record]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from kvmmm.bench.runner import measure

    # Drawn between rounds only, by this thread: one that refreshes would run inside timed parts.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(group.title)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.refresh()

        return measure(group, quick=quick, progress=show)
