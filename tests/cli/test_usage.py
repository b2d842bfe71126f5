"""Wrong command lines: exit code 64 and a message that teaches; help that needs nothing."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from kvmmm.cli.group import kvmmm
from kvmmm.errors import EXIT_CODES, EXIT_NO_INPUT, EXIT_USAGE


def invoke(*args: str):
    return CliRunner().invoke(kvmmm, args, prog_name="kvmmm")


@pytest.mark.parametrize(
    ("args", "taught"),
    [
        ((), "Commands:"),
        (("frob",), "No such command 'frob'"),
        (("run",), "Missing argument"),
        (("run", "hello", "--memory", "3X"), "such as 64M"),
        (("run", "hello", "--memory", "0"), "above zero"),
        (("run", "hello", "--arena", "much"), "such as 64M"),
        (("run", "hello", "--timeout", "soon"), "ns, us, ms, s, m or h"),
        (("run", "hello", "--timeout", "-1"), "no duration"),
        (("run", "hello", "--base", "zz"), "0x200000"),
        (("run", "hello", "--base", "007"), "0x200000"),
        (("run", "hello", "--base", "0x1" + "0" * 16), "0x200000"),
        (("run", "hello", "-x"), "kvmmm run NAME -- ARGS"),
        (("run", "hello", "--json", "/nonexistent/x.json"), "No such file"),
        (("doctor", "now"), "unexpected extra argument"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], taught: str):
    result = invoke(*args)
    assert result.exit_code == EXIT_USAGE
    assert taught in result.output


def test_help_lists_commands_without_importing_them():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("run", "guests", "doctor"):
        assert f"\n  {name} " in result.output


def test_run_help_lists_every_exit_code():
    result = invoke("run", "--help")
    assert result.exit_code == 0
    for code, cause in EXIT_CODES.items():
        assert f"{code}  {cause}" in result.output


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.startswith("kvmmm ")


def test_every_listed_command_exists():
    context = click.Context(kvmmm)
    for name in kvmmm.list_commands(context):
        assert kvmmm.get_command(context, name) is not None


def test_a_command_that_is_not_installed_is_not_listed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "kvmmm.cli.group.find_spec", lambda name: name != "kvmmm.bench.command" or None
    )
    context = click.Context(kvmmm)
    assert "bench" not in kvmmm.list_commands(context)
    assert kvmmm.get_command(context, "bench") is None


def test_guests_shows_all_with_their_ends():
    result = invoke("guests")
    assert result.exit_code == 0
    for text in ("touch", "strided first touches", "fault: execute", "triple fault"):
        assert text in result.output


def test_unknown_guest_names_the_known():
    result = invoke("run", "hallo")
    assert result.exit_code == EXIT_NO_INPUT
    assert "did you mean hello?" in result.output
    assert result.output.startswith("kvmmm: hallo: there is no such file")


def test_a_path_is_no_name():
    result = invoke("run", "./hello")
    assert result.exit_code == EXIT_NO_INPUT
    assert "no bundled guest" not in result.output
