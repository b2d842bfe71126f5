"""What a person reads: one row a case."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from kvmmm.bench.record import Record


def table_of(records: Sequence[Record]) -> Table:
    """Return the table of some records."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("A/A noise", justify="right", no_wrap=True)
    table.add_column("")
    for record in records:
        table.add_row(*_row(record))
    return table


def _row(record: Record) -> tuple[str, ...]:
    case = record.case
    sign = "≤" if case.better == "lower" else "≥"
    goal = "" if case.goal is None else f"{sign} {case.goal:g}"
    verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[record.met]
    for name, most, limit in record.over_limit:
        verdict += f" [red]{most} {name}, at most {limit} allowed[/]"
    return (case.name, number_text(record.value), case.unit, goal, f"{record.aa:.1%}", verdict)


def number_text(value: float) -> str:
    """Return a value with three or four digits that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
