"""Pictures of address spaces: what is mapped, what is resident and whose, and where faults fell.

    svg = picture.draw(vm.mm, title="my guest")

For where faults fell, have them logged before the guest runs: `vm.mm.fault_log = FaultLog()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.units import format_bytes
from kvmmm.mm.sight import KIND_NAMES, look
from kvmmm.vmm.picture_canvas import LEFT, RIGHT, Canvas
from kvmmm.vmm.picture_space import SpacePainter
from kvmmm.vmm.picture_words import (
    FAULT_CLASSES,
    FAULT_NAMES,
    KIND_CLASSES,
    PERMS_CLASSES,
    PERMS_NAMES,
    Caption,
    Drawn,
    clipped,
    plural,
    sums_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.mm import MemoryManager
    from kvmmm.mm.sight import Sight

_GAUGE_HEIGHT = 16
_TITLE_MAX = _OUTCOME_MAX = 56


def draw(mm: MemoryManager, title: str = "address space") -> str:
    """Return a picture of one address space as it is now, as SVG; the guest may run."""
    return draw_all([Drawn("", look(mm))], Caption(title))


def draw_all(spaces: Sequence[Drawn], caption: Caption) -> str:
    """Return a picture of several address spaces, one below the other, as SVG.

    The text is a whole document without references to anything outside; viewers that know dark
    colour schemes show it in theirs.
    """
    canvas = Canvas()
    y = _caption(canvas, caption)
    for drawn in spaces:
        y = _sums(canvas, drawn, y + 26)
        y = SpacePainter(canvas, drawn).draw(y)
    return canvas.svg(y + 20, caption.title)


def _caption(canvas: Canvas, caption: Caption) -> float:
    canvas.text(LEFT, 38, clipped(caption.title, _TITLE_MAX), "ink big")
    if caption.outcome:
        outcome = clipped(caption.outcome, _OUTCOME_MAX)
        width = 7 * len(outcome) + 24
        good = "good" if caption.is_good else "bad"
        canvas.rect(RIGHT - width, 20, width, 24, good, radius=12)
        canvas.text(RIGHT - width / 2, 36, outcome, "pill middle")
    if caption.subtitle:
        canvas.text(LEFT, 58, caption.subtitle, "dim")
        return 60
    return 42


def _sums(canvas: Canvas, drawn: Drawn, y: float) -> float:
    if drawn.label:
        canvas.text(LEFT, y, drawn.label, "ink head")
        y += 19
    canvas.text(LEFT, y, "  ·  ".join(sums_of(drawn.sight)), "ink")
    y += 9
    _gauge(canvas, drawn.sight, y)
    return _legend(canvas, drawn.sight, y + _GAUGE_HEIGHT) + 26


def _gauge(canvas: Canvas, sight: Sight, y: float) -> None:
    # How much of what is mapped is resident, and whose.
    width = RIGHT - LEFT
    canvas.rect(LEFT, y, width, _GAUGE_HEIGHT, "lane", title="mapped, and not resident")
    x = float(LEFT)
    for name, class_, n_bytes in zip(KIND_NAMES, KIND_CLASSES, sight.by_kind, strict=True):
        if n_bytes:
            part = max(width * n_bytes / sight.usage_bytes, 1.5)
            title = f"{format_bytes(n_bytes)} {name}"
            for each in class_.split():
                canvas.rect(x, y, part, _GAUGE_HEIGHT, each, title=title)
            x += part


def _legend(canvas: Canvas, sight: Sight, y: float) -> float:
    # What colours mean, with the sums of each.
    kinds = [
        (class_, f"{name} {format_bytes(n_bytes)}")
        for name, class_, n_bytes in zip(KIND_NAMES, KIND_CLASSES, sight.by_kind, strict=True)
    ]
    absent = sight.usage_bytes - sum(sight.by_kind)
    counters = sight.counters
    counts = counters.reads, counters.writes, counters.executes
    ticks = [
        (class_, plural(n, name))
        for name, class_, n in zip(FAULT_NAMES, FAULT_CLASSES, counts, strict=True)
    ]
    _entries(canvas, "resident", [*kinds, ("lane", f"not resident {format_bytes(absent)}")], y + 18)
    x = _entries(canvas, "mapped", list(zip(PERMS_CLASSES, PERMS_NAMES, strict=True)), y + 36)
    _entries(canvas, "faults", ticks, y + 36, x + 20, swatch=3)
    return y + 36


def _entries(
    canvas: Canvas, heading: str, entries: Sequence[tuple[str, str]], y: float, x: float = LEFT,
    *, swatch: int = 14,
) -> float:  # fmt: skip
    canvas.text(x, y, heading, "dim small")
    x += 60
    for class_, text in entries:
        for each in class_.split():
            canvas.rect(x, y - 9, swatch, 10, each)
        canvas.text(x + swatch + 5, y, text, "ink small")
        x += swatch + 5 + 6.3 * len(text) + 14
    return x
