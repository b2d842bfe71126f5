"""The progress bar of a sweep: what is going on, how far, how long still."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from kvmmm.bench.crossover.sweep import Progress

_SHOW_EVERY_S = 0.2


@contextmanager
def progress_bar(err: Console, title: str) -> Iterator[Progress]:
    """Show a bar on `err`, and give what moves it: fraction done, seconds left, text.

    Drawn when something comes in, and seldom: the workers have the CPUs.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[left]} left"),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=1.0, left="?")
        last = 0.0

        def show(done: float, left: float | None, text: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < _SHOW_EVERY_S:
                return
            last = now
            bar.update(task, completed=done, description=text, left=duration_text(left))
            bar.refresh()

        yield show


def duration_text(seconds: float | None) -> str:
    """Return a duration as people read it; None is not known yet."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
