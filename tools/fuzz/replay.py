"""Seeing a finding again, with as few cases before it as will do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .watch import Finding, Watch

_TRIES = 5
"""Threads interleave differently each time."""


def replay(watch: Watch, seed: int, n_cases: int, seconds: float) -> Finding | None:
    """Run one epoch until it fails, then leave out as many cases at its beginning as can be.

    Args:
        watch: Runs it.
        seed: The epoch's.
        n_cases: How many cases it has.
        seconds: For all of it.

    Returns:
        What was found, with the fewest cases; None if nothing was.
    """
    end = time.monotonic() + seconds
    found = None
    for _ in range(_TRIES):
        found, _ = watch.child(seed, 1, end)
        if found is not None or time.monotonic() > end:
            break
    if found is None:
        return None
    # How many can be left out: the search is for the largest number that still fails.
    low, high = 0, n_cases
    while high - low > 1 and time.monotonic() < end:
        middle = (low + high) // 2
        again = _try(watch, seed, middle, found.kind, end)
        if again is None:
            high = middle
        else:
            low, found = middle, again
    if low:
        found.text += f"\nit takes the cases from {low} on (--first {low})"
    return found


def _try(watch: Watch, seed: int, first: int, kind: str, end: float) -> Finding | None:
    for _ in range(2):
        again, _ = watch.child(seed, 1, end, ("--first", str(first)))
        if again is not None and again.kind == kind:
            return again
    return None
