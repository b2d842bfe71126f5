"""The README's one picture: where the answer can be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.extras import need
from kvmmm.bench.crossover.record import read_results
from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.data import page_data
from kvmmm.bench.crossover.report.figures import (
    STYLE,
    Run,
    draw_lines,
    new_figure,
    save_figure,
)  # fmt: skip
from kvmmm.bench.crossover.statistics import analyse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CONTIGUOUS = "Memory in one piece ({})"
_SCATTERED = "Memory in many pieces ({})"
_LEAST_SPAN = 1.5
_ROOM = 1.3  # for names
_NAME_SIZES = 4  # so many are as long as one


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
    figure = new_figure(4.3 * max(len(layouts), 1) + 0.6, 4.3)
    grid = figure.subplots(1, max(len(layouts), 1), sharex=True, sharey=True, squeeze=False)[0]
    for axes, layout in zip(grid, layouts, strict=False):
        states = {
            one: run.points(pair, **chosen, layout=layout, residency=one)
            for one in run.names("residency")
        }
        named = [(words.dim_name("residency", one), points) for one, points in states.items()]
        draw_lines(axes, named, run)
        title = _CONTIGUOUS if layout.endswith("contiguous") else _SCATTERED
        axes.set_title(title.format(words.dim_name("layout", layout)), fontsize=9.5, pad=16)
        axes.set_xlabel(f"bytes per operation ({operation})")
    grid[0].set_ylabel("ASIO is", fontsize=8)
    _set_room(grid[0])
    for axes in grid:
        _mark_sides(axes, run)
    _name_lines(grid[0])
    figure.suptitle(
        "Where does ASIO beat internal mappings? Below the black line.", fontsize=12,
        fontweight="bold",
    )  # fmt: skip
    figure.supxlabel(
        f"{run.host}. {words.PAIR_NAMES[pair]}. One line for each state of residency; "
        "shade: 95 % interval; grey: noise (A/A)",
        fontsize=7.5, color="#444444",
    )  # fmt: skip
    return figure


def _set_room(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1 / _LEAST_SPAN) / _ROOM, max(high, _LEAST_SPAN) * _ROOM)


def _mark_sides(axes: Axes, run: Run) -> None:
    # Which half is whose, in words and colours that need no legend; how much, as people say it.
    from matplotlib.ticker import FuncFormatter

    low, high = axes.get_ylim()
    axes.axhspan(1, high, color="#fbe9dc", zorder=0, linewidth=0)
    axes.axhspan(low, 1, color="#dcecf7", zorder=0, linewidth=0)
    side: dict[str, Any] = {
        "transform": axes.transAxes, "ha": "right", "fontsize": 8.5, "fontstyle": "italic",
    }  # fmt: skip
    axes.text(0.985, 0.975, "internal mappings faster", va="top", color="#8a3500", **side)
    axes.text(0.985, 0.025, "ASIO faster", va="bottom", color="#00456e", **side)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _as_said(y)))
    for mark in run.data["marks"]:
        axes.annotate(
            mark["name"], (mark["bytes"], 1), (0, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=7, ha="center", va="bottom",
        )  # fmt: skip


def _as_said(ratio: float) -> str:
    if abs(ratio - 1) < 1e-9:
        return "equal"
    return f"{ratio:g}x slower" if ratio > 1 else f"{1 / ratio:g}x faster"


def _name_lines(axes: Axes) -> None:
    # At their small ends, where they lie furthest apart.
    import numpy as np

    for line in axes.get_lines():
        name = str(line.get_label())
        if not name.startswith("_"):
            points: list[list[float]] = np.asarray(line.get_xydata()).tolist()
            (x, y), *others = points
            is_rising = any(other > y * _ROOM for _, other in others[:_NAME_SIZES])
            axes.annotate(
                name, (x, y), (2, -5 if is_rising else 5), textcoords="offset points",
                va="top" if is_rising else "bottom", fontsize=8.5, fontweight="bold",
                color=line.get_color(),
            )  # fmt: skip


def _n_lines(run: Run, pair: str, chosen: Mapping[str, str]) -> int:
    return sum(len(run.points(pair, **chosen, residency=one)) > 1 for one in run.names("residency"))
