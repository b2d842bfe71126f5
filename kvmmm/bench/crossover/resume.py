"""What is left of a sweep that was interrupted, or whose processes died.

A process that was cut off goes on as another one: its rounds that are missing, with a new number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.plan import parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.plan import Plan
    from kvmmm.bench.crossover.record import Cell, Results


class Slot(NamedTuple):
    """One process that is still to run.

    Attributes:
        rounds: Numbers of its rounds.
        continues: The process that it stands for; None, none.
        part: Of `plan.parts_of`, which one.
    """

    rounds: Sequence[int]
    continues: int | None
    part: int = 0


def slots_left(plan: Plan, old: Results | None) -> tuple[list[Slot], int, float]:
    """Return the processes to run, the next one's number, seconds used up.

    Args:
        plan: All that was to be done.
        old: What was; None, nothing.
    """
    every = range(plan.rounds)
    parts = parts_of(plan.cells)
    if old is None:
        all_parts = range(len(parts))
        return [Slot(every, None, i) for _ in range(plan.n_processes) for i in all_parts], 0, 0.0
    ended = {line["process"]: line for line in old.others if line["kind"] == "process"}
    part_of = _parts_of_processes(parts, old) | {
        process: line["part"] for process, line in ended.items() if "part" in line
    }
    seen = {sample.process for sample in old.samples} | set(ended)
    continued = {line["continues"] for line in ended.values()}
    slots = []
    n_missing = [plan.n_processes] * len(parts)
    for process in sorted(seen):
        part = part_of.get(process, 0)
        if process in ended and ended[process]["complete"]:
            n_missing[part] -= 1
        elif process not in continued:
            left = (
                ended[process]["rounds_left"]
                if process in ended
                else _rounds_left(plan, old, process)
            )
            slots.append(Slot(left, process, part))
            n_missing[part] -= 1
    slots += [Slot(every, None, part) for part, n in enumerate(n_missing) for _ in range(n)]
    # Who was killed has written no footer; there may be one of the time before.
    used_s = sum(line["seconds"] for line in ended.values())
    used_s = max(used_s, old.footer.seconds if old.footer else 0.0)
    return slots, max(seen, default=-1) + 1, float(used_s)


def _parts_of_processes(parts: Sequence[Sequence[Cell]], old: Results) -> dict[int, int]:
    # By what they have measured.
    part_of_cell = {cell.id: i for i, part in enumerate(parts) for cell in part}
    return {sample.process: part_of_cell[sample.cell] for sample in old.samples}


def _rounds_left(plan: Plan, old: Results, process: int) -> list[int]:
    # Of one that could not say it any more. A round that was cut off is not done again: it would
    # be there twice.
    begun = {sample.round for sample in old.samples if sample.process == process}
    return [number for number in range(plan.rounds) if number not in begun]
