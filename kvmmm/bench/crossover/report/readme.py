"""The README's one picture: where the answer can be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.extras import need
from kvmmm.bench.crossover.record import read_results
from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.data import page_data
from kvmmm.bench.crossover.report.figures import (
    STYLE,
    Run,
    draw_lines,
    finish,
    new_figure,
    save_figure,
)  # fmt: skip
from kvmmm.bench.crossover.statistics import analyse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.figure import Figure


def draw_readme_picture(folder: Path, path: Path) -> None:
    """Draw the run in `folder` in one picture: copy_in by states, contiguous beside scattered.

    Raises:
        MissingExtraError: matplotlib or numpy is not there.
        ResultsError: The results are malformed.
        OSError: They cannot be read, or the picture not written.
    """
    need("matplotlib", what="the picture")
    import matplotlib as mpl

    results = read_results(folder)
    analysis = analyse(results, seed=results.header.seed)
    run = Run(page_data(results, analysis), words.host_line(results.header.host))
    with mpl.rc_context(STYLE):
        save_figure(_readme_figure(run), path)


def _readme_figure(run: Run) -> Figure:
    operation, pair = run.names("operation")[0], run.data["mechanisms"][0]
    chosen = {"operation": operation}
    chosen["locality"] = max(
        run.names("locality"),
        key=lambda one: sum(
            _n_lines(run, pair, {**chosen, "locality": one, "layout": layout})
            for layout in run.names("layout")
        ),
    )
    n_lines = {
        layout: _n_lines(run, pair, {**chosen, "layout": layout}) for layout in run.names("layout")
    }
    # The simplest and the most scattered of those that were measured in most states.
    layouts = [one for one, n in n_lines.items() if n and n == max(n_lines.values())]
    layouts = layouts[:1] + layouts[1:][-1:]
    figure = new_figure(4.2 * max(len(layouts), 1), 3.9)
    grid = figure.subplots(1, max(len(layouts), 1), sharey=True, squeeze=False)[0]
    for axes, layout in zip(grid, layouts, strict=False):
        lines = [
            (words.dim_name("residency", one),
             run.points(pair, **chosen, layout=layout, residency=one))
            for one in run.names("residency")
        ]  # fmt: skip
        draw_lines(axes, lines, run)
        axes.set_title(words.dim_name("layout", layout), fontsize=9)
        axes.set_xlabel("bytes per operation")
        for mark in run.data["marks"]:
            axes.annotate(
                mark["name"], (mark["bytes"], 1), xycoords=("data", "axes fraction"), rotation=90,
                fontsize=6.5, ha="right", va="top",
            )  # fmt: skip
    grid[0].set_ylabel(
        f"{operation}, {chosen['locality']}: time of {words.PAIR_NAMES[pair]} ÷ internal"
    )
    question = "Where does ASIO beat internal mappings?"
    finish(figure, run, f"{question} Below 1. Shade: 95 %; grey: A/A noise")
    return figure


def _n_lines(run: Run, pair: str, chosen: Mapping[str, str]) -> int:
    return sum(len(run.points(pair, **chosen, residency=one)) > 1 for one in run.names("residency"))
