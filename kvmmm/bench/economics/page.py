"""report.html of first touches and exits: one file that loads nothing, as the crossover's."""

from __future__ import annotations

from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.report import words as crossover_words
from kvmmm.bench.crossover.report.page import (
    bullets,
    facts_table,
    filled_page,
    header_facts,
    html_table,
)
from kvmmm.bench.economics.asked import BREAK_EVEN, FEW, QUESTIONS
from kvmmm.bench.economics.plan import COUNT_WINDOWS, EXITS, FAULTS, MEMSLOTS
from kvmmm.bench.economics.verdicts import ABOVE, BELOW
from kvmmm.bench.economics.words import (
    EXIT_NAMES,
    FIGURE_NAMES,
    PART_NAMES,
    WAY_NAMES,
    subject_text,
    times_text,
)
from kvmmm.bench.fault_answer import SLOT_COUNTS, WINDOWS, window_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.economics.verdicts import Comparison, Economics

_HERE = Path(__file__).parent
_SCRIPTS = ("dom.js", "lines.js", "bars.js", "table.js", _HERE / "economics.js")
_DIGITS = 4
_TITLES = {
    True: "What does a first touch cost on this host, and an exit?",
    False: "What does an exit cost on this host?",
}
_UNKNOWN = (
    "Frames that are not resident: they cost the same more in every way.",
    "Copies on write: another question (mm/cow_break_window).",
    "Guest pages of 2 MiB, and touches by several vCPUs at once: not part of this sweep.",
)


def report_page(results: Results, said: Economics, answer: Sequence[str]) -> str:
    """Return the page of one run. `answer` is the summary's lines."""
    header = results.header
    texts = {
        "TITLE": _TITLES[any(key.part == FAULTS for key in said.figures)],
        "SUBTITLE": escape(_subtitle(results, said)),
        "ANSWER": bullets(answer),
        "NOISE": escape(_noise(said)),
        "COMPARISONS": _comparisons_table(said),
        "HOST": facts_table(header_facts(header)),
        "UNKNOWN": bullets([*_unknowns(header.host), *_UNKNOWN]),
    }
    return filled_page(_HERE / "economics.html", texts, page_data(said), _SCRIPTS)


def page_data(said: Economics) -> dict[str, Any]:
    """Return what economics.js reads as DATA.

    Keys: `figures` (`part`, `of`, `access`, `b` window, `name`; `v` ns, low, high; `floor`, a log
    ratio, None where nothing may be told), `comparisons` (`q` question, `ref` what the ratio is
    compared with, `v` ratio, low, high, `told` -1, 0, 1), and names.
    """
    figures = [
        {
            "part": key.part, "of": key.subject, "access": key.access, "b": key.window,
            "name": key.name, "v": [_rounded(x) for x in (one.ns, one.low, one.high)],
            "floor": _rounded(one.floor) if isfinite(one.floor) else None, "rounds": one.n_rounds,
        }
        for key, one in said.figures.items()
    ]  # fmt: skip
    return {
        "figures": figures,
        "comparisons": [_comparison_data(one) for one in said.comparisons],
        "ways": [{"key": way, "name": name} for way, name in WAY_NAMES.items()],
        "exits": [{"key": kind, "name": name} for kind, name in EXIT_NAMES.items()],
        "windows": WINDOWS,
        "counts": SLOT_COUNTS,
        "count_windows": COUNT_WINDOWS,
        "figure_names": FIGURE_NAMES,
        "part_names": PART_NAMES,
        "pair_names": {},
        "names": {
            part: {key.subject: subject_text(part, key.subject) for key in said.figures}
            for part in (FAULTS, EXITS)
        }
        | {MEMSLOTS: {str(count): subject_text(MEMSLOTS, str(count)) for count in SLOT_COUNTS}},
    }


def _comparison_data(one: Comparison) -> dict[str, Any]:
    over = one.question.over
    return {
        "q": one.question.name, "of": over.subject, "access": over.access, "b": over.window,
        "ref": one.question.reference, "told": one.told,
        "v": [_rounded(x) for x in (one.ratio, one.low, one.high)],
        "floor": _rounded(one.floor) if isfinite(one.floor) else None,
    }  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if isfinite(value) else 1e300


def _subtitle(results: Results, said: Economics) -> str:
    header = results.header
    whole = "" if results.footer and results.footer.complete else "; not complete"
    return (
        f"{crossover_words.host_line(header.host)}. kvmmm {header.kvmmm}, {header.mode} run of "
        f"{header.started}: {len(results.cells)} cells, {said.n_processes} processes, "
        f"{len(results.samples)} rounds of cells{whole}."
    )


def _noise(said: Economics) -> str:
    if said.refusal:
        return f"Nothing is told: {said.refusal}"
    noise = said.noise
    each = ", ".join(
        f"{FIGURE_NAMES[name]} {value:.1%}" for name, value in sorted(noise.smallest_of.items())
    )
    return (
        f"Measured twice, the same differs by {noise.difference:.1%} (median over figures). The "
        f"smallest difference that is told of the usual figure: {each}."
    )


def _comparisons_table(said: Economics) -> str:
    if not said.comparisons:
        return "<p>Nothing was measured that could be compared.</p>"
    rows = []
    for one in said.comparisons:
        over, reference = one.question.over, one.question.reference
        told = {ABOVE: "told: above", BELOW: "told: below"}.get(one.told, "not told apart from")
        rows.append((
            QUESTIONS[one.question.name], subject_text(over.part, over.subject),
            "" if over.part == EXITS else over.access,
            "" if over.part == EXITS else window_text(over.window),
            times_text(one), f"{told} {reference:g}", f"{one.p:.1g}",
        ))  # fmt: skip
    head = ("what ÷ what", "of", "access", "window", "ratio, 95 %", "verdict", "p, alone")
    note = (
        f"Break-even is asked twice: against 1 (does it always pay?) and {FEW:g} (do two touched "
        "pages pay it?)."
    )
    asked = any(one.question.name == BREAK_EVEN for one in said.comparisons)
    return html_table(head, rows) + (f"<p>{escape(note)}</p>" if asked else "")


def _unknowns(host: Mapping[str, object]) -> list[str]:
    cpu = crossover_words.fact_text(host.get("cpu"))
    others = [name for name in ("Intel", "AMD") if name.lower() not in cpu.lower()]
    kvm = crossover_words.fact_text(crossover_words.kvm_kind(host))
    bare_metal = "What bare-metal EPT (Intel) or NPT (AMD) makes of an exit is known only where "
    return [
        f"Other kinds of KVM. This host: {kvm}. {bare_metal}such a host was measured.",
        f"Other CPUs: {' and '.join(others)} {'was' if len(others) == 1 else 'were'} not measured.",
        "NUMA: everything runs on one CPU.",
    ]
