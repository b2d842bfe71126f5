"""One address space in a picture: what it comes to, then its mappings and holes from top to bottom.

address      perms   ' ''    '      faults: where, what for, how many
0x204000     rw-p    ███████████    the mapping, coloured by its permissions
                     ▒▒▒▒▒  ▒▒      what of it is resident, by whose it is
0x4000000            ┈┈┈┈┈┈┈┈┈┈┈    a hole, however large, takes one line
"""

from __future__ import annotations

from itertools import groupby
from math import log2
from typing import TYPE_CHECKING

from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.hostarch.units import format_bytes
from kvmmm.mm.sight import KIND_NAMES
from kvmmm.vmm.picture_canvas import LEFT, RIGHT
from kvmmm.vmm.picture_rows import Mark, Row, marks_of, rows_of, width_of
from kvmmm.vmm.picture_words import (
    FAULT_CLASSES,
    KIND_CLASSES,
    PERMS_CLASSES,
    Drawn,
    clipped,
    faults_text,
    kinds_text,
    perms_class,
    perms_text,
    plural,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmmm.mm.fault_log import FaultPlace
    from kvmmm.vmm.picture_canvas import Canvas

_ADDR_X, _PERMS_X, _BAR_X, _NAME_X = 124, 138, 186, 740
_SIZE_X, _RSS_X, _FAULTS_X = 972, 1044, RIGHT
_BAR_LEAST, _BAR_MOST = 48, 540
_TICKS_HEIGHT, _BAR_HEIGHT, _BAND_HEIGHT = 14, 13, 9
_ROW_HEIGHT, _HOLE_HEIGHT, _NOTE_HEIGHT = 42, 20, 16
_TICK_MOST = 4
_NAME_MAX = 24
_BREAK_BYTES = 1 << 30
_BAR_HEADING = "what is mapped, and below it what is resident; ticks are faults, taller for more"
_MOST_MARKS = 6000
"""Beyond so many, marks are drawn coarser: nobody sees more, and the file would get large."""


class SpacePainter:
    """Draws one address space.

    Args:
        canvas: Where.
        drawn: What.
    """

    def __init__(self, canvas: Canvas, drawn: Drawn) -> None:
        self.canvas = canvas
        self.sight = drawn.sight
        self.fault = drawn.fault
        self.rows = rows_of(self.sight.mappings)
        self.longest = max((row.span_bytes for row in self.rows), default=0)
        self.places = _by_row(self.rows, self.sight.faults or [])
        self.quantum = self._quantum()

    def _quantum(self) -> float:
        quantum = 1.5
        while quantum < _BAR_MOST:
            n_marks = sum(
                len(marks_of(row, pieces, self._width(row), quantum))
                for row in self.rows
                for pieces in (_resident(row), _mapped(row), self._faults_in(row))
            )
            if n_marks <= _MOST_MARKS:
                break
            quantum *= 2
        return quantum

    def _width(self, row: Row) -> float:
        return width_of(row.span_bytes, self.longest, _BAR_LEAST, _BAR_MOST)

    def _faults_in(self, row: Row) -> list[tuple[int, int, tuple[int, int, int]]]:
        return [
            (p.start, p.end, (p.reads, p.writes, p.executes))
            for p in self.places.get(id(row), ())
        ]  # fmt: skip

    def draw(self, y: float) -> float:
        """Draw rows and holes from y down; returns where they end."""
        y = self._header(y)
        at = 0
        for row in self.rows:
            y = self._hole(at, row.start, y)
            y = self._row(row, y)
            at = row.end
        return self._hole(at, self.sight.max_addr, y, is_last=True)

    def _header(self, y: float) -> float:
        for x, text, classes in (
            (_ADDR_X, "address", "dim small end"), (_PERMS_X, "perms", "dim small"),
            (_BAR_X, _BAR_HEADING, "dim small"),
            (_NAME_X, "name", "dim small"), (_SIZE_X, "size", "dim small end"),
            (_RSS_X, "resident", "dim small end"), (_FAULTS_X, "faults", "dim small end"),
        ):  # fmt: skip
            self.canvas.text(x, y, text, classes)
        self.canvas.line(LEFT, y + 6, RIGHT, y + 6, "rule")
        return y + 10

    # ---- holes ----

    def _hole(self, start: int, end: int, y: float, *, is_last: bool = False) -> float:
        # The last one has what lies outside the address space as well.
        limit = ADDRESS_LIMIT if is_last else end
        places = [p for p in self.places.get(None, ()) if start <= p.start < limit]
        fault = self.fault if self.fault and start <= self.fault[0] < limit else None
        if start >= end and not (places or fault):
            return y
        canvas, middle = self.canvas, y + _HOLE_HEIGHT / 2
        text = f"{format_bytes(end - start)} unmapped" if start < end else "the end"
        if places:
            counts = [sum(p[i] for p in places) for i in (2, 3, 4)]
            text += f"; {faults_text(counts)} where nothing is mapped (any more)"
        canvas.begin("gap", f"{start:#x}-{end:#x}: {text}")
        canvas.text(_ADDR_X, middle + 4, f"{start:#x}", "dim mono end")
        if end - start >= _BREAK_BYTES:
            zigzag = "".join(f"l4,{'-6' if i % 2 else '6'}" for i in range(10))
            for shift in (-2, 2):
                canvas.path(f"M{_BAR_X},{middle - 3 + shift}{zigzag}", "rule")
        else:
            canvas.line(_BAR_X, middle, _BAR_X + 40, middle, "hole")
        canvas.text(_BAR_X + 50, middle + 4, text, "dim small")
        canvas.end()
        y += _HOLE_HEIGHT
        if fault:
            canvas.mark(_BAR_X + 6, y + 9, "bad")
            canvas.text(_BAR_X + 16, y + 8, fault[1], "bad small")
            y += _NOTE_HEIGHT
        return y

    # ---- rows ----

    def _row(self, row: Row, y: float) -> float:
        canvas = self.canvas
        width = self._width(row)
        bar_y = y + _TICKS_HEIGHT
        band_y = bar_y + _BAR_HEIGHT + 1
        counts = [sum(p[i] for p in self.places.get(id(row), ())) for i in (2, 3, 4)]
        canvas.begin("mapping", _row_title(row, counts))
        self._labels(row, bar_y + 12, sum(counts))
        self._bars(row, bar_y, width)
        self._bands(row, band_y, width)
        self._ticks(row, bar_y, width)
        canvas.end()
        if self.fault and row.start <= self.fault[0] < row.end:
            x = _BAR_X + (self.fault[0] - row.start) * width / row.span_bytes
            canvas.mark(x, bar_y, "bad")
            canvas.line(x, bar_y, x, band_y + _BAND_HEIGHT, "wound")
            canvas.text(_BAR_X, band_y + _BAND_HEIGHT + 12, self.fault[1], "bad small")
            y += _NOTE_HEIGHT
        return y + _ROW_HEIGHT

    def _labels(self, row: Row, y: float, n_faults: int) -> None:
        canvas, rss = self.canvas, sum(row.by_kind)
        perms = {perms_text(m.vma) for m in row.mappings}
        canvas.text(_ADDR_X, y, f"{row.start:#x}", "ink mono end")
        canvas.text(_PERMS_X, y, perms.pop() if len(perms) == 1 else "mixed", "ink mono")
        name = _name(row)
        canvas.text(
            _NAME_X, y, clipped(name or "anonymous", _NAME_MAX), "ink name" if name else "dim name"
        )
        canvas.text(_SIZE_X, y, format_bytes(row.size_bytes), "ink end")
        canvas.text(_RSS_X, y, format_bytes(rss) if rss else "-", f"{'ink' if rss else 'dim'} end")
        canvas.text(
            _FAULTS_X, y, f"{n_faults:,}" if n_faults else "-",
            f"{'ink' if n_faults else 'dim'} end",
        )  # fmt: skip

    def _bars(self, row: Row, y: float, width: float) -> None:
        for mark in marks_of(row, _mapped(row), width, self.quantum):
            title = ""
            if len(row.mappings) > 1:
                title = f"{_range(mark)}: {plural(mark.count, 'mapping')}"
            x = _BAR_X + mark.x
            classes = PERMS_CLASSES[mark.main]
            self.canvas.rect(x, y, mark.width, _BAR_HEIGHT, classes, title=title)
            self.canvas.rect(x, y + _BAR_HEIGHT + 1, mark.width, _BAND_HEIGHT, "lane")

    def _bands(self, row: Row, y: float, width: float) -> None:
        for mark in marks_of(row, _resident(row), width, self.quantum):
            title = f"{_range(mark)}: {kinds_text(mark.weights)}"
            is_part = sum(mark.weights) < (mark.end - mark.start) * 0.9
            kind, *stripes = KIND_CLASSES[mark.main].split()
            box = _BAR_X + mark.x, y, mark.width, _BAND_HEIGHT
            self.canvas.rect(*box, f"{kind} part" if is_part else kind, title=title)
            if stripes:
                self.canvas.rect(*box, "stripes", title=title)

    def _ticks(self, row: Row, y: float, width: float) -> None:
        # The more faults, the taller; several kinds share the height.
        for mark in marks_of(row, self._faults_in(row), width, max(self.quantum, 2), 2):
            n_faults = sum(mark.weights)
            unit = min(5 + 1.5 * log2(n_faults), _TICKS_HEIGHT - 2) / n_faults
            tick_width = min(mark.width, _TICK_MOST)
            x = _BAR_X + mark.x + (mark.width - tick_width) / 2
            bottom = y - 1
            self.canvas.begin("ticks", f"{_range(mark)}: {faults_text(mark.weights)}")
            for count, classes in zip(mark.weights, FAULT_CLASSES, strict=True):
                if count:
                    bottom -= count * unit
                    self.canvas.rect(x, bottom, tick_width, count * unit, classes)
            self.canvas.end()


def _by_row(rows: list[Row], places: Iterable[FaultPlace]) -> dict[int | None, list[FaultPlace]]:
    # Both ascend. By the row's id, or None for what is in no row.
    found: dict[int | None, list[FaultPlace]] = {}
    at = 0
    for place in places:
        while at < len(rows) and rows[at].end <= place.start:
            at += 1
        is_inside = at < len(rows) and rows[at].start < place.end
        found.setdefault(id(rows[at]) if is_inside else None, []).append(place)
    return found


def _mapped(row: Row) -> list[tuple[int, int, list[int]]]:
    return [
        (m.start, m.end, _weight(perms_class(m.vma.perms), m.size_bytes, len(PERMS_CLASSES)))
        for m in row.mappings
    ]


def _resident(row: Row) -> list[tuple[int, int, list[int]]]:
    # Neighbours of one kind are one to see, whichever frames they have.
    joined: list[tuple[int, int, int]] = []
    for mapping in row.mappings:
        for piece in mapping.pieces:
            if joined and joined[-1][1] == piece.start and joined[-1][2] == piece.kind:
                joined[-1] = (joined[-1][0], piece.end, piece.kind)
            else:
                joined.append((piece.start, piece.end, piece.kind))
    return [
        (start, end, _weight(kind, end - start, len(KIND_NAMES))) for start, end, kind in joined
    ]


def _weight(kind: int, n_bytes: int, n_kinds: int) -> list[int]:
    weights = [0] * n_kinds
    weights[kind] = n_bytes
    return weights


def _name(row: Row) -> str:
    if len(row.mappings) == 1:
        return row.mappings[0].vma.name
    names = [name for name, _ in groupby(m.vma.name for m in row.mappings) if name]
    what = f": {names[0]}" if names else ""
    return f"{len(row.mappings):,} mappings{what}{' …' if len(set(names)) > 1 else ''}"


def _range(mark: Mark) -> str:
    return f"{mark.start:#x}-{mark.end:#x}"


def _row_title(row: Row, counts: list[int]) -> str:
    first = row.mappings[0]
    what = (
        f"{perms_text(first.vma)} {first.vma.name}".rstrip()
        if len(row.mappings) == 1
        else _name(row)
    )
    return (
        f"{row.start:#x}-{row.end:#x} {what}\n"
        f"{format_bytes(row.size_bytes)} mapped; {kinds_text(row.by_kind)}; {faults_text(counts)}"
    )
