"""From the costs of this host (`kvmmm.bench.costs`) to the numbers of the copies' policy.

Whatever noise leaves open stays as it is by default: a number changes where its reason is beyond
what the same thing measured twice differs by, in this process or in another one.
"""

from __future__ import annotations

import math
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.costs import RELEASED_BYTES, Costs, measure
from kvmmm.bench.runner import pinned
from kvmmm.mm.policy import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmmm.bench.costs import Pair

KIB = 1 << 10
MEASURING_S = 2.5
"""What the pairs may take in all; the rest comes to less than a second."""

RELEASE_SHARE = 0.02
"""Handing over the GIL may cost a copy that much of its time."""
RELEASE_BYTES = 32 * KIB, 1024 * KIB
"""Within these, whatever was measured."""
RUN_PAGES = 4, 512
FACTOR = 2.0
"""Sizes are no better known: from one process to the next a cost differs by as much."""
WORTH = 0.95
"""On average the mirror must be that much quicker,"""
HARM = 1.02
"""and for no size of copies slower than that, beyond doubt."""
MOST_REUSES = 1024
"""More copies than that of the same 2 MiB are not to be counted on."""


class Calibration(NamedTuple):
    """What came of one.

    Attributes:
        costs: What was measured.
        numbers: Of the policy, all of them.
        reasons: Why each is what it is; by name, in words.
        elapsed_ns: How long it took.
    """

    costs: Costs
    numbers: dict[str, int]
    reasons: dict[str, str]
    elapsed_ns: int


def calibrate(seconds: float = MEASURING_S) -> Calibration:
    """Measure this host, on one CPU, and derive a policy.

    Args:
        seconds: About how long it may take.
    """
    start_ns = perf_counter_ns()
    with pinned():
        costs = measure(seconds)
    numbers, reasons = derive(costs)
    return Calibration(costs, numbers, reasons, perf_counter_ns() - start_ns)


def derive(costs: Costs) -> tuple[dict[str, int], dict[str, str]]:
    """Return the numbers of a policy, and the reason for each, in words."""
    found: Mapping[str, tuple[int, str]] = {
        "release_bytes": _release_bytes(costs.release),
        "bounce_max_bytes": _bounce_max_bytes(costs.bounces),
        "mirror_min_run_pages": _run_pages(costs),
        **_mirror(costs),
    }
    numbers = DEFAULTS | {name: number for name, (number, _) in found.items()}
    return numbers, {name: reason for name, (_, reason) in found.items()}


def _release_bytes(pair: Pair) -> tuple[int, str]:
    default = DEFAULTS["release_bytes"]
    if pair.low <= 1:
        return default, "no copy was slower that released the GIL"
    bytes_per_ns = RELEASED_BYTES / pair.a_ns
    cost_ns = -pair.saved_ns
    found = f"releasing the GIL costs {cost_ns:.0f} ns, copies run at {bytes_per_ns:.0f} GB/s"
    least, most = (RELEASED_BYTES * (ratio - 1) / RELEASE_SHARE for ratio in (pair.low, pair.high))
    return _size(default, least, most, RELEASE_BYTES), found


def _bounce_max_bytes(bounces: Mapping[int, Pair]) -> tuple[int, str]:
    # The default, less where that loses, more where more gains.
    default = DEFAULTS["bounce_max_bytes"]
    most = 0
    for n_bytes, pair in sorted(bounces.items()):
        if pair.low > HARM if n_bytes <= default else pair.high >= 1:
            break
        most = n_bytes
    told = ", ".join(f"{n} bytes x{bounces[n].ratio:.2f}" for n in (min(bounces), max(bounces)))
    return most, f"a buffer in between makes a vectored copy of {told}"


def _run_pages(costs: Costs) -> tuple[int, str]:
    # Where the mapping itself is not more than all of its pages.
    default = DEFAULTS["mirror_min_run_pages"]
    if costs.page_ns <= 0 or costs.mmap_ns <= 0:
        return default, "the cost of a mapping was lost in noise"
    pages = costs.mmap_ns / costs.page_ns
    return (
        _size(default, pages, pages, RUN_PAGES),
        f"an mmap costs {costs.mmap_ns / 1e3:.1f} us, as much as {pages:.0f} pages in it",
    )


def _mirror(costs: Costs) -> dict[str, tuple[int, str]]:
    default = DEFAULTS["mirror_reuses"]
    worst = max(costs.gains, key=lambda name: costs.gains[name].low)
    mean = statistics.geometric_mean(pair.ratio for pair in costs.gains.values())
    highest = statistics.geometric_mean(pair.high for pair in costs.gains.values())
    found = (
        f"warm, copies take x{mean:.2f} of their time on average, x{costs.gains[worst].ratio:.2f} "
        f"at worst ({worst}); it is used from x{WORTH} and x{HARM} down"
    )
    reuses = break_even_copies(costs)
    repaid = f"a run costs {costs.run_ns / 1e3:.0f} us, " + (
        "no copy repays it" if reuses is None else f"repaid after {reuses} copies"
    )
    is_worth = costs.gains[worst].low <= HARM and highest <= WORTH
    if not is_worth or reuses is None or reuses > MOST_REUSES:
        return {"mirror": (0, found), "mirror_reuses": (default, repaid)}
    return {"mirror": (1, found), "mirror_reuses": (reuses, repaid)}


def break_even_copies(costs: Costs) -> int | None:
    """Return how many copies of a run repay its way into the mirror; None: none saves anything."""
    saved_ns = statistics.median(pair.saved_ns for pair in costs.gains.values())
    return max(math.ceil(costs.run_ns / saved_ns), 1) if saved_ns > 0 else None


def _size(default: int, least: float, most: float, within: tuple[int, int]) -> int:
    # The power of two below what lies in [least, most]; the default where it might be that.
    if least / FACTOR <= default <= most * FACTOR:
        return default
    middle = math.sqrt(max(least, 1.0) * max(most, 1.0))
    return max(within[0], min(within[1], 1 << int(math.log2(middle))))
