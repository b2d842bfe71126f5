"""`kvmmm run --maps`: where the address space is drawn to, and how."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.vmm.machine import Machine
    from kvmmm.vmm.picture_words import Caption, Drawn
    from kvmmm.vmm.result import RunResult
    from kvmmm.vmm.stop_report import Reported

_ENDINGS = (".svg", ".html", ".txt")
_STDERR = "-"


class MapsFile:
    """Where to write, known to be possible, and in which form.

    Attributes:
        path: The file; `-` is stderr.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._spaces: list[Drawn] = []
        self._n_left_out = 0

    def watch(self, vm: Machine) -> None:
        """Have it noted where faults fall, from now on."""
        from kvmmm.mm.fault_log import FaultLog

        cast("Reported", vm).mm.fault_log = FaultLog()

    def look(self, vm: Machine, run_result: RunResult | None) -> None:
        """Take down what is there, while the VM still is."""
        from kvmmm.vmm.picture_vm import n_left_out, spaces_of

        reported = cast("Reported", vm)
        self._spaces = spaces_of(reported, run_result)
        self._n_left_out = n_left_out(reported)

    def write(self, title: str, subtitle: str, outcome: str, *, is_good: bool) -> None:
        """Write what was taken down.

        Raises:
            OSError: The file cannot be written.
        """
        from kvmmm.vmm.picture_words import Caption

        if self._n_left_out:
            subtitle += f"; {self._n_left_out} more processes are not shown"
        content = _content(self._spaces, Caption(title, subtitle, outcome, is_good), self._ending)
        if self.path != _STDERR:
            # A file's name that is no Unicode goes out as it came in.
            with open(self.path, "w", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123
                file.write(content)
        elif sys.stderr is not None:  # closed by whoever started us
            click.echo(content.rstrip("\n"), err=True)

    def write_after(self, error: Exception, vm: Machine, title: str, subtitle: str) -> None:
        """Do both, where the run has failed; a failure of this one is noted on `error`."""
        try:
            self.look(vm, None)
            outcome = str(error).partition("\n")[0] or type(error).__name__
            self.write(title, subtitle, outcome, is_good=False)
        except (KvmmmError, OSError) as e:
            error.add_note(f"nor could the maps be written to {self.path}: {e}")

    @property
    def _ending(self) -> str:
        return Path(self.path).suffix.lower()


def _content(spaces: Sequence[Drawn], caption: Caption, ending: str) -> str:
    # All of this is for whoever asks for it only.
    if ending == ".txt":
        from kvmmm.mm.maps import maps_of, smaps_of, status_of

        return "\n".join(
            f"{'# ' + drawn.label if drawn.label else '# ' + caption.title}\n\n"
            f"{status_of(drawn.sight)}\n{maps_of(drawn.sight)}\n{smaps_of(drawn.sight)}"
            for drawn in spaces
        )
    if ending == ".svg":
        from kvmmm.vmm.picture import draw_all

        return draw_all(spaces, caption)
    from kvmmm.vmm import picture_table

    return (picture_table.page if ending == ".html" else picture_table.text)(spaces, caption)


class MapsPath(click.ParamType[MapsFile]):
    """A file that a picture or a text can be written to. It is not touched before the end."""

    name = "maps"

    def convert(
        self, value: str | MapsFile, param: click.Parameter | None, ctx: click.Context | None
    ) -> MapsFile:
        """Return it."""
        if isinstance(value, MapsFile):
            return value
        if value != _STDERR:
            if Path(value).suffix.lower() not in _ENDINGS:
                self.fail(
                    f"{value!r} does not say what it is to be: let it end in .svg or .html for a "
                    "picture, .txt for text as in /proc, or be - for a table on stderr",
                    param, ctx,
                )  # fmt: skip
            why = _why_not(value)
            if why:
                self.fail(f"cannot write {value!r}: {why}", param, ctx)
        return MapsFile(value)


def _why_not(path: str) -> str:
    if os.path.isdir(path):  # noqa: PTH112 - a name that may be anything
        return "it is a directory"
    if os.path.lexists(path) and not os.access(path, os.W_OK):
        return "permission denied, or it leads nowhere"
    directory = os.path.dirname(path) or "."  # noqa: PTH120
    if not os.path.isdir(directory):  # noqa: PTH112
        return f"there is no directory {directory!r}"
    if not os.path.lexists(path) and not os.access(directory, os.W_OK | os.X_OK):
        return f"you may not write in {directory!r}"
    return ""
