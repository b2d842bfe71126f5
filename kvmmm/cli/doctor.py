"""`kvmmm doctor`: how the findings of `kvmmm.doctor` look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmmm.cli.terminal import show
from kvmmm.errors import EXIT_NO_KVM

if TYPE_CHECKING:
    from rich.table import Table

    from kvmmm.doctor import Examination

# How each result is shown.
_RESULTS = {
    "ok": "[green]ok[/green]",
    "works differently": "[yellow]differs[/yellow]",
    "missing": "[bold red]MISSING[/bold red]",
    "failed": "[bold red]FAILED[/bold red]",
    "not tried": "[dim]not tried[/dim]",
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
        show(_table(examination))
        if examination.is_open:
            show("", f"[bold]{examination.verdict}[/bold]", _summary(examination))
        else:
            # As it is: there are commands in it to copy.
            click.echo(f"\n{examination.findings['open'].remedy}")
    return 0 if examination.is_ok else EXIT_NO_KVM


def _summary(examination: Examination) -> str:
    seconds = f"{examination.elapsed_ns / 1e9:.1f} s"
    failures = examination.failures
    if not failures:
        n_checks = len(examination.findings)
        return f"[green]All that kvmmm needs works[/green] ({n_checks} checks, {seconds})."
    names = ", ".join(check.name for check in failures[:4])
    more = f" and {len(failures) - 4} more" if len(failures) > 4 else ""
    return f"[bold red]kvmmm does not work here:[/bold red] {names}{more} ({seconds})"


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
        text = escape(finding.fact)
        if finding.remedy and examination.is_open:
            text += f"\n[dim]-> {escape(finding.remedy)}[/dim]"
        table.add_row(f"  {check.name}", _RESULTS[finding.result], text)
    return table
