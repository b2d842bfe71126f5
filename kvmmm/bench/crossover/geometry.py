"""Layouts: how guest memory is cut into segments, and where in the arena each of them lies.

    contiguous    256 MiB in N segments, in reverse order: each one piece, no two of them adjacent
    scattered     N single pages, anywhere

Neighbours in the guest are never neighbours in the arena, or they would be merged. Where frames are
2 MiB pages, segments that are longer are multiples of that: so the mirror may have such pages, too.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

SPAN_BYTES = 256 << 20
START = 4 << 20
"""Where guest memory begins: the lowest address of an ordinary program."""
WORD_BYTES = 4
SCATTERED = "scattered"


class Geometry(NamedTuple):
    """Segments of equal length, side by side from START on.

    Attributes:
        segment_bytes: Of each.
        order: For each segment which piece of the arena's frames it is.
    """

    segment_bytes: int
    order: tuple[int, ...]

    @property
    def length_bytes(self) -> int:
        """All of it."""
        return self.segment_bytes * len(self.order)

    @property
    def page_order(self) -> list[int] | None:
        """For each page which frame it is; None, one after the other."""
        if len(self.order) == 1:
            return None
        n_pages = self.segment_bytes // PAGE_BYTES
        return [piece * n_pages + page for piece in self.order for page in range(n_pages)]


def _segment_bytes(layout: str, order: str, page_bytes: int) -> int:
    if order == SCATTERED:
        return PAGE_BYTES
    each = SPAN_BYTES // int(layout)
    return each - each % (HUGE_PAGE_BYTES if each >= HUGE_PAGE_BYTES == page_bytes else PAGE_BYTES)


def length_bytes(layout: str, order: str, page_bytes: int = PAGE_BYTES) -> int:
    """Return how much guest memory a layout has."""
    return int(layout) * _segment_bytes(layout, order, page_bytes)


def most_bytes(layout: str, order: str, page_bytes: int = PAGE_BYTES) -> int:
    """Return the largest copy that leaves a choice of places."""
    return length_bytes(layout, order, page_bytes) // 4


def geometry_of(layout: str, order: str, page_bytes: int = PAGE_BYTES) -> Geometry:
    """Return the segments of a layout; the same in every process."""
    n = int(layout)
    pieces = list(range(n))
    if order != SCATTERED:
        pieces.reverse()
        return Geometry(_segment_bytes(layout, order, page_bytes), tuple(pieces))
    random.Random(n).shuffle(pieces)
    for at in range(1, n):
        if pieces[at] == pieces[at - 1] + 1:
            # Whatever is put in its place ends both neighbourhoods, or is looked at in its turn.
            other = (at + n // 2) % n
            pieces[at], pieces[other] = pieces[other], pieces[at]
    if any(b == a + 1 for a, b in pairwise(pieces)):
        return Geometry(PAGE_BYTES, tuple(reversed(range(n))))
    return Geometry(PAGE_BYTES, tuple(pieces))
