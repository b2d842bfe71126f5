"""The page's pictures for papers, as SVG and PNG. Needs matplotlib."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.report import words as crossover_words
from kvmmm.bench.crossover.report.figures import STYLE, new_figure, save_figure
from kvmmm.bench.economics.asked import BREAK_EVEN, SHARE, Key
from kvmmm.bench.economics.plan import (
    BEFOREHAND,
    COUNT_WINDOWS,
    EXIT,
    EXITS,
    FAULT,
    FAULTS,
    FLOOR,
    MAP,
    MEMSLOTS,
    PAGE,
    READ,
    WRITE,
)
from kvmmm.bench.economics.words import EXIT_NAMES, PART_NAMES, SHORT_NAMES, ns_text
from kvmmm.bench.fault_answer import SLOT_COUNTS, WINDOWS, window_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.economics.verdicts import Economics

    Points = list[tuple[float, float, float, float]]
    """x, value, low, high."""

_LOOKS = (
    ("#0072b2", "o", "-"), ("#c14b00", "s", "--"), ("#007d5c", "^", ":"), ("#a8497c", "D", "-."),
    ("#8a6a00", "v", (0, (4, 1))), ("#3c4654", "x", (0, (1, 2))),
)  # fmt: skip


def write_figures(folder: Path, results: Results, said: Economics) -> list[Path]:
    """Write what was measured: windows for writes and for reads, memslots, exits."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    host = crossover_words.host_line(results.header.host)
    parts = {key.part for key in said.figures}
    drawn: dict[str, Callable[[], Figure]] = {}
    if FAULTS in parts:
        drawn |= {f"windows-{one}": partial(_windows, said, one, host) for one in (WRITE, READ)}
    if MEMSLOTS in parts:
        drawn["memslots"] = partial(_memslots, said, host)
    if EXITS in parts:
        drawn["exits"] = partial(_exits, said, host)
    written = []
    for name, draw in drawn.items():
        with mpl.rc_context(STYLE):
            figure = draw()
            for suffix in (".svg", ".png"):
                written.append(folder / f"{name}{suffix}")
                save_figure(figure, written[-1])
                figure.set_layout_engine("none")  # laying out costs most of the time
    return written


def _costs(said: Economics, keys: Iterable[tuple[float, Key]]) -> Points:
    found = ((x, said.figures.get(key)) for x, key in keys)
    return [(x, one.ns, one.low, one.high) for x, one in found if one is not None]


def _ratios(said: Economics, question: str, way: str, access: str, name: str) -> Points:
    keys = [(w, Key(FAULTS, way, access, w, name)) for w in WINDOWS]
    found = ((w, said.of(question, key)) for w, key in keys)
    return [(w, one.ratio, one.low, one.high) for w, one in found if one is not None]


def _windows(said: Economics, access: str, host: str) -> Figure:
    def of_ways(name: str) -> list[tuple[str, Points]]:
        return [
            (text, _costs(said, [(w, Key(FAULTS, way, access, w, name)) for w in WINDOWS]))
            for way, text in SHORT_NAMES.items()
        ]

    figure = new_figure(8.4, 6.6)
    grid = figure.subplots(2, 2).flat
    beforehand = [(f"{text}, mapped beforehand", p) for text, p in of_ways(BEFOREHAND)]
    _draw(next(grid), f"a page, all touched in order, {access}s", [*of_ways(PAGE), *beforehand])
    _draw(next(grid), f"one fault, {access}s", of_ways(FAULT))
    for title, question, name in (
        ("touched pages that pay for a window", BREAK_EVEN, FAULT),
        ("share of windows touched from which\nmapping beforehand pays", SHARE, MAP),
    ):
        axes = next(grid)
        axes.axhline(1, color="black", linewidth=0.8)
        lines = [
            (text, _ratios(said, question, way, access, name)) for way, text in SHORT_NAMES.items()
        ]
        said_as = _percent if question == SHARE else _plain
        _draw(axes, title, lines, said_as)
    for axes in figure.axes:
        axes.set_xlabel("bytes that a fault maps", fontsize=8)
    _finish(figure, host)
    return figure


def _memslots(said: Economics, host: str) -> Figure:
    figure = new_figure(5, 3.4)
    [axes] = figure.subplots(1, 1, squeeze=False).flat
    lines = [
        (
            f"{text}, {window_text(window)}",
            _costs(
                said, [(n, Key(MEMSLOTS, str(n), WRITE, window, name)) for n in SLOT_COUNTS]
            ),
        )
        for name, text in ((FAULT, "one fault"), (MAP, "mapped beforehand"))
        for window in COUNT_WINDOWS
    ]  # fmt: skip
    _draw(axes, "EPT violation, writes", lines, x_text=lambda n: f"{int(n):,}")
    axes.set_xlabel("memslots in the VM (1: those few that it needs anyway)", fontsize=8)
    _finish(figure, host)
    return figure


def _draw(
    axes: Axes, title: str, lines: Sequence[tuple[str, Points]],
    y_text: Callable[[float], str] = ns_text, x_text: Callable[[float], str] | None = None,
) -> None:  # fmt: skip
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    at: set[float] = set()
    for (name, points), (colour, marker, dash) in zip(lines, _LOOKS, strict=False):
        if not points:
            continue
        x, value, low, high = zip(*points, strict=True)
        at |= set(x)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x, value, color=colour, label=name, marker=marker, linestyle=dash, linewidth=1.4,
            markersize=4,
        )  # fmt: skip
    text = x_text or (lambda n: window_text(int(n)).replace(" ", ""))
    axes.xaxis.set_major_locator(FixedLocator(sorted(at)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: text(n)))
    low_y, high_y = axes.get_ylim()
    fine = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high_y / low_y < 6 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=fine, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: y_text(y)))
    axes.tick_params(labelsize=7)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)
    axes.set_title(title, fontsize=8.5)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _plain(ratio: float) -> str:
    return f"{ratio:g}"


def _exits(said: Economics, host: str) -> Figure:
    figure = new_figure(7, 4)
    [axes] = figure.subplots(1, 1, squeeze=False).flat
    names: list[str] = []
    for kind, name in EXIT_NAMES.items():
        whole, loop = (said.figures.get(Key(EXITS, kind, EXIT, 1, one)) for one in (EXIT, FLOOR))
        if whole is None:
            continue
        y, us = len(names), whole.ns / 1e3
        loop_us = min(loop.ns / 1e3, us) if loop else us
        axes.barh(y, loop_us, color="#56b4e9", label=PART_NAMES["loop"])
        axes.barh(y, us - loop_us, left=loop_us, color="#c14b00", hatch="//", edgecolor="white",
                  label=PART_NAMES["ours"])  # fmt: skip
        error = [[us - whole.low / 1e3], [whole.high / 1e3 - us]]
        axes.errorbar(us, y, xerr=error, color="black", capsize=2, linewidth=0.9)
        names.append(name)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("us an exit, 95 % interval; ring 3 where nothing else is said", fontsize=8)
    _finish(figure, host)
    return figure


def _finish(figure: Figure, host: str) -> None:
    figure.suptitle(f"ring 3, 4 KiB pages, frames resident\n{host}", fontsize=8.5)
    by_label: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside lower center", ncols=2, fontsize=7.5
    )
