"""How an address space is laid out in a picture: which mappings have a row, and where in it.

A row shows a stretch of addresses to scale. Few mappings get a row each. Many are put together,
neighbours of like sizes first: so a thousand small ones are a row of small bars, and what is large
or lies apart still stands alone.
"""

from __future__ import annotations

from itertools import pairwise
from math import log2
from typing import TYPE_CHECKING

from kvmmm.hostarch.addr import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmmm.mm.sight import SeenMapping

    Weighted = tuple[int, int, Sequence[int]]
    """(start, end, weights): what to draw at those addresses, and how much of each kind."""

MOST_ROWS = 24
_LEAST_SCORE = 3
_MOST_SCORE = 53  # a page beside all of the address space, differently named
_FEW = 32


class Row:
    """Mappings that are drawn side by side, to one scale.

    Attributes:
        start: Guest address at the left.
        end: At the right.
        mappings: At least one.
    """

    __slots__ = ("end", "mappings", "start")

    def __init__(self, mappings: list[SeenMapping]) -> None:
        self.mappings = mappings
        self.start = mappings[0].start
        self.end = mappings[-1].end

    @property
    def span_bytes(self) -> int:
        """How much it shows, holes included."""
        return self.end - self.start

    @property
    def size_bytes(self) -> int:
        """How much of that is mapped."""
        return sum(mapping.size_bytes for mapping in self.mappings)

    @property
    def by_kind(self) -> list[int]:
        """How much of that is resident, by kind."""
        return [sum(kinds) for kinds in zip(*(m.by_kind for m in self.mappings), strict=True)]


def rows_of(mappings: Sequence[SeenMapping], most: int = MOST_ROWS) -> list[Row]:
    """Return the mappings in rows, about `most` or fewer."""
    if len(mappings) <= most:
        return [Row([mapping]) for mapping in mappings]
    scores = [_score(left, right) for left, right in pairwise(mappings)]
    least = _LEAST_SCORE
    while least < _MOST_SCORE and sum(score >= least for score in scores) >= most:
        least += 1
    groups = [[mappings[0]]]
    for score, mapping in zip(scores, mappings[1:], strict=True):
        if score >= least:
            groups.append([])
        groups[-1].append(mapping)
    while len(groups) < most:
        at = max(range(len(groups)), key=lambda i: len(groups[i]))
        group = groups[at]
        if len(group) <= _FEW:
            break
        groups[at : at + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return [Row(group) for group in groups]


def _score(left: SeenMapping, right: SeenMapping) -> float:
    # How ill two neighbours go together: by how much one would dwarf the other, or the hole both.
    sizes = left.size_bytes, right.size_bytes
    return log2(max(*sizes, right.start - left.end) / min(sizes)) + 3 * (
        left.vma.name != right.vma.name
    )


def width_of(span_bytes: int, longest_bytes: int, least: float, most: float) -> float:
    """Return how wide a row is drawn: by the logarithm of its length."""
    if longest_bytes <= PAGE_BYTES:
        return least
    share = log2(max(span_bytes, PAGE_BYTES) / PAGE_BYTES) / log2(longest_bytes / PAGE_BYTES)
    return least + (most - least) * share


class Mark:
    """Something drawn in a row: one thing, or several that lie too close to be told apart.

    Attributes:
        x: Where, in pixels from the row's left.
        width: How wide.
        start: Guest address of the first.
        end: One past the last one's last byte.
        weights: How much of each kind, together.
        count: How many there are.
    """

    __slots__ = ("count", "end", "start", "weights", "width", "x")

    def __init__(self, x: float, width: float, piece: Weighted) -> None:
        self.x = x
        self.width = width
        self.start, self.end = piece[0], piece[1]
        self.weights = list(piece[2])
        self.count = 1

    @property
    def main(self) -> int:
        """The kind of which there is most."""
        return max(range(len(self.weights)), key=self.weights.__getitem__)


def marks_of(
    row: Row, pieces: Iterable[Weighted], width: float, quantum: float, least: float = 1.5
) -> list[Mark]:
    """Return where to draw pieces.

    Args:
        row: Where they lie; those outside are left out, and what reaches out of it is cut.
        pieces: Ascending and disjoint.
        width: The row's, in pixels.
        quantum: Pieces that are narrower are united with others in the same `quantum` pixels.
        least: No mark is narrower.
    """
    marks: list[Mark] = []
    scale = width / row.span_bytes
    is_narrow = False  # the last one
    for start, end, weights in pieces:
        if end <= row.start or row.end <= start:
            continue
        x = (max(start, row.start) - row.start) * scale
        x_end = (min(end, row.end) - row.start) * scale
        last = marks[-1] if marks else None
        was_narrow, is_narrow = is_narrow, x_end - x < quantum
        if last is not None and was_narrow and is_narrow and x_end <= last.x + max(quantum, least):
            last.end = end
            last.width = max(last.width, x_end - last.x)
            last.weights = [sum(both) for both in zip(last.weights, weights, strict=True)]
            last.count += 1
            continue
        x = min(x, width - least)
        marks.append(Mark(x, max(x_end - x, least), (start, end, weights)))
    return marks
