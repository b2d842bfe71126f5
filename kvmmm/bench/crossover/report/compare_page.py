"""compare.html: several runs in one page, drawn by the scripts of report.html."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.data import dims_data, indexes, verdicts_by_cell
from kvmmm.bench.crossover.report.page import bullets, filled_page, html_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.compare import Comparison, Run

_SCRIPTS = ("dom.js", "lines.js", "table.js", "filters.js", "compare.js")


def compare_page(runs: Sequence[Run], comparisons: Sequence[Comparison], text: str) -> str:
    """Return the page that puts runs side by side. `text` is what the command prints."""
    from kvmmm.bench.crossover.report.compare_text import facts_that_differ

    facts = [(name, *texts) for name, texts in facts_that_differ(runs)]
    names = [run.name for run in runs]
    texts = {
        "TITLE": "Runs side by side: ASIO against internal mappings",
        "SUBTITLE": escape("; ".join(f"{run.name}: {_host_line(run)}" for run in runs)),
        "TEXT": f"<pre>{escape(text)}</pre>",
        "FACTS": html_table(("", *names), facts) if facts else "<p>Nothing that is recorded.</p>",
        "UNKNOWN": bullets(_unknowns(runs)),
    }
    return filled_page("compare.html", texts, compare_data(runs, comparisons), _SCRIPTS)


def compare_data(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return what compare.js reads as DATA.

    As `page_data`, but `v` holds for each pair one entry a run (None: not measured there), and
    `differs` the pairs in which some run differs from the first beyond noise.
    """
    dims = dims_data([cell for run in runs for cell in run.results.cells.values()])
    cells: dict[tuple[int, ...], dict[str, Any]] = {}
    for i, run in enumerate(runs):
        verdicts = verdicts_by_cell(run.analysis.cells)
        for id_, by_pair in verdicts.items():
            cell = run.results.cells[id_]
            d = indexes(dims, cell)
            entry = cells.setdefault(
                (*d, cell.bytes), {"d": d, "b": cell.bytes, "v": {}, "differs": []}
            )
            for pair, numbers in by_pair.items():
                entry["v"].setdefault(pair, [None] * len(runs))[i] = numbers
    for one in comparisons:
        for difference in one.differing:
            cell = difference.first.cell
            differs = cells[*indexes(dims, cell), cell.bytes]["differs"]
            if difference.key[-1] not in differs:
                differs.append(difference.key[-1])
    seen = {pair for cell in cells.values() for pair in cell["v"]}
    return {
        "dims": dims,
        "cells": list(cells.values()),
        "pairs": [name for name in words.PAIR_NAMES if name in seen],
        "runs": [run.name for run in runs],
        "pair_names": words.PAIR_NAMES,
        "marks": [{"bytes": n_bytes, "name": name} for n_bytes, name in words.MARKS],
    }


def _host_line(run: Run) -> str:
    return words.host_line(run.results.header.host)


def _unknowns(runs: Sequence[Run]) -> list[str]:
    hosts = [run.results.header.host for run in runs]
    kinds = {words.fact_text(words.kvm_kind(host)) for host in hosts}
    return [
        f"Kinds of KVM that were measured: {'; '.join(sorted(kinds))}. Others are not known.",
        "Times of different runs were not taken side by side: only ratios are compared.",
        "A guest that runs on another CPU during the copies, and NUMA: not part of the sweep.",
    ]
