"""What a run says, to look at: a page, figures for papers, one picture for the README.

    words.py     sizes, ratios, states and verdicts as people read them
    data.py      results and their analysis as the one object that the page draws from
    parts.py     the time of a cold operation, taken apart
    page.py      report.html: template, style, scripts and data in one file that loads nothing
    figures.py   the same pictures as SVG and PNG (matplotlib)
    cold.py      the figure of the cold path
    readme.py    the README's one picture
    compare_text.py, compare_page.py
                 several runs side by side
    *.js, *.css, template.html, compare.html
                 the pages' own; inlined in the order that page.py names

The page may be opened from a file, without a network: its Content-Security-Policy allows nothing
but its own style and scripts, by their hashes. It does not depend on colours alone, works by
keyboard, and prints what it shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.verdicts import Analysis

__all__ = ["REPORT_NAME", "readme_picture", "write_report"]

REPORT_NAME = "report.html"


def write_report(
    folder: Path, results: Results, analysis: Analysis, answer: Sequence[str], *,
    figures: bool = True,
) -> list[str]:  # fmt: skip
    """Write `folder`/report.html and the figures beside it.

    Args:
        folder: Where the run's results.jsonl lies.
        results: What was measured.
        analysis: What follows from it.
        answer: The summary's lines, which open the page.
        figures: Whether to draw them: they take longer than all else.

    Returns:
        Lines to show: what was written, or why not.

    Raises:
        OSError: The folder cannot be written.
    """
    from kvmmm.bench.crossover.report.figures import MISSING, have_matplotlib, write_figures
    from kvmmm.bench.crossover.report.page import report_page

    path = folder / REPORT_NAME
    path.write_text(report_page(results, analysis, answer), encoding="utf-8")
    if not figures:
        return [f"report: {path}"]
    if not have_matplotlib():
        return [f"report: {path}", MISSING]
    n_files = len(write_figures(folder / "figures", results, analysis))
    return [f"report: {path}", f"figures: {folder / 'figures'} ({n_files} files)"]


def readme_picture(folder: Path, path: Path) -> None:
    """Draw the README's one picture from the run in `folder`, as SVG.

    Raises:
        ImportError: matplotlib is not there.
        OSError: The results cannot be read, or the picture not written.
    """
    from kvmmm.bench.crossover.report.readme import draw_readme_picture

    draw_readme_picture(folder, path)
