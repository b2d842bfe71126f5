"""`kvmmm calibrate`: measures this host for the policy of copies, and keeps what it found."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmmm.cli.terminal import show

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.mm.policy import Policy

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--out", metavar="FILE", type=_PATH, help="Another file than the user's own.")
@click.option("--show", "show_only", is_flag=True, help="Show what is in force; measure nothing.")
@click.option("--delete", is_flag=True, help="Delete the file: back to the defaults.")
def calibrate(out: Path | None, show_only: bool, delete: bool) -> None:
    """Measure the few costs that decide how copies are made here.

    What a copy between host and guest costs depends on the host: faults, mappings, handing over the
    GIL, a lookup in the frame table beside one by the host's MMU (the mirror). Measuring that takes
    some seconds on one CPU, and needs no KVM; what else runs meanwhile makes it less certain, and
    what is uncertain stays as it is by default.

    What comes of it is kept below the user's cache directory (KVMMM_CALIBRATION names another file,
    or is "off"), and every memory manager that a new process makes goes by it. A file of another
    host, kernel or build of kvmmm, or one half a year old, is refused, and the defaults are used;
    `--show` and `kvmmm doctor` say so, and why. KVMMM_POLICY ("mirror=1,mirror_reuses=32")
    overrides single numbers.
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


def _in_force(path: Path) -> Policy:
    # What a new process would go by if that file were its own.
    import os

    from kvmmm.mm.policy import from_environment

    return from_environment({**os.environ, "KVMMM_CALIBRATION": str(path)})


def _calibrate(path: Path) -> None:
    from kvmmm.bench.calibrate import calibrate
    from kvmmm.mm import calibration

    before = _in_force(path)
    found = calibrate()
    # First, so that it is not lost where the file cannot be written.
    _table(found.numbers, found.reasons)
    calibration.write(path, found.numbers, found.costs.as_dict(), found.reasons)
    after = _in_force(path)
    for line in _changes(before.as_dict(), after.as_dict(), found.reasons):
        click.echo(line)
    if after.source != str(path):
        click.echo(f"overridden: {after.source}")
    own = calibration.calibration_path()
    if own is None or own.absolute() != path.absolute():
        click.echo(f"not in force: that needs KVMMM_CALIBRATION={path}")
    click.echo(f"{path}: written, after {found.elapsed_ns / 1e9:.1f} s")


def _changes(
    before: Mapping[str, int], after: Mapping[str, int], reasons: Mapping[str, str]
) -> Iterator[str]:
    changed = [name for name in after if after[name] != before[name]]
    if not changed:
        yield "nothing changes: copies are made as before"
    for name in changed:
        why = f", because {reasons[name]}" if name in reasons else ""
        yield f"{name} changes from {before[name]} to {after[name]}{why}"


def _show(out: Path | None) -> None:
    from kvmmm.errors import PolicyError
    from kvmmm.mm import calibration
    from kvmmm.mm.policy import from_environment

    path = out or calibration.calibration_path()
    policy = _in_force(out) if out else from_environment()
    content: dict[str, Any] = {}
    if path is not None and not policy.refused:
        with suppress(OSError, PolicyError):  # there is none
            content = calibration.read(path)
    _table(policy.as_dict(), calibration.reasons_for(policy.as_dict(), content))
    click.echo(f"in force: {policy.source}")
    if policy.refused:
        click.echo(f"refused: {policy.refused}")
    if path is None:
        click.echo("no calibration is used: KVMMM_CALIBRATION is off, or there is no home")
    elif content:
        click.echo(
            f"{path}: {calibration.age_of(content)}, made {content['made']} by kvmmm "
            f"{content.get('kvmmm')} for {', '.join(_host(content['host']))}"
        )
    elif not policy.refused:
        click.echo(f"{path}: there is none; `kvmmm calibrate` makes it")


def _host(host: Mapping[str, str]) -> Iterator[str]:
    return (f"{name} {value}" for name, value in host.items() if value)


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
