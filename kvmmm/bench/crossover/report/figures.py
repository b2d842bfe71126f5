"""The pictures of a run for papers, as SVG and PNG. Needs matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.data import page_data

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.verdicts import Analysis

MISSING = "figures: not drawn: matplotlib is missing (pip install 'kvmmm[crossover]')"

_COLOURS = ("#0072b2", "#c14b00", "#007d5c", "#a8497c", "#8a6a00", "#3c4654")
_MARKERS = "os^Dvx"
_DASHES = ("-", "--", ":", "-.", (0, (4, 1)), (0, (1, 2)))
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kvmmm", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "font.family": "DejaVu Sans", "figure.dpi": 100, "savefig.dpi": 200,
}  # fmt: skip
_FINE_TICKS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0, 8.0, 9.0)
_MAP_BYTES = (64, 512, 4 << 10, 32 << 10, 1 << 20)
_BLUE_TO_ORANGE = ("#0072b2", "#8cc3e6", "#eeeeee", "#f3bd7e", "#d56e00")

_FONT = "'DejaVu Sans'"

_Key = tuple[int, ...]


def have_matplotlib() -> bool:
    """Return whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def write_figures(folder: Path, results: Results, analysis: Analysis) -> list[Path]:
    """Write figures as SVG and PNG: ratios of each operation; winners, cold path of the first.

    Of page sizes and callers, the first that was measured is drawn: 4 KiB, the C loop.
    """
    from kvmmm.bench.crossover.report.cold import draw_cold

    run = Run(page_data(results, analysis), words.host_line(results.header.host))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, operation in enumerate(run.names("operation")):
        for locality in run.names("locality"):
            chosen = {"operation": operation, "locality": locality}
            # A figure takes a second: what most operations share is drawn of the first.
            kinds = {"ratio": _draw_ratios, "winner": _draw_winners, "cold": draw_cold}
            for kind, draw in kinds.items() if i == 0 else [("ratio", _draw_ratios)]:
                written += _save(folder / f"{kind}-{operation}-{locality}", draw, run, chosen)
    return written


class Run:
    """The page's data, found by the names of dimensions.

    Attributes:
        data: What `page_data` returned.
        host: The machine in one line.
    """

    __slots__ = ("_cells", "data", "host")

    def __init__(self, data: Mapping[str, Any], host: str) -> None:
        self.data = data
        self.host = host
        self._cells: dict[_Key, dict[int, Any]] = {}
        for cell in data["cells"]:
            self._cells.setdefault(tuple(cell["d"]), {})[cell["b"]] = cell

    def dim(self, key: str) -> Mapping[str, Any]:
        """Return one dimension."""
        return next(dim for dim in self.data["dims"] if dim["key"] == key)

    def names(self, key: str) -> list[str]:
        """Return the values of a dimension."""
        return list(self.dim(key)["keys"])

    def cells(self, **chosen: str) -> dict[int, Any]:
        """Return the cells of a combination by size; of a dimension not named, the first value."""
        d = tuple(
            dim["keys"].index(chosen[dim["key"]]) if dim["key"] in chosen else 0
            for dim in self.data["dims"]
        )
        return self._cells.get(d, {})

    def points(self, pair: str, **chosen: str) -> list[list[Any]]:
        """Return [bytes, ratio, low, high, winner, floor] of a combination, by size."""
        cells = sorted(self.cells(**chosen).items())
        return [[n_bytes, *cell["v"][pair]] for n_bytes, cell in cells if pair in cell["v"]]


def _save(path: Path, draw: Callable[..., Figure | None], run: Run, chosen: Any) -> list[Path]:  # noqa: ANN401
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = draw(run, chosen)
        if figure is None:
            return []
        paths = [path.with_name(f"{path.name}{suffix}") for suffix in (".svg", ".png")]
        for one in paths:
            save_figure(figure, one)
            figure.set_layout_engine("none")  # as it is now; laying out costs most of the time
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the same figure makes the same file."""
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata, facecolor="white")
    if path.suffix == ".svg":
        # Where that font is not installed, one that is as wide.
        text = path.read_text(encoding="utf-8").replace(_FONT, f"{_FONT}, Verdana, sans-serif")
        path.write_text(text, encoding="utf-8")


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that belongs to no window system. Width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_ratios(run: Run, chosen: Mapping[str, str]) -> Figure | None:
    panels = [
        [
            {**chosen, "layout": layout, "residency": residency}
            for residency in run.names("residency")
        ]
        for layout in run.names("layout")
    ]
    panels = [row for row in panels if any(len(run.cells(**panel)) > 1 for panel in row)]
    columns = (
        [i for i in range(len(panels[0])) if any(run.cells(**row[i]) for row in panels)]
        if panels
        else []
    )
    if not columns:
        return None
    figure = new_figure(2.3 * len(columns) + 1, 1.9 * len(panels) + 0.9)
    grid = figure.subplots(len(panels), len(columns), sharex=True, sharey=True, squeeze=False)
    for row, axes_row in zip(panels, grid, strict=True):
        for i, axes in zip(columns, axes_row, strict=True):
            lines = [
                (words.pair_name(pair), run.points(pair, **row[i]))
                for pair in run.data["mechanisms"]
            ]
            draw_lines(axes, lines, run)
            layout, residency = (
                words.dim_name(key, row[i][key]) for key in ("layout", "residency")
            )
            axes.set_title(f"{layout}\n{residency}", fontsize=7.5)
    for axes in grid[-1]:
        axes.set_xlabel("bytes per operation", fontsize=7.5)
    figure.supylabel("time ÷ time of internal mappings", fontsize=9)
    finish(figure, run, f"{chosen['operation']}, {chosen['locality']}")
    return figure


def draw_lines(axes: Axes, lines: Sequence[tuple[str, list[list[Any]]]], run: Run) -> None:
    """Draw lines with intervals, the A/A band and gVisor's thresholds."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _draw_parity(axes, lines)
    axes.axhline(1, color="black", linewidth=0.8)
    for mark in run.data["marks"]:
        axes.axvline(mark["bytes"], color="black", linewidth=0.8, linestyle=(0, (2, 2)))
    for i, (name, points) in enumerate(lines):
        if not points:
            continue
        sizes, ratios, lows, highs, *_ = zip(*points, strict=True)
        colour = _COLOURS[i % len(_COLOURS)]
        axes.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            sizes, ratios, color=colour, label=name, linewidth=1.4, markersize=3.2,
            marker=_MARKERS[i % len(_MARKERS)], linestyle=_DASHES[i % len(_DASHES)],
        )  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(base=8, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: words.bytes_text(n).replace(" ", "")))
    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 4 else _FINE_TICKS
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45, labelsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)


def _draw_parity(axes: Axes, lines: Sequence[tuple[str, list[list[Any]]]]) -> None:
    # What the same code, measured twice, differs by: at each size the widest of what is drawn.
    from math import exp

    floors: dict[int, float] = {}
    for _, points in lines:
        for n_bytes, *_, floor in points:
            floors[n_bytes] = max(floors.get(n_bytes, 0), floor or 0)
    sizes = sorted(floors)
    high = [exp(floors[n_bytes]) for n_bytes in sizes]
    low = [1 / one for one in high]
    axes.fill_between(sizes, low, high, color="#9aa1ad", alpha=0.35, linewidth=0)


def finish(figure: Figure, run: Run, title: str, *, columns: int = 5) -> None:
    """Put title, legend (each name once) and machine on a figure."""
    figure.suptitle(f"{title}\n{run.host}", fontsize=8.5)
    by_label: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    if by_label:
        figure.legend(
            by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns,
            fontsize=8,
        )  # fmt: skip


def _draw_winners(run: Run, chosen: Mapping[str, str]) -> Figure | None:
    pairs = run.data["mechanisms"]
    layouts, residencies = run.names("layout"), run.names("residency")
    measured = {
        n_bytes
        for layout in layouts
        for residency in residencies
        for n_bytes in run.cells(**chosen, layout=layout, residency=residency)
    }
    sizes = [n_bytes for n_bytes in _MAP_BYTES if n_bytes in measured] or sorted(measured)[:5]
    if not sizes or not pairs:
        return None
    figure = new_figure(1.5 * len(residencies) + 2, (0.5 * len(layouts) + 0.9) * len(sizes))
    for axes, n_bytes in zip(figure.subplots(len(sizes), squeeze=False).flat, sizes, strict=True):
        table = [
            [
                run.cells(**chosen, layout=layout, residency=residency)
                .get(n_bytes, {"v": {}})["v"].get(pairs[0])
                for residency in residencies
            ]
            for layout in layouts
        ]  # fmt: skip
        _draw_map(axes, table)
        axes.set_title(words.bytes_text(n_bytes), fontsize=8.5)
        axes.set_yticks(
            range(len(layouts)), [words.dim_name("layout", one) for one in layouts], fontsize=7
        )
        names = [words.dim_name("residency", one) for one in residencies]
        axes.set_xticks(range(len(residencies)), names, fontsize=7)
    title = f"{chosen['operation']}, {chosen['locality']}: {words.pair_name(pairs[0])} ÷ internal"
    finish(figure, run, title)
    return figure


def _draw_map(axes: Axes, table: Sequence[Sequence[Any]]) -> None:
    from math import log2

    from matplotlib.colors import LinearSegmentedColormap

    # What is not claimed is white, whatever its ratio.
    values = [
        [0.0 if one is None or one[3] is None else log2(one[0]) for one in row] for row in table
    ]
    colours = LinearSegmentedColormap.from_list("winner", _BLUE_TO_ORANGE)
    axes.imshow(values, cmap=colours, vmin=-3, vmax=3, aspect="auto")
    for y, row in enumerate(table):
        for x, one in enumerate(row):
            axes.text(x, y, _field_text(one), ha="center", va="center", fontsize=7)
    axes.spines[:].set_visible(False)


def _field_text(one: Sequence[Any] | None) -> str:
    if one is None:
        return "-"
    ratio, low, high, winner, _ = one
    interval = words.interval_text(low, high)
    if winner is None:
        return f"≈\n{interval}"
    factor = words.ratio_text(1 / ratio if ratio < 1 else ratio)
    return f"{words.pair_name(winner)} {factor}x\n{interval}"
