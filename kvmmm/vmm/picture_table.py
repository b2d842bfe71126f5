"""The same as the picture in numbers: a line for each mapping, as text or as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.units import format_bytes
from kvmmm.vmm.elf import printable
from kvmmm.vmm.picture import draw_all
from kvmmm.vmm.picture_canvas import escaped, style_sheet
from kvmmm.vmm.picture_words import perms_text, sums_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.mm.sight import Sight
    from kvmmm.vmm.picture_words import Caption, Drawn

HEADINGS = (
    "address", "perms", "size", "resident", "own", "relative", "file", "shared", "faults", "name",
)  # fmt: skip
_LEFT_ALIGNED = frozenset(("address", "perms", "name"))

_PAGE_STYLE = """\
body{margin:0;background:#fff;color:#1f2328;font:13px ui-sans-serif,system-ui,sans-serif}
svg{display:block;max-width:100%;height:auto}
section{padding:0 24px 24px}h2{font-size:14px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th{text-align:right;font-weight:600;border-bottom:1px solid #8b949e}
th,td{padding:2px 10px;white-space:nowrap;text-align:right}
td:first-child,td:nth-child(2){font-family:ui-monospace,monospace}
.left{text-align:left}tr:hover td{background:#8b949e33}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}}
"""


def lines_of(sight: Sight) -> list[tuple[str, ...]]:
    """Return a tuple for each mapping, in the order of HEADINGS."""
    faults = _faults_of(sight)
    return [
        (
            f"{m.start:08x}-{m.end:08x}",
            perms_text(m.vma),
            *(format_bytes(n) if n else "-" for n in (m.size_bytes, m.rss_bytes, *m.by_kind)),
            f"{n_faults:,}" if n_faults else "-",
            m.vma.name,
        )
        for m, n_faults in zip(sight.mappings, faults, strict=True)
    ]


def _faults_of(sight: Sight) -> list[int]:
    # How many fell in each mapping; both ascend. Those outside are in nobody's.
    counts = [0] * len(sight.mappings)
    at = 0
    for place in sight.faults or ():
        while at < len(counts) and sight.mappings[at].end <= place.start:
            at += 1
        if at < len(counts) and sight.mappings[at].start < place.end:
            counts[at] += place.faults
    return counts


def text(spaces: Sequence[Drawn], caption: Caption) -> str:
    """Return tables as text, for a terminal."""
    parts = [": ".join(filter(None, (caption.title, caption.outcome)))]
    for drawn in spaces:
        lines = [HEADINGS, *lines_of(drawn.sight)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts += ["", *([drawn.label] if drawn.label else []), "; ".join(sums_of(drawn.sight))]
        parts += (_aligned(line, widths) for line in lines)
        if drawn.fault is not None:
            parts.append(drawn.fault[1])
    return "\n".join(parts) + "\n"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        f"{cell:{'<' if heading in _LEFT_ALIGNED else '>'}{width}}"
        for heading, cell, width in zip(HEADINGS, map(printable, line), widths, strict=True)
    )
    return "  ".join(cells).rstrip()


def page(spaces: Sequence[Drawn], caption: Caption) -> str:
    """Return an HTML page: the picture, and below it the tables. It refers to nothing outside."""
    title = escaped(caption.title)
    tables = "".join(
        f"<section><h2>{escaped(drawn.label or caption.title)}</h2>{_table(drawn.sight)}</section>"
        for drawn in spaces
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{title}</title><style>\n{_PAGE_STYLE}{style_sheet()}</style></head><body>\n"
        f"{draw_all(spaces, caption)}{tables}</body></html>\n"
    )


def _table(sight: Sight) -> str:
    classes = [' class="left"' if heading in _LEFT_ALIGNED else "" for heading in HEADINGS]
    head = "".join(
        f"<th{class_}>{heading}</th>" for class_, heading in zip(classes, HEADINGS, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{class_}>{escaped(cell)}</td>" for class_, cell in zip(classes, line, strict=True)
        )
        + "</tr>\n"
        for line in lines_of(sight)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"
