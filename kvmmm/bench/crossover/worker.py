"""A process of the sweep: `python -m kvmmm.bench.crossover.worker`; stdin: a job, stdout: lines.

Lines are those of the results' file, and a last one that says how it ended. A process is one
layout of everything in physical memory and one draw of its addresses: an interval that comes from a
single one is too narrow.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, Self, cast

from kvmmm.bench.crossover.calls import Calls, FreshCalls
from kvmmm.bench.crossover.ground import Fresh, Ground
from kvmmm.bench.crossover.plan import ABSENT, PYTHON, due
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.pool import Pool
from kvmmm.bench.crossover.probes import REFERENCES, Buffers, Probe, spoiled
from kvmmm.bench.crossover.record import Cell
from kvmmm.bench.crossover.states import Pagemap, State
from kvmmm.bench.runner import pinned
from kvmmm.errors import KvmmmError
from kvmmm.safemem.ffi import lib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CANARY_ADDS = 40_000
_ERRORS_MOST = 3
_SPOILED_MOST = 20
_REFERENCES_EVERY = 4
_STEAL = 8
"""Field of a cpu line in /proc/stat, proc(5)."""


class Job(NamedTuple):
    """What a process is to do.

    Attributes:
        process: Its number.
        cells: What is measured.
        rounds: Numbers of the rounds.
        deadline_s: When it ends at the latest, as time.monotonic() says it (of the whole host).
        seed: Of all random choices, together with `process`.
        planted: See there.
    """

    process: int
    cells: Sequence[Cell]
    rounds: Sequence[int]
    deadline_s: float
    seed: int
    planted: Planted | None

    def as_json(self) -> str:
        """Return it for stdin."""
        planted = self.planted.as_json() if self.planted else None
        fields = self._replace(rounds=list(self.rounds), planted=None)._asdict()
        return json.dumps(fields | {"planted": planted})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Take it from stdin."""
        fields = json.loads(text)
        fields["cells"] = [Cell(*cell) for cell in fields["cells"]]
        fields["planted"] = Planted.from_json(fields["planted"]) if fields["planted"] else None
        return cls(**fields)


class Probing(Protocol):
    """What measures one cell."""

    @property
    def variants(self) -> list[str]:
        """What a round measures."""

    def sample(self, variant: str, shared_seed: int, own_seed: int) -> float:
        """Return ns an operation."""


class Measurable(Protocol):
    """What a process measures."""

    def probe(self, cell: Cell, planted: Planted | None) -> Probing:
        """Return what measures a cell."""


class Memory:
    """All memory of the process, made when it is first needed.

    Args:
        cells: Everything that will be measured.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._pools: dict[int, Pool] = {}
        self._grounds: dict[tuple[int, str, str], Ground] = {}
        self._states: dict[tuple[int, str, str, str], State] = {}
        self._fresh: Fresh | None = None
        self._pagemap = Pagemap()
        self._buffers = Buffers(max(cell.bytes for cell in cells))

    def probe(self, cell: Cell, planted: Planted | None) -> Probing:
        """Return what measures a cell.

        Raises:
            GroundError: The host does not offer what it needs.
        """
        if cell.residency == ABSENT:
            self._fresh = self._fresh or Fresh()
            return FreshCalls(cell, self._fresh, self._buffers)
        key = cell.page_bytes, cell.layout, cell.order
        if key not in self._grounds:
            if cell.page_bytes not in self._pools:
                self._pools[cell.page_bytes] = Pool(cell.page_bytes)
            self._grounds[key] = Ground(self._pools[cell.page_bytes], cell.layout, cell.order)
        ground = self._grounds[key]
        state = self._states.get((*key, cell.residency))
        if state is None:
            state = self._states[*key, cell.residency] = State(
                ground, cell.residency, self._pagemap
            )
        if cell.caller == PYTHON:
            return Calls(cell, ground, state, self._buffers)
        return Probe(cell, ground, state, self._buffers, planted)

    def close(self) -> None:
        """Give everything back."""
        for ground in self._grounds.values():
            ground.close()
        for pool in self._pools.values():
            pool.close()
        if self._fresh is not None:
            self._fresh.close()
        self._pagemap.close()


class Rounds:
    """The rounds of one process.

    Args:
        job: What to do.
        out: Where lines go.
        memory: What is measured; made for the cells of the job.
    """

    def __init__(self, job: Job, out: IO[str], memory: Measurable) -> None:
        self._job = job
        self._memory = memory
        self._out = out
        self._random = random.Random(f"{job.seed}/{job.process}")
        self._probes: dict[str, Probing] = {}
        self._n_errors: dict[str, int] = {}

    def run(self, cpu: int) -> None:
        """Measure until all rounds are done, or the time is over."""
        job = self._job
        for cell in job.cells:
            self._open(cell)
        self._write("ready", process=job.process)
        steal = _steal_ticks(cpu)
        for number in job.rounds:
            if not self._round(number):
                break
            now = _steal_ticks(cpu)
            self._write(
                "canary", process=job.process, round=number, ghz=_ghz(), steal_ticks=now - steal
            )
            steal = now
            gc.collect(0)
        self._write("ended", process=job.process, spoiled=dict(spoiled.most_common(_SPOILED_MOST)))

    def _open(self, cell: Cell) -> None:
        if time.monotonic() > self._job.deadline_s:
            return
        try:
            self._probes[cell.id] = self._memory.probe(cell, self._job.planted)
        except (KvmmmError, OSError) as e:
            self._complain(cell, -1, e)

    def _round(self, number: int) -> bool:
        # Whether all of it was measured.
        cells = [cell for cell in due(self._job.cells, number) if cell.id in self._probes]
        self._random.shuffle(cells)
        for cell in cells:
            if time.monotonic() > self._job.deadline_s:
                return False
            self._measure(cell, number)
        return True

    def _measure(self, cell: Cell, number: int) -> None:
        probe = self._probes[cell.id]
        # What others do is looked at now and then: it decides nothing.
        is_complete = number % _REFERENCES_EVERY == 0
        variants = [v for v in probe.variants if is_complete or v not in REFERENCES]
        self._random.shuffle(variants)
        shared_seed = self._random.getrandbits(62)
        ns: dict[str, float] = {}
        try:
            for variant in variants:
                ns[variant] = float(
                    f"{probe.sample(variant, shared_seed, self._random.getrandbits(62)):.6g}"
                )
        except (KvmmmError, OSError) as e:
            # A variant that cannot be measured is no variant that takes no time: all of the round.
            self._complain(cell, number, e)
            return
        self._write("sample", cell=cell.id, process=self._job.process, round=number, ns=ns)

    def _complain(self, cell: Cell, number: int, error: Exception) -> None:
        n = self._n_errors[cell.id] = self._n_errors.get(cell.id, 0) + 1
        if n >= _ERRORS_MOST:
            self._probes.pop(cell.id, None)
        self._write("error", cell=cell.id, process=self._job.process, round=number, why=str(error))

    def _write(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - any JSON values
        self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._out.flush()


def _ghz() -> float:
    ns = min(cast("Any", lib).kvmmm_cross_canary(_CANARY_ADDS) for _ in range(3))
    return float(f"{_CANARY_ADDS / ns:.4g}")


def _steal_ticks(cpu: int) -> int:
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[0] == f"cpu{cpu}" and len(fields) > _STEAL:
            return int(fields[_STEAL])
    return 0


def work(memory_for: Callable[[Sequence[Cell]], Measurable]) -> NoReturn:
    """Do the job on stdin.

    Args:
        memory_for: Makes what is measured, of the job's cells.
    """
    job = Job.from_json(sys.stdin.read())
    # What prints must not come between the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with pinned() as cpu:
        gc.collect()
        gc.freeze()
        gc.disable()
        Rounds(job, out, memory_for(job.cells)).run(cpu)
    out.close()
    # All memory, and guests, go with the process, in less time than piece by piece.
    os._exit(0)


if __name__ == "__main__":
    work(Memory)
