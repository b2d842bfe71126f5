"""The sweep: processes one after the other, what they measure goes into one file.

    plan ──► jobs ──► worker ──► lines ──► results.jsonl
                        └─ dies, hangs, is late: ended, told, the next one starts

What is written is kept, whatever comes: Ctrl-C ends the process at work and the file says that it
is not complete. Who goes on later does the rounds that are missing, in new processes: a process
that was interrupted cannot be put together again.
"""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmmm.bench.crossover import facts
from kvmmm.bench.crossover.plan import due
from kvmmm.bench.crossover.process import COMMAND, Worker, WorkerError
from kvmmm.bench.crossover.record import (
    FILE_NAME,
    Canary,
    Footer,
    Header,
    Sample,
    Writer,
    read_results,
)
from kvmmm.bench.crossover.resume import slots_left
from kvmmm.bench.crossover.worker import Job
from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvmmm.bench.crossover.plan import Plan
    from kvmmm.bench.crossover.planted import Planted
    from kvmmm.bench.crossover.record import Results
    from kvmmm.bench.crossover.resume import Slot

    Progress = Callable[[float, float | None, str], object]
    """Called with the fraction done, seconds left (None: not known yet), what is going on."""

_LEAST_S = 1.0
_UNBOUNDED_S = 7 * 86400.0
_SEED_BITS = 32


class SweepError(KvmmmError, RuntimeError):
    """A sweep cannot begin, or not go on.

    Attributes:
        why: Why.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)


class Outcome(NamedTuple):
    """How a sweep ended.

    Attributes:
        complete: Whether every process did what it was to do.
        interrupted: Whether somebody pressed Ctrl-C.
        seconds: How long it took, earlier attempts included.
        n_samples: Rounds of cells written this time.
        errors: What went wrong, each once.
    """

    complete: bool
    interrupted: bool
    seconds: float
    n_samples: int
    errors: Sequence[str]


def run(
    plan: Plan, folder: Path, *, seed: int | None = None, resume: bool = False,
    planted: Planted | None = None, progress: Progress | None = None,
    host: Mapping[str, Any] | None = None, command: Sequence[str] = COMMAND,
) -> Outcome:  # fmt: skip
    """Measure all that a plan says, into `folder`/results.jsonl.

    Ctrl-C does not come out of here: the outcome says it.

    Args:
        plan: What to measure.
        folder: Where; made if need be.
        seed: Of all random choices; None, any.
        resume: Go on with what is there, if there is something.
        planted: Costs added for a test.
        progress: See there.
        host: What the header says about the host; None, what `facts` finds.
        command: What a worker is; another one for tests.

    Raises:
        SweepError: There are results already, or those there are of another plan.
        ResultsError: Those there are malformed.
        OSError: The folder cannot be written.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    old = read_results(path) if path.exists() else None
    if old is not None:
        _check_resumable(plan, old, path, resume=resume)
    with Writer(path, append=old is not None) as writer:
        if old is None:
            seed = random.getrandbits(_SEED_BITS) if seed is None else seed
            _write_beginning(writer, plan, seed, host, planted)
        else:
            seed = old.header.seed
        sweep = _Sweep(plan, writer, seed, planted, progress, old, command, started)
        return sweep.run()


def _check_resumable(plan: Plan, old: Results, path: Path, *, resume: bool) -> None:
    if not resume:
        raise SweepError(f"{path} is there already: --resume goes on with it, --out takes another")
    if old.header.mode != plan.mode or list(old.cells.values()) != list(plan.cells):
        raise SweepError(f"{path} is of a sweep of other cells (--{old.header.mode})")


def _write_beginning(
    writer: Writer, plan: Plan, seed: int, host: Mapping[str, Any] | None, planted: Planted | None
) -> None:
    writer.write(
        Header(
            kvmmm=_version(), commit=facts.commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"), mode=plan.mode, seed=seed,
            host=facts.host_facts() if host is None else host,
        )
    )  # fmt: skip
    if planted is not None:
        writer.write_other("planted", **planted.as_json())
    for cell in plan.cells:
        writer.write(cell)


def _version() -> str:
    try:
        return metadata.version("kvmmm")
    except metadata.PackageNotFoundError:
        return "unknown"


class _Sweep:
    # One attempt at a sweep.

    def __init__(
        self, plan: Plan, writer: Writer, seed: int, planted: Planted | None,
        progress: Progress | None, old: Results | None, command: Sequence[str], started: float,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._writer = writer
        self._seed = seed
        self._planted = planted
        self._progress = progress
        self._command = command
        self._started = started
        self._slots, self._next, self._used_s = slots_left(plan, old)
        self._n_slots = len(self._slots)
        self._n_samples = 0
        self._errors: dict[str, None] = {}
        self._is_complete = True
        self._of_round = sum(len(due(plan.cells, n)) for n in range(plan.rounds)) / plan.rounds
        self._n_wanted = max(self._of_round * sum(len(slot.rounds) for slot in self._slots), 1)

    def run(self) -> Outcome:
        interrupted = False
        try:
            while self._slots:
                self._run_one(self._slots.pop(0))
        except KeyboardInterrupt:
            interrupted = True
            self._is_complete = False
        seconds = round(self._used_s + time.monotonic() - self._started, 2)
        self._writer.write(Footer(complete=self._is_complete, seconds=seconds))
        return Outcome(self._is_complete, interrupted, seconds, self._n_samples, list(self._errors))

    def _seconds_left(self) -> float:
        if self._plan.seconds is None:
            return _UNBOUNDED_S
        used = self._used_s + time.monotonic() - self._started
        return self._plan.seconds - used

    def _run_one(self, slot: Slot) -> None:
        process, self._next = self._next, self._next + 1
        share_s = max(self._seconds_left() / (len(self._slots) + 1), _LEAST_S)
        begun = time.monotonic()
        job = Job(
            process, self._plan.cells, slot.rounds, begun + share_s, self._seed, self._planted
        )  # fmt: skip
        left: Sequence[int] = list(slot.rounds)
        is_complete = False
        n_before = self._n_samples
        try:
            with Worker(job, command=self._command) as worker:
                for line in worker.lines():
                    if line is None:
                        self._show(process)
                        continue
                    if line["kind"] == "ended":
                        # Those that it had no time for are not missing.
                        is_complete, left = True, []
                    elif line["kind"] == "canary":
                        left = [number for number in left if number != line["round"]]
                    self._take(line)
                    self._show(process)
            if self._n_samples == n_before:
                raise WorkerError(process, "nothing was measured")  # noqa: TRY301 - told below
        except WorkerError as e:
            is_complete, left = False, list(slot.rounds) if self._n_samples == n_before else left
            self._errors[str(e)] = None
        finally:
            self._is_complete = self._is_complete and is_complete
            self._writer.write_other(
                "process", process=process, complete=is_complete, rounds_left=left,
                continues=slot.continues, seconds=round(time.monotonic() - begun, 2),
            )  # fmt: skip

    def _take(self, line: dict[str, Any]) -> None:
        kind = line.pop("kind")
        if kind == "sample":
            self._writer.write(Sample(**line))
            self._n_samples += 1
        elif kind == "canary":
            self._writer.write(Canary(**line))
        elif kind == "error":
            self._writer.write_other(kind, **line)
            self._errors[f"{line['cell']}: {line['why']}"] = None

    def _show(self, process: int) -> None:
        if self._progress is None:
            return
        elapsed = time.monotonic() - self._started
        done = min(self._n_samples / self._n_wanted, 1.0)
        left = elapsed * (1 - done) / done if done else None
        if self._plan.seconds is not None:
            budget_s = max(self._seconds_left(), 0.0)
            left = budget_s if left is None else min(left, budget_s)
            done = elapsed / (elapsed + left) if elapsed + left else 1.0
        self._progress(done, left, f"process {process + 1}, {self._n_samples} samples")
