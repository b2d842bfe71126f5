"""`kvmmm guests`: what is bundled."""

from __future__ import annotations

import click

from kvmmm.cli.terminal import show

_GROUPS = {
    "demo": "to look at",
    "test": "each proves one property, some by failing",
    "user": "programs for ring 3, with Linux's system calls",
    "bench": "for `kvmmm bench`",
}


@click.command()
def guests() -> None:
    """List the bundled guests: what each proves, and how it must end.

    Run one by its name: kvmmm run hello
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kvmmm.vmm import bundled

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("guest", style="bold cyan", no_wrap=True)
    table.add_column("what it proves")
    table.add_column("how it ends", style="dim")
    for group, what in _GROUPS.items():
        members = [guest for guest in bundled.guests() if guest.group == group]
        if not members:
            continue
        table.add_section()
        table.add_row(f"[not bold default]{group}", f"[dim]{what}[/dim]", "")
        for guest in members:
            table.add_row(f"  {guest.name}", guest.property, guest.expected)
    show(table, "", "[dim]`kvmmm run NAME [-- ARGS]` runs one[/dim]")
