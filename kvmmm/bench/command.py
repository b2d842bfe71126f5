"""`kvmmm bench NAME`: measures, shows a table, writes JSON Lines."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmmm.bench.registry import (
    ALL,
    BENCHMARKS,
    COMMANDS,
    SWEEPS,
    UnknownBenchmarkError,
    groups_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kvmmm.bench.case import Group
    from kvmmm.bench.record import Record

EXIT_INTERRUPTED = 130
EXIT_OVER_LIMIT = 1


class _Bench(click.Command):
    # `bench NAME`, where some names are commands with options of their own.

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None,
        **extra: Any,  # noqa: ANN401 - click's own
    ) -> click.Context:  # fmt: skip
        if args and args[0] in COMMANDS:
            command = getattr(import_module(COMMANDS[args[0]][0]), args[0])
            assert isinstance(command, click.Command)  # noqa: S101 - the table says so
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - a command's own answer
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command("bench", cls=_Bench)
@click.argument("name", required=False)
@click.option("--quick", is_flag=True, help="Fewer rounds: seconds, and more noise.")
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Write one JSON record a line: the host, then each case.",
)  # fmt: skip
@click.option("--list", "list_only", is_flag=True, help="List the benchmarks and their cases.")
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="faults, exits: a sweep of several processes, with intervals and a report in DIR.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the sweep that DIR holds.")
@click.option("--seed", type=int, help="Of the sweep's random choices.")
def bench(
    name: str | None, quick: bool, json_path: Path | None, list_only: bool, out: Path | None,
    resume: bool, seed: int | None,
) -> None:  # fmt: skip
    """Measure kvmmm beside floors in C: NAME is a benchmark, one case (exits/pio), or `all`.

    Each value is a median over interleaved rounds; "A/A noise" is by how much the same thing,
    measured twice, differs. A missed goal does not fail the command; a count above its limit does
    (status 1).

    With --out, `faults` (which has every kind of exit, too) and `exits` are sweeps as `crossover`
    is: five processes, intervals over processes and rounds, at most three minutes, report.html.
    Ctrl-C keeps what is done; --resume goes on with it.
    """
    if list_only:
        _list()
        return
    if out is not None:
        raise SystemExit(_sweep(name, out, json_path, quick=quick, resume=resume, seed=seed))
    if resume or seed is not None:
        raise click.UsageError("--resume and --seed are for sweeps: they need --out")
    if name is None:
        names = ", ".join([*BENCHMARKS, ALL, *COMMANDS])
        raise click.UsageError(f"say which: {names} (--list shows their cases)")
    try:
        groups = groups_of(name)
    except UnknownBenchmarkError as e:
        raise click.UsageError(str(e)) from e
    if json_path is not None and not json_path.parent.is_dir():
        raise click.UsageError(f"--json {json_path}: there is no directory {json_path.parent}")
    raise SystemExit(_run(groups, quick=quick, json_path=json_path))


def _sweep(
    name: str | None, folder: Path, json_path: Path | None, *, quick: bool, resume: bool,
    seed: int | None,
) -> int:  # fmt: skip
    if name not in SWEEPS:
        raise click.UsageError(f"--out is for {', '.join([*SWEEPS, 'crossover'])}")
    if json_path is not None:
        raise click.UsageError("--json is not for sweeps: DIR holds results.jsonl")
    sweep = import_module(SWEEPS[name]).sweep
    return int(sweep(name, folder, quick=quick, resume=resume, seed=seed))


def _list() -> None:
    for name, (what, _) in BENCHMARKS.items():
        hint = " (--out DIR: a sweep of several processes, with a report)" if name in SWEEPS else ""
        click.echo(f"{name}: {what}{hint}")
        for group in groups_of(name):
            for case in group.cases:
                sign = "<=" if case.better == "lower" else ">="
                goal = f" {sign} {case.goal:g}" if case.goal is not None else ""
                click.echo(f"    {case.name} [{case.unit}]{goal}")
                if case.note:
                    click.echo(f"        {case.note}")
    for name, (_, what) in COMMANDS.items():
        click.echo(f"{name}: {what} (a command of its own: kvmmm bench {name} --help)")


def _run(groups: Sequence[Group], *, quick: bool, json_path: Path | None) -> int:
    from rich.console import Console

    from kvmmm.bench.record import write_json_lines

    out, err = Console(), Console(stderr=True)
    records: list[Record] = []
    measured: list[tuple[Group, list[Record]]] = []
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
                measured.append((group, _measure(group, err, quick=quick)))
                records += measured[-1][1]
    except KeyboardInterrupt:
        if records:
            _show(measured, out)
        err.print("interrupted" + (f"; {json_path} was not written" if json_path else ""))
        return EXIT_INTERRUPTED
    _show(measured, out)
    if json_path is not None and host is not None:
        write_json_lines(json_path, host, records)
    return EXIT_OVER_LIMIT if any(record.over_limit for record in records) else 0


def _show(measured: Sequence[tuple[Group, list[Record]]], out: Console) -> None:
    from kvmmm.bench.table import table_of

    rows = [record for group, records in measured if not group.tell for record in records]
    texts = [group.tell(records) for group, records in measured if group.tell]
    if rows or not texts:
        out.print(table_of(rows))
    for text in texts:
        out.print(text, highlight=False, markup=False, soft_wrap=True)


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
