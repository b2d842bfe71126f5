"""Every operation by its name, and how a step is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.copies import operations, streams, strings, vectors, words
from tests.copies.layouts import a_change
from tests.copies.world import Step

if TYPE_CHECKING:
    from tests.copies.draw import Draw
    from tests.copies.operations import Operation

CHANGE_SHARE = 0.04
IGNORE_SHARE = 0.15
MECHANISMS = (None, None, "internal", "walk", "mirror")
OPERATIONS: dict[str, type[Operation]] = {
    "copy_in": operations.BytesIn,
    "read": operations.Read,
    "copy_out": operations.BytesOut,
    "zero_out": operations.ZeroOut,
    "swap": words.Swap,
    "compare_and_swap": words.CompareAndSwap,
    "load": words.Load,
    "read_string": strings.ReadString,
    "copy_in_vec": vectors.CopyInVec,
    "copy_out_vec": vectors.CopyOutVec,
    "copy_in_many": vectors.CopyInMany,
    "copy_out_many": vectors.CopyOutMany,
    "copy_out_from": streams.CopyOutFrom,
    "copy_in_to": streams.CopyInTo,
}
_WEIGHTS = {name: one.weight for name, one in OPERATIONS.items()}


def a_copy(d: Draw, *, ignore: bool | None = None) -> Step:
    """Any operation of any member."""
    name = d.weighted(_WEIGHTS)
    who = d.who()
    arguments = OPERATIONS[name].draw(d, who)
    ignore = d.chance(IGNORE_SHARE) if ignore is None else ignore
    return Step(name, {"who": who, "ignore": ignore, **arguments}, d.pick(MECHANISMS))


def a_step(d: Draw) -> Step:
    """A copy, or seldom a change."""
    return a_change(d) if d.chance(CHANGE_SHARE) else a_copy(d)
