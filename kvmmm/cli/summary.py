"""What `--stats` shows: where the guest left, why, and what memory it was given.

Written for somebody who sees it for the first time: the equation of demand paging first, then the
counts behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.cli.terminal import show
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmmm.vmm.statistics import RunStatistics

    Row = tuple[str, str, str]
    """(what, how many, what that means)"""

_COUNT_COLUMNS = 9


def show_statistics(stats: RunStatistics) -> None:
    """Print the summary on stderr."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=20)
    table.add_column(no_wrap=True, justify="right", min_width=_COUNT_COLUMNS)
    table.add_column(style="dim")
    for title, rows in (
        ("faults", _faults(stats)),
        ("exits to kvmmm", _exits(stats)),
        ("memory", _memory(stats)),
        ("time", _times(stats)),
    ):
        shown = [row for row in rows if row[1] != "0"]
        if shown:
            table.add_row()
            table.add_row(f"[bold cyan]{title}[/bold cyan]")
        for what, count, meaning in shown:
            table.add_row(f"  {what}", count, meaning)
    show("", "[bold cyan]demand paging[/bold cyan]", f"  {equation(stats)}", table, "", stderr=True)


def equation(stats: RunStatistics) -> str:
    """Return what every fault came to, as an equation in words, with rich's markup.

    A fault is an EPT violation (no memslot where the guest reached) or a #PF; each is one vma
    look-up (may it?), and each look-up one pma that is made (insertion), found (hit), or refused.
    """
    left = [(stats.ept_violations, "EPT violation")]
    right = [(stats.pma_insertions, "pma insertion"), (stats.pma_hits, "pma hit")]
    if stats.page_faults:
        left.append((stats.page_faults, "page fault"))
    if stats.refused:
        right.append((stats.refused, "refusal"))
    sides = (_sum(left), _plural(stats.vma_lookups, "vma look-up"), _sum(right))
    if stats.adds_up:
        return f"[bold]{' = '.join(sides)}[/bold]   [green]it adds up[/green]"
    return f"[bold]{' | '.join(sides)}[/bold]   [bold red]it does not add up[/bold red]"


def _sum(terms: Iterable[tuple[int, str]]) -> str:
    return " + ".join(_plural(n, what) for n, what in terms)


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _faults(stats: RunStatistics) -> list[Row]:
    return [
        ("EPT violations", f"{stats.ept_violations}", "the guest reached where no memslot was"),
        ("  by MMIO exit", f"{stats.mmio_faults}", "kvmmm made a slot, then the access by hand"),
        ("  by restart", f"{stats.emulated_faults}", "kvmmm made a slot, and had it tried again"),
        ("page faults", f"{stats.page_faults}", "#PF: the page tables forbade it"),
        ("vma look-ups", f"{stats.vma_lookups}", "may the guest do that there?"),
        ("  to read", f"{stats.reads}", ""),
        ("  to write", f"{stats.writes}", ""),
        ("  to execute", f"{stats.executes}", ""),
        ("pma insertions", f"{stats.pma_insertions}", "it may: memory was found for it"),
        ("pma hits", f"{stats.pma_hits}", "it may, and its memory was there already"),
        ("refusals", f"{stats.refused}", "it may not, or nothing is left: the run ended"),
    ]


def _exits(stats: RunStatistics) -> list[Row]:
    rows = [
        (name, f"{count}", _EXITS.get(name, ""))
        for name, count in sorted(stats.exits.items(), key=lambda item: -item[1])
    ]
    rows.append(("system calls", f"{stats.syscalls}", "of io: the program's"))
    rows.append(("ignored ports", f"{stats.ignored_ports}", "of io: nobody listens there"))
    return rows


_EXITS = {
    "mmio": "EPT violations",
    "io": "port accesses: console, exit status, exceptions, system calls",
    "internal_error": "instructions that KVM could not emulate",
    "hlt": "the guest halted",
    "shutdown": "a triple fault",
}


def _memory(stats: RunStatistics) -> list[Row]:
    n_pages = stats.allocated_bytes // PAGE_BYTES
    peak = format_bytes(stats.peak_bytes)
    return [
        ("guest memory", format_bytes(stats.allocated_bytes), _plural(n_pages, "page")),
        ("arena", format_bytes(stats.used_bytes), f"with kvmmm's own pages; at most {peak}"),
        ("memslots", f"{stats.n_slots}", "ranges of it that KVM knows"),
        ("console", format_bytes(stats.console_bytes), _console(stats)),
    ]


def _console(stats: RunStatistics) -> str:
    if stats.coalesced_bytes:
        return f"printed; {format_bytes(stats.coalesced_bytes)} queued by KVM, without an exit"
    return "printed"


def _times(stats: RunStatistics) -> list[Row]:
    if not stats.guest_ns:
        return []
    share = stats.handler_ns / (stats.guest_ns + stats.handler_ns)
    return [
        ("in the guest", _duration(stats.guest_ns), "KVM_RUN, with what KVM itself does"),
        ("in handlers", _duration(stats.handler_ns), f"{share:.1%} of the run"),
    ]


def _duration(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if ns >= size:
            return f"{ns / size:.1f} {unit}"
    return f"{ns / 1e3:.1f} us"
