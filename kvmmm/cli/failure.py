"""The one place where an error becomes a message on stderr and an exit code.

Expected errors (`KvmmmError`, `OSError`, wrong usage, Ctrl-C, a closed pipe) never show a
traceback, unless KVMMM_DEBUG is set; anything else is a defect of kvmmm's and always does.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

import click

from kvmmm import errors

if TYPE_CHECKING:
    from collections.abc import Callable

DEBUG_VARIABLE = "KVMMM_DEBUG"


def guarded(command: Callable[[], object]) -> int:
    """Call `command` and return the exit code that the process should end with."""
    try:
        answer = command()
        if sys.stdout is not None:  # the user may have closed it
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 - all of them end here
        return explain(e)
    return answer if isinstance(answer, int) else 0


def explain(error: BaseException) -> int:
    """Say on stderr what `error` means; returns its exit code."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        _show_usage(error)
        return errors.EXIT_USAGE
    _show_traceback_if_asked()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        say("interrupted", errors.EXIT_STOPPED)
        return errors.EXIT_STOPPED
    if isinstance(error, errors.KvmmmError):
        say(str(error), error.exit_code, notes=_notes(error))
        return error.exit_code
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if not _is_debugging():
        _show_traceback()
    say(f"this is a defect in kvmmm: {type(error).__name__}", errors.EXIT_INTERNAL)
    return errors.EXIT_INTERNAL


def say(what: str, exit_code: int, *, notes: str = "") -> None:
    """Print `kvmmm: what (exit code N)`; further lines of `what`, and notes, stand below it."""
    first, _, rest = what.partition("\n")
    head = click.style("kvmmm:", fg="red", bold=True)
    click.echo(f"{head} {first} (exit code {exit_code})", err=True)
    for more in (rest, notes):
        if more:
            click.echo(more, err=True)


def _explain_os_error(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # Whoever read our output has gone, as `| head` does. What Python still has buffered must go
        # somewhere, or the interpreter complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        say("nobody reads the output any more", errors.EXIT_CONSOLE)
        return errors.EXIT_CONSOLE
    where = f": {error.filename}" if error.filename else ""
    say(f"the host refused: {error.strerror or error}{where}", errors.EXIT_OS, notes=_notes(error))
    return errors.EXIT_OS


def _show_usage(error: click.ClickException) -> None:
    error.show()
    # A dash that was meant for the guest is the commonest mistake.
    if isinstance(error, click.NoSuchOption) and error.ctx and error.ctx.info_name == "run":
        click.echo("What is meant for the guest goes after --: kvmmm run NAME -- ARGS", err=True)


def _notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def _is_debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}


def _show_traceback_if_asked() -> None:
    if _is_debugging():
        _show_traceback()


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()
