"""report.html: one file that loads nothing, and may be opened, mailed and printed."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.record import conditions_of
from kvmmm.bench.crossover.report import words
from kvmmm.bench.crossover.report.data import page_data

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmmm.bench.crossover.record import Header, Results
    from kvmmm.bench.crossover.verdicts import Analysis

_HERE = Path(__file__).parent
_SCRIPTS = ("dom.js", "lines.js", "heat.js", "bars.js", "table.js", "filters.js", "report.js")

_DISTRUST = (
    "Here the two differ beyond doubt, by more than that: the run is not to be trusted, and claims "
    "nothing."
)


def report_page(results: Results, analysis: Analysis, answer: Sequence[str]) -> str:
    """Return the page of one run. `answer` is the summary's lines."""
    header = results.header
    data = page_data(results, analysis)
    texts = {
        "TITLE": "Where does ASIO beat internal mappings on this host?",
        "SUBTITLE": escape(_subtitle(header, results)),
        "ANSWER": bullets(answer),
        "NOISE": escape(_noise(analysis)),
        "THRESHOLDS": _thresholds_table(analysis),
        "CURVES": _curves_table(data),
        "HOST": facts_table(header_facts(header) | _run_facts(results)),
        "UNKNOWN": bullets(words.unknowns(header.host)),
    }
    return filled_page("template.html", texts, data, _SCRIPTS)


def filled_page(
    template: str | Path, texts: Mapping[str, str], data: Mapping[str, Any],
    scripts: Sequence[str | Path],
) -> str:  # fmt: skip
    """Return a template with style, scripts, data and texts (HTML, by placeholder) put in.

    Template and scripts are files of this folder, by name, or others, by path. Scripts see the data
    as DATA. The page's policy names style and script by their hashes, and
    allows nothing else: no request leaves it even if a text were to hold markup.
    """
    style = _own_file("report.css")
    parts = [_own_file(name) for name in scripts]
    head = '"use strict";\nconst DATA = JSON.parse(document.getElementById("data").textContent);\n'
    script = head + "\n".join(parts)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    fields = {
        "CSP": policy, "STYLE": style, "SCRIPT": script, "DATA": _json_in_html(data), **texts,
    }  # fmt: skip
    # Split once at the placeholders: what is put in is never searched for more of them.
    pieces = _own_file(template).split("@")
    for i in range(1, len(pieces), 2):
        pieces[i] = fields[pieces[i]]
    return "".join(pieces)


def _own_file(name: str | Path) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json_in_html(data: Mapping[str, Any]) -> str:
    # "</script>" in a host's name must not end the element.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _subtitle(header: Header, results: Results) -> str:
    n_processes = len({sample.process for sample in results.samples})
    whole = "" if results.footer and results.footer.complete else "; not complete"
    return (
        f"{words.host_line(header.host)}. kvmmm {header.kvmmm}, {header.mode} run of "
        f"{header.started}: {len(results.cells)} cells, {n_processes} processes, "
        f"{len(results.samples)} rounds{whole}."
    )


def header_facts(header: Header) -> dict[str, object]:
    """Return what a header says, the host's facts last."""
    facts: dict[str, object] = {
        "kvmmm": header.kvmmm, "commit": header.commit, "started": header.started,
        "mode": header.mode, "seed": header.seed,
    }  # fmt: skip
    return facts | dict(header.host)


def _run_facts(results: Results) -> dict[str, object]:
    # How it went, and how it was done.
    conditions = conditions_of(results)
    facts: dict[str, object] = {} if conditions is None else {"meanwhile": str(conditions)}
    methods = (line for line in results.others if line["kind"] == "method")
    for method in methods:
        facts |= {name.replace("_", " "): of for name, of in method.items() if name != "kind"}
    return facts


def facts_table(facts: Mapping[str, object]) -> str:
    """Return facts as an HTML table; None reads "not known"."""
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(words.fact_text(fact))}</td></tr>'
        for name, fact in facts.items()
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def bullets(lines: Iterable[str]) -> str:
    """Return lines of text as an HTML list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _noise(analysis: Analysis) -> str:
    noise = analysis.noise
    if not isfinite(noise.smallest):
        return "No A/A pair was measured, so nothing is claimed."
    text = (
        f"Measured twice, the same code differs by {noise.difference:.1%} (median over cells; half "
        f"width of the 95 % interval {noise.half_width:.1%}). The smallest difference that is "
        f"reported is {noise.smallest:.1%} in the usual cell."
    )
    return text if noise.trusted else f"{text} {_DISTRUST}"


def _thresholds_table(analysis: Analysis) -> str:
    if not analysis.thresholds:
        return "<p>No curve was measured on both sides of a threshold.</p>"
    rows = []
    for one in sorted(analysis.thresholds, key=lambda one: (one.bytes, -one.regret)):
        dims = words.dims_of(one.curve.points[0].cell)
        names = [words.dim_name(key, v) for (key, _), v in zip(words.DIMENSIONS, dims, strict=True)]
        rows.append((
            words.bytes_text(one.bytes), *names, words.pair_name(one.curve.pair[0]), one.verdict,
            f"{one.regret:.0%} [{one.low:.0%}, {one.high:.0%}] at {words.bytes_text(one.at_bytes)}",
            f"{words.threshold_text(one.best_bytes)}: {one.best_regret:.0%}",
        ))  # fmt: skip
    labels = [label.lower() for _, label in words.DIMENSIONS]
    head = ("threshold", *labels, "against internal", "verdict", "most that it loses", "best one")
    return html_table(head, rows)


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of texts."""
    tops = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{tops}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _curves_table(data: Mapping[str, Any]) -> str:
    # Said without scripts, too: it is the result.
    dims = data["dims"]
    rows = []
    for curve in data["curves"]:
        names = [dim["names"][i] for dim, i in zip(dims, curve["d"], strict=True)]
        rows.append((*names, words.pair_name(curve["pair"]), curve["text"]))
    labels = [dim["label"].lower() for dim in dims]
    return html_table((*labels, "against internal", "verdict"), rows)
