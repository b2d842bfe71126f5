"""What is left of a sweep that was interrupted, or whose processes died.

A process that was cut off goes on as another one: its rounds that are missing, with a new number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.plan import Plan
    from kvmmm.bench.crossover.record import Results


class Slot(NamedTuple):
    """One process that is still to run.

    Attributes:
        rounds: Numbers of its rounds.
        continues: The process that it stands for; None, none.
    """

    rounds: Sequence[int]
    continues: int | None


def slots_left(plan: Plan, old: Results | None) -> tuple[list[Slot], int, float]:
    """Return the processes to run, the next one's number, seconds used up.

    Args:
        plan: All that was to be done.
        old: What was; None, nothing.
    """
    every = range(plan.rounds)
    if old is None:
        return [Slot(every, None)] * plan.n_processes, 0, 0.0
    ended = {line["process"]: line for line in old.others if line["kind"] == "process"}
    seen = {sample.process for sample in old.samples} | set(ended)
    continued = {line["continues"] for line in ended.values()}
    slots = []
    n_done = 0
    for process in sorted(seen):
        if process in ended and ended[process]["complete"]:
            n_done += 1
        elif process not in continued:
            left = (
                ended[process]["rounds_left"]
                if process in ended
                else _rounds_left(plan, old, process)
            )
            slots.append(Slot(left, process))
    slots += [Slot(every, None)] * max(plan.n_processes - n_done - len(slots), 0)
    used_s = old.footer.seconds if old.footer else sum(line["seconds"] for line in ended.values())
    return slots, max(seen, default=-1) + 1, float(used_s)


def _rounds_left(plan: Plan, old: Results, process: int) -> list[int]:
    # Of one that could not say it any more. A round that was cut off is not done again: it would
    # be there twice.
    begun = {sample.round for sample in old.samples if sample.process == process}
    return [number for number in range(plan.rounds) if number not in begun]
