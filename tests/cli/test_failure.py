"""Errors become a message and an exit code, in one place."""

from __future__ import annotations

import errno

import click
import pytest

from kvmmm import errors
from kvmmm.cli import failure


def raising(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.ImageError("a.elf", "is odd", "do"), 65, "kvmmm: a.elf: is odd (exit code 65)\ndo"),
        (errors.StateError("not now"), 64, "kvmmm: not now (exit code 64)"),
        (errors.KvmUnavailableError(errno.ENOENT, "none", "do"), 69, "none (exit code 69)\ndo"),
        (errors.KvmUnavailableError(errno.EACCES, "shut", "do"), 77, "shut (exit code 77)\ndo"),
        (errors.IoctlError("KVM_RUN", "", errno.EINVAL), 71, "KVM_RUN() failed: EINVAL"),
        (OSError(errno.ENOSPC, "No space", "f"), 71, "the host refused: No space: f"),
        (KeyboardInterrupt(), 75, "interrupted (exit code 75)"),
        (click.Abort(), 75, "interrupted (exit code 75)"),
        (click.UsageError("no such thing"), 64, "no such thing"),
    ],
)  # fmt: skip
def test_expected_errors_have_no_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
):
    assert failure.guarded(raising(error)) == code
    stderr = capsys.readouterr().err
    assert said in stderr
    assert "Traceback" not in stderr


def test_a_defect_shows_its_traceback(capsys: pytest.CaptureFixture[str]):
    assert failure.guarded(raising(ZeroDivisionError("oops"))) == errors.EXIT_INTERNAL
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert stderr.endswith("kvmmm: this is a defect in kvmmm: ZeroDivisionError (exit code 70)\n")


@pytest.mark.parametrize(("value", "shows"), [("1", True), ("0", False), ("", False)])
def test_debug_variable_shows_tracebacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: str, shows: bool
):
    monkeypatch.setenv(failure.DEBUG_VARIABLE, value)
    failure.guarded(raising(errors.StateError("not now")))
    assert ("Traceback" in capsys.readouterr().err) is shows


def test_notes_are_shown(capsys: pytest.CaptureFixture[str]):
    error = errors.StateError("not now")
    error.add_note("at guest address 0x1000")
    failure.guarded(raising(error))
    assert "at guest address 0x1000" in capsys.readouterr().err


def test_answers_are_exit_codes():
    assert failure.guarded(lambda: 33) == 33
    assert failure.guarded(lambda: None) == 0
    assert failure.guarded(raising(click.exceptions.Exit(3))) == 3
