"""The commands by name. A command's module is imported when it runs, not for `kvmmm --help`."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvmmm.cli.failure import guarded

if TYPE_CHECKING:
    from collections.abc import Sequence

# Name, where it is, what the list of commands says about it.
_COMMANDS = {
    "run": ("kvmmm.cli.run", "Run a guest: an image, or a bundled guest by name."),
    "guests": ("kvmmm.cli.guests", "List the bundled guests."),
    "doctor": ("kvmmm.cli.doctor", "Find out what this host's KVM can do."),
    "calibrate": ("kvmmm.cli.calibrate", "Measure what copies cost here, and go by it."),
    "bench": ("kvmmm.bench.command", "Measure, and compare with floors and goals."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is wanted, and whose errors end in `failure`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order in which a newcomer meets them."""
        return [name for name, (module, _) in _COMMANDS.items() if find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above says so
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        rows = [(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        **extra: Any,  # noqa: ANN401 - click's own
    ) -> NoReturn:
        """Run the command line and end the process with our exit codes (click's is 2 for all)."""
        extra["standalone_mode"] = False
        sys.exit(guarded(lambda: super(LazyGroup, self).main(args, prog_name, **extra)))

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - a command's own answer
        """Run the command; before click sees them, errors become exit codes."""
        return guarded(lambda: super(LazyGroup, self).invoke(ctx))


def _print_version(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import kvmmm

        click.echo(f"kvmmm {kvmmm.__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Begin with `kvmmm run touch --stats`, and with `kvmmm doctor` when something is odd.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
def kvmmm() -> None:
    """KVM micro-VMs with a memory manager that can be read.

    Runs tiny guest kernels (static ELF64, or flat binaries), backs their memory on demand, and says
    precisely what went wrong when something does.
    """
