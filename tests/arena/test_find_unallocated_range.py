"""Where a new range goes among those in use: gVisor's TestFindUnallocatedRange, at first fit.

One case has another answer here: what has no reference any more is punched at once, not kept for
later reclaiming, so its place is free.
"""

from __future__ import annotations

import pytest

from kvmmm.arena import Arena
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
HUGE = 2 << 20


@pytest.mark.parametrize(
    ("used", "length", "align", "start"),
    [
        # (start, end, references) of what is in use.
        ([], PAGE, PAGE, 0),
        ([(PAGE, 2 * PAGE, 1)], PAGE, PAGE, 0),
        ([(0, PAGE, 1), (PAGE, 2 * PAGE, 2)], PAGE, PAGE, 2 * PAGE),
        ([(0, PAGE, 1), (PAGE, 2 * PAGE, 0), (2 * PAGE, 3 * PAGE, 1)], PAGE, PAGE, PAGE),
        ([(0, PAGE, 1), (PAGE, 2 * PAGE, 0), (2 * PAGE, 3 * PAGE, 1)], 2 * PAGE, PAGE, 3 * PAGE),
        ([(0, PAGE, 1), (2 * PAGE, 3 * PAGE, 1)], PAGE, PAGE, PAGE),
        ([(0, PAGE, 1), (2 * PAGE, 3 * PAGE, 1)], 2 * PAGE, PAGE, 3 * PAGE),
        ([(0, PAGE, 1), (HUGE + PAGE, HUGE + 2 * PAGE, 1)], HUGE, HUGE, 2 * HUGE),
    ],
    ids=[
        "empty", "none at the beginning", "different references", "no reference",
        "no reference, and too small", "a gap", "a gap that is too small", "a gap out of alignment",
    ],
)  # fmt: skip
def test_find_unallocated_range(
    used: list[tuple[int, int, int]], length: int, align: int, start: int
):
    with Arena(8 << 20) as arena:
        for first, end, n_references in used:
            fr = arena.allocate(end - first, at=first)
            for _ in range(n_references - 1):
                arena.inc_ref(fr)
            if not n_references:
                arena.dec_ref(fr)
        found = arena.allocate(length, align_bytes=align)
        assert found == FileRange(start, start + length)
