"""`kvmmm calibrate`: measures this host for the policy of copies, and keeps what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmmm.cli.terminal import show

if TYPE_CHECKING:
    from collections.abc import Mapping

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--out", metavar="FILE", type=_PATH, help="Another file than the user's own.")
@click.option("--show", "show_only", is_flag=True, help="Show what is in force; measure nothing.")
@click.option("--delete", is_flag=True, help="Delete the file: back to the defaults.")
def calibrate(out: Path | None, show_only: bool, delete: bool) -> None:
    """Measure the few costs that decide how copies are made here.

    Takes some seconds and needs no KVM. What comes of it is kept below the user's cache directory
    (KVMMM_CALIBRATION names another file, or is "off"), and every memory manager uses it from then
    on, on this host and with this build of kvmmm only; KVMMM_POLICY overrides single numbers.
    """
    if show_only and delete:
        raise click.UsageError("--show and --delete exclude each other")
    if show_only:
        _show(out)
    elif delete:
        _delete(_path(out))
    else:
        _calibrate(_path(out))


def _path(out: Path | None) -> Path:
    from kvmmm.errors import PolicyError
    from kvmmm.mm.calibration import calibration_path

    path = out or calibration_path()
    if path is None:
        raise PolicyError("KVMMM_CALIBRATION", "it is off, or there is no home: name a --out FILE")
    return path


def _calibrate(path: Path) -> None:
    from kvmmm.bench.calibrate import calibrate
    from kvmmm.mm import calibration

    found = calibrate()
    calibration.write(path, found.numbers, found.costs.as_dict())
    _table(found.numbers, found.reasons)
    click.echo(f"{path}: written, after {found.elapsed_ns / 1e9:.1f} s")


def _show(out: Path | None) -> None:
    import os

    from kvmmm.errors import PolicyError
    from kvmmm.mm import calibration
    from kvmmm.mm.policy import from_environment

    environ = {**os.environ, "KVMMM_CALIBRATION": str(out)} if out else os.environ
    policy = from_environment(environ)
    _table(policy.as_dict(), {})
    click.echo(f"in force: {policy.source}")
    if policy.refused:
        click.echo(f"refused: {policy.refused}")
    path = calibration.calibration_path(environ)
    if path is None:
        click.echo("no calibration is used: KVMMM_CALIBRATION is off, or there is no home")
        return
    try:
        content = calibration.read(path)
    except FileNotFoundError:
        click.echo(f"{path}: there is none; `kvmmm calibrate` makes it")
    except (OSError, PolicyError):
        pass  # it is said above
    else:
        made = content["made"]
        click.echo(f"{path}: made {made} by kvmmm {content.get('kvmmm')} for {content['host']}")


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        click.echo(f"{path}: there is none")
    else:
        click.echo(f"{path}: deleted")


def _table(numbers: Mapping[str, int], reasons: Mapping[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from kvmmm.mm.policy import DEFAULTS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("default", justify="right")
    if reasons:
        table.add_column("because")
    for name, default in DEFAULTS.items():
        value = str(numbers[name])
        shown = value if numbers[name] == default else f"[bold]{value}[/bold]"
        row = (name, shown, str(default))
        table.add_row(*row, *([escape(reasons.get(name, "as always"))] if reasons else []))
    show(table)
