"""`kvmmm doctor`: how the findings of `kvmmm.doctor` look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmmm.cli.terminal import show
from kvmmm.errors import EXIT_NO_KVM

if TYPE_CHECKING:
    from kvmmm.doctor import Examination
    from kvmmm.doctor.finding import Check, Finding

# How each result is shown.
_RESULTS = {
    "ok": "[green]ok[/green]",
    "works differently": "[yellow]differs[/yellow]",
    "missing": "[bold red]MISSING[/bold red]",
    "failed": "[bold red]FAILED[/bold red]",
    "not tried": "[dim]not tried[/dim]",
}
_NAME_COLUMNS, _RESULT_COLUMNS = 28, 7


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(as_json: bool) -> int:
    """Find out what this host's KVM can do.

    Exercises every mechanism that kvmmm relies on, in VMs of some bytes of machine code: one line a
    check, with what was seen, and what to do about it. Ends with 0 when all that is needed works,
    and with 69 otherwise.
    """
    from kvmmm.doctor import examine

    if as_json:
        import json

        examination = examine()
        click.echo(json.dumps(examination.as_dict(), indent=2))
    else:
        examination = examine(_Lines())
        _conclude(examination)
    return 0 if examination.is_ok else EXIT_NO_KVM


class _Lines:
    """Prints each finding as it comes: the last line tells where one hangs."""

    def __init__(self) -> None:
        self._theme = ""

    def __call__(self, theme: str, check: Check, finding: Finding) -> None:
        from rich.markup import escape
        from rich.table import Table

        if finding.result == "not tried":
            return  # all for the same reason, which was just shown
        if theme != self._theme:
            show(*([""] if self._theme else []), f"[bold cyan]{theme}[/bold cyan]")
            self._theme = theme
        row = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        row.add_column(width=_NAME_COLUMNS)
        row.add_column(width=_RESULT_COLUMNS)
        row.add_column()
        text = escape(finding.fact)
        # What is to be typed must not be wrapped: that stands at the end.
        if finding.remedy and check.key != "open":
            text += f"\n[dim]-> {escape(finding.remedy)}[/dim]"
        row.add_row(f"  {check.name}", _RESULTS[finding.result], text)
        show(row)


def _conclude(examination: Examination) -> None:
    if not examination.is_open:
        click.echo(f"\n{examination.findings['open'].remedy}")
        return
    show("", f"[bold]{examination.verdict}[/bold]", _summary(examination))


def _summary(examination: Examination) -> str:
    seconds = f"{examination.elapsed_ns / 1e9:.1f} s"
    failures = examination.failures
    if not failures:
        n_checks = len(examination.findings)
        return f"[green]All that kvmmm needs works[/green] ({n_checks} checks, {seconds})."
    names = ", ".join(check.name for check in failures[:4])
    more = f" and {len(failures) - 4} more" if len(failures) > 4 else ""
    return f"[bold red]kvmmm does not work here:[/bold red] {names}{more} ({seconds})"
