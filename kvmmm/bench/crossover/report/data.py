"""Results and their analysis as the one object that the page draws from: small, and plain JSON."""

from __future__ import annotations

from functools import partial
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.crossing import FEWEST_SIZES, Crossover, NoThreshold, Parity
from kvmmm.bench.crossover.record import INTERNAL, INTERNAL_AGAIN
from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.parts import PART_NAMES, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmmm.bench.crossover.record import Cell, Results
    from kvmmm.bench.crossover.verdicts import Analysis, CellVerdict, Curve

_DIGITS = 4


def page_data(results: Results, analysis: Analysis) -> dict[str, Any]:
    """Return what report.js reads as DATA.

    Keys: `dims` (filters, with the values measured, in order), `cells` (`d` one index a dimension,
    `b` bytes, `ns` medians by variant, `v` ratio, low, high, winner, floor by pair, `parts` of the
    time by variant), `curves`, `pairs`, `mechanisms`, names, and `marks`.
    """
    dims = dims_data(results.cells.values())
    verdicts = verdicts_by_cell(analysis.cells)
    ns = medians_ns(results)
    parts = _parts_by_cell(results.cells, ns)
    cells = [
        {
            "d": indexes(dims, cell), "b": cell.bytes, "ns": ns.get(id_, {}), "v": verdicts[id_],
            "parts": parts.get(id_, {}),
        }
        for id_, cell in results.cells.items()
        if id_ in verdicts
    ]  # fmt: skip
    seen = {pair for verdict in verdicts.values() for pair in verdict}
    pairs = [name for name in words.PAIR_NAMES if name in seen]
    return {
        "dims": dims,
        "cells": cells,
        "curves": curves_data(dims, analysis),
        "pairs": pairs + sorted(seen.difference(pairs)),
        "mechanisms": [name for name in words.MECHANISMS if name in seen],
        "pair_names": words.PAIR_NAMES,
        "residency_names": words.RESIDENCY_NAMES,
        "part_names": PART_NAMES,
        "marks": [{"bytes": n_bytes, "name": name} for n_bytes, name in words.MARKS],
    }


def dims_data(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Return the dimensions with the values that occur, in the order people expect."""
    measured = list(zip(*(words.dims_of(cell) for cell in cells), strict=True))
    dims = []
    for (key, label), values in zip(words.DIMENSIONS, measured, strict=False):
        keys = sorted(set(values), key=partial(words.dim_order, key))
        names = [words.dim_name(key, value) for value in keys]
        dims.append({"key": key, "label": label, "keys": keys, "names": names})
    return dims


def indexes(dims: Sequence[Mapping[str, Any]], cell: Cell) -> list[int]:
    """Return a cell's place in each dimension."""
    return [dim["keys"].index(value) for dim, value in zip(dims, words.dims_of(cell), strict=True)]


def verdicts_by_cell(verdicts: Iterable[CellVerdict]) -> dict[str, dict[str, list[Any]]]:
    """Return ratio, low, high, winner, floor by cell and by the pair's first name.

    The floor is a log ratio: the smallest difference that may be reported; None: nothing may be.
    """
    by_cell: dict[str, dict[str, list[Any]]] = {}
    for one in verdicts:
        numbers = [rounded(one.ratio), rounded(one.low), rounded(one.high)]
        floor = rounded(one.floor) if isfinite(one.floor) else None
        by_cell.setdefault(one.cell.id, {})[one.pair[0]] = [*numbers, one.winner, floor]
    return by_cell


def medians_ns(results: Results) -> dict[str, dict[str, float]]:
    """Return the median ns per operation by cell and variant."""
    all_ns: dict[str, dict[str, list[float]]] = {}
    for sample in results.samples:
        by_variant = all_ns.setdefault(sample.cell, {})
        for variant, ns in sample.ns.items():
            by_variant.setdefault(variant, []).append(ns)
    return {
        cell: {
            variant: rounded(median(ns))
            for variant, ns in variants.items()
            if variant != INTERNAL_AGAIN
        }
        for cell, variants in all_ns.items()
    }


def _parts_by_cell(
    cells: Mapping[str, Cell], ns: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    # States of what is otherwise the same, by variant: what parts_of subtracts from each other.
    ladders: dict[tuple[object, ...], dict[str, float]] = {}
    for id_, cell in cells.items():
        for variant, value in ns.get(id_, {}).items():
            key = (*cell._replace(id="", residency=""), variant)
            ladders.setdefault(key, {})[cell.residency] = value
    return {
        id_: {
            variant: [
                (part, rounded(value))
                for part, value in parts_of(
                    ladders[*cell._replace(id="", residency=""), variant], cell.residency,
                    mirror=variant == "mirror",
                )
            ]
            for variant in ns.get(id_, {})
            if variant == INTERNAL or variant in words.MECHANISMS
        }
        for id_, cell in cells.items()
    }  # fmt: skip


def curves_data(dims: Sequence[Mapping[str, Any]], analysis: Analysis) -> list[dict[str, Any]]:
    """Return each curve's place in the dimensions, its pair, and its verdict in words.

    Those with a crossover come first, then those with a parity size: they are what is looked for.
    """
    curves = []
    for curve in sorted(analysis.curves, key=_verdict_order):
        cell = curve.points[0].cell
        text = words.verdict_text(curve.verdict)
        curves.append({"d": indexes(dims, cell), "pair": curve.pair[0], "text": text})
    return curves


def _verdict_order(curve: Curve) -> tuple[bool, int, int]:
    # Nothing is looked for in curves that are too short to have a threshold.
    verdict, mechanism = curve.verdict, curve.pair[0]
    known = [*words.PAIR_NAMES, mechanism].index(mechanism)
    rank = (Crossover, Parity, NoThreshold).index(type(verdict))
    return len(curve.points) < FEWEST_SIZES, rank, known


def rounded(value: float) -> float:
    """Return a number with as many digits as a picture can show."""
    return float(f"{value:.{_DIGITS}g}")
