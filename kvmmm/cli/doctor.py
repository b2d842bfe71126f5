"""`kvmmm doctor`: how the findings of `kvmmm.doctor` look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmmm.cli.terminal import rich_console
from kvmmm.errors import EXIT_NO_KVM

if TYPE_CHECKING:
    from rich.table import Table

    from kvmmm.doctor import Examination

_STYLES = {
    "ok": "green",
    "works differently": "yellow",
    "missing": "bold red",
    "failed": "bold red",
    "not tried": "dim",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def doctor(as_json: bool) -> int:
    """Find out what this host's KVM can do.

    Exercises every mechanism that kvmmm relies on, in VMs of some bytes of machine code: one line a
    check, with what was seen, and what to do about it. Ends with 0 when all that is needed works,
    and with 69 otherwise.
    """
    from kvmmm.doctor import examine

    examination = examine()
    if as_json:
        import json

        click.echo(json.dumps(examination.as_dict(), indent=2))
    else:
        _show(examination)
    return 0 if examination.is_ok else EXIT_NO_KVM


def _show(examination: Examination) -> None:
    console = rich_console()
    console.print(_table(examination))
    console.print()
    console.print(f"[bold]{examination.verdict}[/bold]")
    failures = examination.failures
    seconds = f"{examination.elapsed_ns / 1e9:.1f} s"
    if failures:
        names = ", ".join(check.name for check in failures[:4])
        more = f" and {len(failures) - 4} more" if len(failures) > 4 else ""
        console.print(f"[bold red]kvmmm does not work here:[/bold red] {names}{more} ({seconds})")
    else:
        n_checks = len(examination.findings)
        console.print(f"[green]All that kvmmm needs works[/green] ({n_checks} checks, {seconds}).")


def _table(examination: Examination) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    last_theme = ""
    for theme, check, finding in examination.rows():
        if not examination.is_open and finding.result == "not tried":
            continue
        if theme != last_theme:
            if last_theme:
                table.add_row()
            table.add_row(f"[bold cyan]{theme}[/bold cyan]")
            last_theme = theme
        style = _STYLES[finding.result]
        text = escape(finding.fact)
        if finding.remedy:
            text += f"\n[dim]-> {escape(finding.remedy)}[/dim]"
        table.add_row(f"  {check.name}", f"[{style}]{finding.result}[/{style}]", text)
    return table
