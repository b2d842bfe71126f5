"""The answer in ten lines: what a sweep says of its host, how surely, and what it does not say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.crossing import Crossover, Parity
from kvmmm.bench.crossover.report.words import bytes_text, host_line, interval_text, ratio_text
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
ASKED_FOR = "mirror"
"""The address space that the question is about; the walk of page tables is in the report."""
STATES = {
    "warm": "Both warm",
    "mirror-cold": "Mirror cold, linear mapping warm",
    "linear-cold": "Mirror warm, linear mapping cold",
    "cold": "Both cold",
    "absent": "Page absent",
}
"""Residency states, in the order of the lines about them."""
FULL_PROCESSES = 5
_DECISIVE = 0.5
_SHOWN = 2


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
    first = _provenance(results, analysis)
    if (refusal := _refusal(analysis)) is not None:
        return [first, f"No answer: {refusal}", _unsaid(analysis.noise)]
    curves = [curve for curve in analysis.curves if curve.pair[0] == ASKED_FOR]
    return [
        first,
        _headline(curves),
        *(_state_line(state, curves) for state in STATES),
        _threshold_line(COPY_MAP_MIN_BYTES, "plain copies", analysis.thresholds),
        _threshold_line(RW_MAP_MIN_BYTES, "vectored copies", analysis.thresholds),
        _unsaid(analysis.noise),
    ]


def _provenance(results: Results, analysis: Analysis) -> str:
    header = results.header
    host = host_line(header.host) or "a host that says nothing of itself"
    line = f"This host alone: {host}; {header.mode} sweep, {len(results.cells)} cells"
    line += f", {analysis.n_processes} processes."
    if analysis.n_processes < FULL_PROCESSES:
        line += f" Fewer than {FULL_PROCESSES}: intervals are wide, and less may be said."
    if results.footer is None or not results.footer.complete:
        line += " The sweep did not come to its end."
    return line


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
    found = [c.verdict for c in curves if isinstance(c.verdict, Crossover)]
    if not found:
        size = f"Size decides nothing: none of {len(curves)} curves has a crossover"
    else:
        span = _span([verdict.bytes for verdict in found])
        size = f"{len(found)} of {len(curves)} curves have a crossover, at {span}"
        if len(found) * 4 < len(curves):
            size = f"Size seldom decides: {size}"
    shares = {
        state: _share(points)
        for state in STATES
        if (points := [p for c in _in_state(curves, state) for p in c.points])
    }
    if len(shares) < 2:
        return f"{size}."
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    if shares[most] - shares[least] < _DECISIVE:
        return f"{size}; nor does residency."
    return (
        f"{size}. Residency decides: internal mappings are faster in {shares[most]:.0%} of cells "
        f"where it is {most}, in {shares[least]:.0%} where it is {least}."
    )


def _share(points: Sequence[CellVerdict]) -> float:
    return sum(p.winner == p.pair[1] for p in points) / len(points)


def _in_state(curves: Sequence[Curve], state: str) -> list[Curve]:
    return [curve for curve in curves if curve.dim("residency") == state]


def _state_line(state: str, curves: Sequence[Curve]) -> str:
    here = _in_state(curves, state)
    if not here:
        return f"{STATES[state]}: not measured."
    points = [point for curve in here for point in curve.points]
    parts = []
    for name, side in (("internal mappings", "internal"), ("the mirror", ASKED_FOR)):
        won = [p.ratio if side == "internal" else 1 / p.ratio for p in points if p.winner == side]
        if won:
            by = f"{ratio_text(min(won))} to {ratio_text(max(won))} times"
            parts.append(f"{name} faster in {len(won)} ({by})")
    undecided = sum(p.winner is None for p in points)
    if undecided:
        parts.append(f"no difference to be told in {undecided}")
    return f"{STATES[state]}, {len(points)} cells: {', '.join(parts)}; {_curves_text(here)}."


def _curves_text(curves: Sequence[Curve]) -> str:
    found = [(c, c.verdict) for c in curves if isinstance(c.verdict, Crossover)]
    parity = [c.verdict.bytes for c in curves if isinstance(c.verdict, Parity)]
    parts = []
    if parity:
        parts.append(f"within 5 % from {_span(parity)} on in {_n_curves(parity)}")
    if not found:
        return ", ".join([f"no crossover in {_n_curves(curves)}", *parts])
    shown = "; ".join(_crossover_text(*one) for one in found[:_SHOWN])
    more = f"; {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    crossings = f"crossovers in {len(found)} of {len(curves)} curves ({shown}{more})"
    return ", ".join([crossings, *parts])


def _crossover_text(curve: Curve, verdict: Crossover) -> str:
    interval = f"[{bytes_text(verdict.low)}, {bytes_text(verdict.high)}]"
    return (
        f"{_name(curve)}: {bytes_text(verdict.bytes)} {interval}, {verdict.above} above, "
        f"probability {verdict.probability:.2f}, 4x wrong costs {verdict.regret:.0%}"
    )


def _threshold_line(n_bytes: int, what: str, judgements: Sequence[Judgement]) -> str:
    here = [j for j in judgements if j.bytes == n_bytes and j.curve.pair[0] == ASKED_FOR]
    title = f"gVisor's {bytes_text(n_bytes)} ({what}: ASIO below it)"
    if not here:
        return f"{title}: not judged, no curve has sizes on both sides of it."
    warm = [j for j in here if j.curve.dim("residency") == "warm"]
    rest = [j for j in here if j.curve.dim("residency") != "warm"]
    parts = [_judged("warm", warm), _judged("otherwise", rest)]
    return f"{title}: {'; '.join(part for part in parts if part)}."


def _judged(label: str, judgements: Sequence[Judgement]) -> str:
    if not judgements:
        return ""
    harmless = [j for j in judgements if j.verdict == HARMLESS]
    costly = [j for j in judgements if j.verdict == COSTLY]
    parts = []
    if harmless:
        parts.append(f"costs at most 5 % in {len(harmless)}")
    if costly:
        worst = max(costly, key=lambda j: j.low)
        lost = interval_text(1 + worst.low, 1 + worst.high)
        best = _best(worst)
        parts.append(
            f"is wrong in {len(costly)}, worst {lost} times slower at {bytes_text(worst.at_bytes)} "
            f"({_name(worst.curve)}; best there: {best})"
        )
    if unknown := len(judgements) - len(harmless) - len(costly):
        parts.append(f"not known in {unknown}")
    return f"{label}, of {_n_curves(judgements)} it {', '.join(parts)}"


def _best(judgement: Judgement) -> str:
    if judgement.best_bytes == 0:
        return "internal mappings always"
    if math.isinf(judgement.best_bytes):
        return "ASIO always"
    return f"ASIO below {bytes_text(judgement.best_bytes)}"


def _unsaid(noise: Noise) -> str:
    below = f"differences below {noise.smallest:.1%}" if math.isfinite(noise.smallest) else ""
    if len(noise.smallest_of) > 1:
        finite = [value for value in noise.smallest_of.values() if math.isfinite(value)]
        if finite:
            below = f"differences below {min(finite):.1%} to {max(finite):.1%} (by residency)"
    noise_text = f"{below}, which is noise (A/A), nor " if below else ""
    return (
        f"Not said here: {noise_text}anything of other hosts. Bare metal, other kinds of KVM, "
        "other CPUs, NUMA, and a guest that runs meanwhile: not known."
    )


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
