"""From the costs of this host (`kvmmm.bench.costs`) to the numbers of the copies' policy.

Whatever noise leaves open stays as it is by default: a number changes where its reason is beyond
what the same thing measured twice differs by.
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
WORTH = 0.95
"""On average the mirror must be that much quicker,"""
HARM = 1.02
"""and for no size of copies slower than that."""
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
    release_ns = -pair.saved_ns
    bytes_per_ns = RELEASED_BYTES / pair.a_ns
    exact_bytes = release_ns / RELEASE_SHARE * bytes_per_ns
    return (
        _power_of_two(exact_bytes, *RELEASE_BYTES),
        f"releasing the GIL costs {release_ns:.0f} ns, and copies run at {bytes_per_ns:.0f} GB/s",
    )


def _bounce_max_bytes(bounces: Mapping[int, Pair]) -> tuple[int, str]:
    most = 0
    for n_bytes, pair in sorted(bounces.items()):
        if pair.high >= 1:
            break
        most = n_bytes
    smallest = bounces[min(bounces)]
    return most, f"a buffer makes a vectored copy of {min(bounces)} bytes x{smallest.ratio:.2f}"


def _run_pages(costs: Costs) -> tuple[int, str]:
    # Where the mapping itself is not more than all of its pages.
    default = DEFAULTS["mirror_min_run_pages"]
    if costs.page_ns <= 0 or costs.mmap_ns <= 0:
        return default, "the cost of a mapping was lost in noise"
    pages = costs.mmap_ns / costs.page_ns
    return (
        _power_of_two(pages, *RUN_PAGES),
        f"an mmap costs {costs.mmap_ns / 1e3:.1f} us, a page in it {costs.page_ns:.0f} ns",
    )


def _mirror(costs: Costs) -> dict[str, tuple[int, str]]:
    default = DEFAULTS["mirror_reuses"]
    worst = max(costs.gains, key=lambda name: costs.gains[name].low)
    mean = statistics.geometric_mean(pair.ratio for pair in costs.gains.values())
    found = f"warm, it makes copies x{mean:.2f} on average, x{costs.gains[worst].ratio:.2f} {worst}"
    saved_ns = statistics.median(pair.saved_ns for pair in costs.gains.values())
    if costs.gains[worst].low > HARM or mean > WORTH or saved_ns <= 0:
        return {"mirror": (0, found), "mirror_reuses": (default, "the mirror is off")}
    reuses = math.ceil(costs.run_ns / saved_ns)
    repaid = f"a run costs {costs.run_ns / 1e3:.0f} us, a copy saves {saved_ns:.0f} ns"
    if reuses > MOST_REUSES:
        return {
            "mirror": (0, f"{found}, but is repaid after {reuses} copies only"),
            "mirror_reuses": (default, repaid),
        }
    return {"mirror": (1, found), "mirror_reuses": (max(reuses, 1), repaid)}


def _power_of_two(value: float, least: int, most: int) -> int:
    # The one below: these numbers are no better known than that.
    return max(least, min(most, 1 << int(math.log2(max(value, 1)))))
