"""An operation's time in a cold state, taken apart: each part is what one more state adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PART_NAMES = {
    "copy": "warm: look-up and copy",
    "linear": "page faults in the linear mapping",
    "mirror": "mirror made resident: mmap, faults",
    "absent": "page allocated",
}
"""Parts, in the order in which they are added."""

_LADDERS = {
    "linear-cold": ["linear-cold"],
    "mirror-cold": ["mirror-cold"],
    "cold": ["linear-cold", "cold"],
    "absent": ["linear-cold", "cold", "absent"],
}


def parts_of(by_state: Mapping[str, float], state: str, *, mirror: bool) -> list[tuple[str, float]]:
    """Take one state's time apart: (part, ns), in the order in which they add up.

    Args:
        by_state: Median ns an operation of one variant, by residency.
        state: Which.
        mirror: Whether this variant goes through the mirror, and so pays for its residency.
    """
    total_ns = by_state[state]
    warm_ns = by_state.get("warm")
    if state == "warm" or warm_ns is None:
        return [("copy", total_ns)]
    parts, before_ns = [("copy", warm_ns)], warm_ns
    for step in _LADDERS.get(state, [state]):
        if step not in by_state or (step == "cold" and not mirror and "linear-cold" in by_state):
            continue
        parts.append((_part_of(step, mirror=mirror), by_state[step] - before_ns))
        before_ns = by_state[step]
    return parts


def _part_of(step: str, *, mirror: bool) -> str:
    if step == "absent":
        return "absent"
    return "mirror" if mirror and step != "linear-cold" else "linear"
