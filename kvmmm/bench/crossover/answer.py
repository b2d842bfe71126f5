"""The answer in ten lines: what a sweep says of its host, how surely, and what it does not say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.crossing import FEWEST_SIZES, Crossover, Parity
from kvmmm.bench.crossover.record import INTERNAL
from kvmmm.bench.crossover.report.words import bytes_text, host_line, ratio_text
from kvmmm.bench.crossover.thresholds import (
    COPY_MAP_MIN_BYTES,
    COSTLY,
    HARMLESS,
    RW_MAP_MIN_BYTES,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.thresholds import Judgement
    from kvmmm.bench.crossover.verdicts import Analysis, CellVerdict, Curve, Noise

LINES = 10
"""How many lines an answer has; fewer where the data does not carry it."""
LINE_CHARS = 260
"""No line is longer: they are read in a terminal, and stand in the README."""
ASKED_FOR = "mirror"
"""The address space that the question is about; the walk of page tables is in the report."""
STATES = {
    "warm": ("Both warm", "where both are warm"),
    "linear-cold": ("Linear mapping cold", "where the linear mapping is cold"),
    "mirror-cold": ("Mirror cold", "where the mirror is cold"),
    "cold": ("Both cold", "where both are cold"),
    "absent": ("Page absent", "where the page is absent"),
}
"""Residency states, in the order of the lines about them: what each is called."""
FULL_PROCESSES = 5
_MOSTLY = 0.8
_FEWEST_WINS = 5


def summarize(folder: Path) -> list[str]:
    """Return the answer of the sweep in a folder.

    Raises:
        MissingExtraError: numpy is not installed.
        ResultsError: The results are malformed.
        OSError: They cannot be read.
    """
    from kvmmm.bench.crossover.record import read_results
    from kvmmm.bench.crossover.statistics import analyse

    results = read_results(folder)
    return answer_of(results, analyse(results, seed=results.header.seed))


def answer_of(results: Results, analysis: Analysis) -> list[str]:
    """Return the answer, a line each; ten, or why there is none."""
    if (refusal := _refusal(analysis)) is not None:
        return [f"No answer: {refusal}", _provenance(results, analysis)]
    curves = [curve for curve in analysis.curves if curve.pair[0] == ASKED_FOR]
    return [
        _headline(curves),
        _what_decides(curves),
        *(_state_line(state, curves) for state in STATES),
        _threshold_line(COPY_MAP_MIN_BYTES, "plain copies", analysis.thresholds),
        _threshold_line(RW_MAP_MIN_BYTES, "vectored copies", analysis.thresholds),
        _provenance(results, analysis),
    ]


def _provenance(results: Results, analysis: Analysis) -> str:
    header = results.header
    host = host_line(header.host) or "a host that says nothing of itself"
    line = f"Measured: {host}; {header.mode} sweep, {len(results.cells)} cells"
    line += f", {analysis.n_processes} processes"
    if noise := _noise_text(analysis.noise):
        line += f"; {noise}"
    if analysis.n_processes < FULL_PROCESSES:
        line += f". Fewer than {FULL_PROCESSES} processes: intervals are wide"
    if results.footer is None or not results.footer.complete:
        line += ". The sweep did not come to its end"
    return f"{line}. Not known: bare metal, other KVMs and CPUs, NUMA, a guest that runs meanwhile."


def _noise_text(noise: Noise) -> str:
    finite = [value for value in noise.smallest_of.values() if math.isfinite(value)]
    if not finite:
        return ""
    low, high = f"{min(finite):.1%}", f"{max(finite):.1%}"
    return f"less than {low if low == high else f'{low} to {high}'} is noise (A/A)"


def _refusal(analysis: Analysis) -> str | None:
    from kvmmm.bench.crossover.statistics import FEWEST_PROCESSES

    if not any(cell.pair[0] == ASKED_FOR for cell in analysis.cells):
        return "nothing was measured with the mirror."
    if analysis.n_processes < FEWEST_PROCESSES:
        return (
            f"{analysis.n_processes} processes do not show how much processes differ; "
            f"{FULL_PROCESSES} do."
        )
    if math.isinf(analysis.noise.smallest):
        return "no side was measured twice (A/A), so it is not known what is noise."
    if not analysis.noise.trusted:
        return (
            "the same side, measured twice, differs beyond doubt: something disturbed the sweep. "
            "Measure again on a quiet host."
        )
    return None


def _headline(curves: Sequence[Curve]) -> str:
    won = []
    for state, (_, where) in STATES.items():
        if points := _points_in(curves, state):
            n_won = len(_won_by(ASKED_FOR, points))
            won.append((n_won / len(points), f"{n_won} of {len(points)} cells {where}"))
    won.sort(key=lambda one: -one[0])
    shown = [won[0][1], *(text.replace(" cells", "") for _, text in won[1:])]
    return f"ASIO (the mirror) beats internal mappings on this host in {', '.join(shown)}."


def _what_decides(curves: Sequence[Curve]) -> str:
    long = [curve for curve in curves if len(curve.points) >= FEWEST_SIZES]
    found = [c.verdict for c in long if isinstance(c.verdict, Crossover)]
    if not found:
        size = f"Size decides nothing: no crossover in {_n_curves(long)}"
    else:
        seldom = "Size seldom decides: " if len(found) * 4 < len(long) else ""
        span = _span([verdict.bytes for verdict in found])
        size = f"{seldom}{len(found)} of {_n_curves(long)} cross, at {span}"
    won = _won_by(ASKED_FOR, _points_in(curves, "warm"))
    scattered = [p for p in won if p.cell.order == "scattered"]
    text = f"{size} (a curve: one operation in one state, over all sizes)."
    if len(scattered) >= max(_FEWEST_WINS, _MOSTLY * len(won)):
        # All but a tenth of them.
        least = sorted(p.cell.bytes for p in scattered)[len(scattered) // 10]
        text += (
            f" Both warm, {len(scattered)} of ASIO's {len(won)} wins are in scattered memory, "
            f"mostly from {bytes_text(least)} on."
        )
    return text


def _points_in(curves: Sequence[Curve], state: str) -> list[CellVerdict]:
    return [point for curve in _in_state(curves, state) for point in curve.points]


def _won_by(side: str, points: Sequence[CellVerdict]) -> list[CellVerdict]:
    return [point for point in points if point.winner == side]


def _in_state(curves: Sequence[Curve], state: str) -> list[Curve]:
    return [curve for curve in curves if curve.dim("residency") == state]


def _state_line(state: str, curves: Sequence[Curve]) -> str:
    title, _ = STATES[state]
    points = _points_in(curves, state)
    if not points:
        return f"{title}: not measured."
    parts = []
    for name, side in (("internal mappings", INTERNAL), ("ASIO", ASKED_FOR)):
        won = [max(p.ratio, 1 / p.ratio) for p in _won_by(side, points)]
        if won:
            parts.append((len(won), f"{name} faster in {len(won)} ({_times(min(won), max(won))})"))
    if undecided := sum(p.winner is None for p in points):
        parts.append((undecided, f"undecided {undecided}"))
    parts.sort(key=lambda part: -part[0])
    said = ", ".join(text for _, text in parts)
    return f"{title}, {len(points)} cells: {said}; {_curves_text(_in_state(curves, state))}."


def _times(low: float, high: float) -> str:
    a, b = ratio_text(low), ratio_text(high)
    return f"{a}x" if a == b else f"{a}-{b}x"


def _curves_text(curves: Sequence[Curve]) -> str:
    long = [curve for curve in curves if len(curve.points) >= FEWEST_SIZES]
    found = [(c.verdict.regret, c, c.verdict) for c in long if isinstance(c.verdict, Crossover)]
    if not found:
        parity = [c.verdict.bytes for c in long if isinstance(c.verdict, Parity)]
        equal = f", within 5 % from {_span(parity)} on in {len(parity)}" if parity else ""
        return f"no crossover in {_n_curves(long)}{equal}"
    _, curve, verdict = max(found, key=lambda one: one[0])
    example = _crossover_text(curve, verdict)
    if len(found) == 1:
        return f"1 of {_n_curves(long)} crosses: {example}"
    return f"{len(found)} of {_n_curves(long)} cross, as {example}"


def _crossover_text(curve: Curve, verdict: Crossover) -> str:
    above = "ASIO" if verdict.above == ASKED_FOR else "internal"
    return (
        f"{_name(curve)}: {bytes_text(verdict.bytes)} "
        f"[{bytes_text(verdict.low)}, {bytes_text(verdict.high)}], {above} above, "
        f"probability {verdict.probability:.2f}, 4x wrong costs {verdict.regret:.0%}"
    )


def _threshold_line(n_bytes: int, what: str, judgements: Sequence[Judgement]) -> str:
    here = [j for j in judgements if j.bytes == n_bytes and j.curve.pair[0] == ASKED_FOR]
    title = f"gVisor's {bytes_text(n_bytes)} ({what}, ASIO below it)"
    if not here:
        return f"{title}: not judged, no curve has sizes on both sides of it."
    warm = [j for j in here if j.curve.dim("residency") == "warm"]
    rest = [j for j in here if j.curve.dim("residency") != "warm"]
    parts = [_judged("both warm", warm), _judged("otherwise", rest)]
    return f"{title} costs over 5 %: {'; '.join(part for part in parts if part)}."


def _judged(label: str, judgements: Sequence[Judgement]) -> str:
    if not judgements:
        return ""
    harmless = sum(j.verdict == HARMLESS for j in judgements)
    costly = [j for j in judgements if j.verdict == COSTLY]
    unknown = len(judgements) - harmless - len(costly)
    text = f"{label} in {len(costly)} of {_n_curves(judgements)}"
    if costly:
        worst = max(costly, key=lambda j: j.low)
        lost = _times(1 + worst.low, 1 + worst.high)
        operation, n_bytes = worst.curve.dim("operation"), bytes_text(worst.at_bytes)
        text += f" (at worst {lost}: {operation}, {n_bytes}; best {_best(worst)})"
    if harmless:
        text += f", not in {harmless}"
    if unknown:
        text += f", open in {unknown}"
    return text


def _best(judgement: Judgement) -> str:
    if judgement.best_bytes == 0:
        return "internal always"
    if math.isinf(judgement.best_bytes):
        return "ASIO always"
    return f"ASIO below {bytes_text(judgement.best_bytes)}"


def _n_curves(some: Sequence[object]) -> str:
    return "1 curve" if len(some) == 1 else f"{len(some)} curves"


def _name(curve: Curve) -> str:
    dim = curve.dim
    segments = f"{dim('layout')} {dim('order')}" if dim("layout") != "1" else "1 segment"
    caller = "" if dim("caller") == "c" else f", {dim('caller')}"
    return f"{dim('operation')}, {segments}, {dim('locality')}{caller}"


def _span(sizes: Sequence[float]) -> str:
    low, high = bytes_text(min(sizes)), bytes_text(max(sizes))
    return low if low == high else f"{low} to {high}"
