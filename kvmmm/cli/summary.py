"""What `--stats` shows: where the guest left, why, and what memory it was given.

Written for somebody who sees it for the first time: the equation of demand paging first, then the
counts behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.cli.terminal import rich_console
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from kvmmm.vmm.statistics import RunStatistics

    Row = tuple[str, str, str]
    """(what, how many, what that means)"""


def show(stats: RunStatistics) -> None:
    """Print the tables on stderr."""
    console = rich_console(stderr=True)
    console.print()
    console.print(_table("demand paging", _equation(stats)))
    console.print(_sums(stats))
    for title, rows in (
        ("faults", _faults(stats)),
        ("exits", _exits(stats)),
        ("memory", _memory(stats)),
        ("time", _times(stats)),
    ):
        if rows:
            console.print()
            console.print(_table(title, rows))
    console.print()


def _table(title: str, rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, style="bold", header_style="bold cyan", min_width=18, no_wrap=True)
    table.add_column("", justify="right", no_wrap=True, min_width=10)
    table.add_column("", style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def _equation(stats: RunStatistics) -> list[Row]:
    rows = [
        (
            "  EPT violations",
            f"{stats.ept_violations}",
            "accesses where no memslot was, or none to write",
        ),
    ]
    if stats.page_faults:
        rows.append(
            (
                "+ page faults",
                f"{stats.page_faults}",
                "#PFs by kvmmm's IDT: the page tables forbade it",
            )
        )
    rows += [
        ("= vma look-ups", f"{stats.vma_lookups}", "may the guest do that there?"),
        ("= pma insertions", f"{stats.pma_insertions}", "yes, and frames were allocated for it"),
        ("+ pma hits", f"{stats.pma_hits}", "yes, and the frames were there already"),
    ]
    if stats.refused:
        rows.append(("+ refused", f"{stats.refused}", "no: that ended the run"))
    return rows


def _sums(stats: RunStatistics) -> str:
    faults = str(stats.ept_violations)
    if stats.page_faults:
        faults += f" + {stats.page_faults}"
    served = f"{stats.pma_insertions} + {stats.pma_hits}"
    if stats.refused:
        served += f" + {stats.refused}"
    if stats.adds_up:
        return f"[green]it adds up:[/green] {faults} = {stats.vma_lookups} = {served}"
    return f"[bold red]it does not add up:[/bold red] {faults}, {stats.vma_lookups}, {served}"


def _faults(stats: RunStatistics) -> list[Row]:
    if not stats.faults:
        return []
    wanted = [
        ("to read", f"{stats.reads}", ""),
        ("to write", f"{stats.writes}", ""),
        ("to execute", f"{stats.executes}", ""),
    ]
    came = [
        (
            "as MMIO exits",
            f"{stats.mmio_faults}",
            "KVM found no usable memslot; kvmmm did the access",
        ),
        (
            "by restarting",
            f"{stats.emulated_faults}",
            "KVM could not emulate it: made present, run again",
        ),
        ("as #PF", f"{stats.page_faults}", "through the default IDT"),
    ]
    return [row for row in (*wanted, *came) if row[1] != "0"]


def _exits(stats: RunStatistics) -> list[Row]:
    rows = [
        (name, f"{count}", _EXITS.get(name, ""))
        for name, count in sorted(stats.exits.items(), key=lambda item: -item[1])
    ]
    if stats.ignored_ports:
        rows.append(("ignored ports", f"{stats.ignored_ports}", "nobody listens there; part of io"))
    return rows


_EXITS = {
    "io": "port accesses: console, exit status, exceptions",
    "mmio": "EPT violations",
    "internal_error": "instructions that KVM could not emulate",
    "hlt": "the guest halted",
    "shutdown": "a triple fault",
}


def _memory(stats: RunStatistics) -> list[Row]:
    rows = [
        (
            "given to the guest", format_bytes(stats.allocated_bytes),
            f"{stats.allocated_bytes // PAGE_BYTES} pages, committed as they are touched",
        ),
        ("memslots", f"{stats.n_slots}", "ranges that KVM knows, kvmmm's own included"),
        (
            "arena", format_bytes(stats.used_bytes),
            f"{format_bytes(stats.peak_bytes)} at most, kvmmm's own pages included",
        ),
        ("console", format_bytes(stats.console_bytes), _console(stats)),
    ]  # fmt: skip
    return rows


def _console(stats: RunStatistics) -> str:
    if stats.coalesced_bytes:
        return f"{format_bytes(stats.coalesced_bytes)} of it queued by KVM, without an exit"
    return "what the guest printed"


def _times(stats: RunStatistics) -> list[Row]:
    total_ns = stats.guest_ns + stats.handler_ns
    if not total_ns:
        return []
    share = stats.handler_ns / total_ns
    n_exits = sum(stats.exits.values())
    each = f", {_duration(stats.handler_ns / n_exits)} an exit" if n_exits else ""
    return [
        ("in the guest", _duration(stats.guest_ns), "KVM_RUN, KVM's own work included"),
        ("in handlers", _duration(stats.handler_ns), f"{share:.1%}{each}"),
    ]


def _duration(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.1f} {unit}"
    return f"{ns / 1e3:.1f} us"
