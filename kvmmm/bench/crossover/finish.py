"""After a sweep: the answer in ten lines, the report's folder. Loads what is slow only then."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.plan import QUICK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ANSWER_NAME = "answer.txt"
_PACKAGE = "kvmmm.bench.crossover"


def module_of(name: str) -> Any | None:  # noqa: ANN401 - a module
    """Return a module of this package, or None where there is none."""
    full = f"{_PACKAGE}.{name}"
    return import_module(full) if find_spec(full) else None


def conclude(folder: Path, tell: Callable[[str], object] | None = None) -> list[str]:
    """Analyse what a folder holds, and write the report into it; return lines to show.

    Args:
        folder: Where results.jsonl is.
        tell: Called with each line as soon as it is known.

    Raises:
        MissingExtraError: A library is missing; the results are there nevertheless.
        ResultsError: The results are malformed.
        OSError: Something cannot be read or written.
    """
    from kvmmm.bench.crossover.extras import need
    from kvmmm.bench.crossover.record import read_results

    need("numpy", what="the analysis of a sweep")
    statistics, answer, report = map(module_of, ("statistics", "answer", "report"))
    if statistics is None or answer is None:
        return []
    results = read_results(folder)
    analysis = statistics.analyse(results, seed=results.header.seed)
    lines = list(answer.answer_of(results, analysis))
    (folder / ANSWER_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    _tell(lines, tell)
    if report is None:
        return lines
    # Figures are for papers, and a quick sweep is not; without them it is one minute.
    figures = results.header.mode != QUICK
    written = report.write_report(folder, results, analysis, lines, figures=figures)
    _tell(written, tell)
    return [*lines, *written]


def _tell(lines: list[str], tell: Callable[[str], object] | None) -> None:
    if tell is not None:
        for line in lines:
            tell(line)
