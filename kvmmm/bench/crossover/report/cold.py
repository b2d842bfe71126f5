"""The cold path taken apart: what each state adds to one operation, as stacked bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.figures import Run, finish, new_figure
from kvmmm.bench.crossover.report.parts import PART_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZES = (64, 4 << 10, 32 << 10, 1 << 20)
_COLOURS = {"copy": "#56b4e9", "linear": "#e69f00", "mirror": "#c14b00", "absent": "#6b7280"}


def draw_cold(run: Run, chosen: Mapping[str, str]) -> Figure | None:
    """Draw, for a few sizes, what being cold adds to each mechanism. None: nothing was measured."""
    layouts = run.names("layout")
    layout = next((one for one in layouts if _sizes(run, {**chosen, "layout": one})), None)
    if layout is None:
        return None
    here = {**chosen, "layout": layout}
    sizes = _sizes(run, here)
    figure = new_figure(7, 1.9 * len(sizes) + 0.8)
    for axes, n_bytes in zip(figure.subplots(len(sizes), squeeze=False).flat, sizes, strict=True):
        _draw_bars(axes, run, here, n_bytes)
    title = f"{chosen['operation']}, {words.dim_name('layout', layout)}, {chosen['locality']}"
    finish(
        figure,
        run,
        f"{title}: what being cold costs (differences of medians)",
        columns=2,
    )
    return figure


def _sizes(run: Run, here: Mapping[str, str]) -> list[int]:
    # Sizes measured warm and in some cold state.
    states = [set(run.cells(**here, residency=one)) for one in run.names("residency")]
    both = {n_bytes for n_bytes in set().union(*states) if sum(n_bytes in s for s in states) > 1}
    return [n_bytes for n_bytes in _SIZES if n_bytes in both] or sorted(both)[:4]


def _draw_bars(axes: Axes, run: Run, here: Mapping[str, str], n_bytes: int) -> None:
    names: list[str] = []
    for variant in ("internal", *run.data["mechanisms"]):
        for state in run.names("residency"):
            if state == ("linear-cold" if variant == "mirror" else "mirror-cold"):
                continue  # what a variant does not go through cannot be cold for it
            cell = run.cells(**here, residency=state).get(n_bytes)
            if cell is None or variant not in cell["parts"]:
                continue
            left_us = 0.0
            for part, ns in cell["parts"][variant]:
                name = PART_NAMES[part]
                label = None if name in axes.get_legend_handles_labels()[1] else name
                us = max(ns, 0) / 1e3
                axes.barh(len(names), us, left=left_us, color=_COLOURS[part], label=label)
                left_us += us
            total = f" {cell['ns'][variant] / 1e3:.3g} µs"
            axes.text(left_us, len(names), total, va="center", fontsize=7)
            mechanism = words.pair_name(variant)
            names.append(f"{mechanism}, {words.RESIDENCY_NAMES.get(state, state)}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(words.bytes_text(n_bytes), fontsize=8.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("µs per operation", fontsize=8)
