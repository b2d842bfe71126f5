"""The sweep: processes one after the other, what they measure goes into one file.

    plan ──► jobs ──► worker ──► lines ──► results.jsonl
                        └─ dies, hangs, is late: ended, told, the next one starts

What is written is kept, whatever comes: nothing that a worker says wrongly gets into the file, a
full disk leaves whole lines, Ctrl-C ends the process at work and the file says that it
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
from kvmmm.bench.crossover.plan import MODES, due, estimate_s, parts_of
from kvmmm.bench.crossover.process import COMMAND, Worker, WorkerError
from kvmmm.bench.crossover.record import (
    FILE_NAME,
    Canary,
    Footer,
    Header,
    Sample,
    Writer,
    checked_fields,
    read_results,
)
from kvmmm.bench.crossover.resume import Slot, slots_left
from kvmmm.bench.crossover.worker import Job
from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvmmm.bench.crossover.plan import Plan
    from kvmmm.bench.crossover.planted import Planted
    from kvmmm.bench.crossover.record import Results

    Progress = Callable[[float, float | None, str], object]
    """Called with the fraction done, seconds left (None: not known yet), what is going on."""

_LEAST_S = 4.0
"""What a process needs to measure anything: half of it goes by before it begins."""
_UNBOUNDED_S = 7 * 86400.0
_SEED_BITS = 32
_BEGINNING_SUFFIX = ".new"
_FEW_SAMPLES = 500


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
        SweepError: There are results already, or those there are of another plan; or the folder
            cannot be written.
        ResultsError: Those there are malformed.
    """
    started = time.monotonic()
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = read_results(path) if path.exists() else None
        if old is not None:
            _check_resumable(plan, old, path, resume=resume)
        else:
            seed = random.getrandbits(_SEED_BITS) if seed is None else seed
            _write_beginning(path, plan, seed, host, planted)
        seed = old.header.seed if old is not None else seed
        with Writer(path, append=True) as writer:
            sweep = _Sweep(plan, writer, seed or 0, planted, progress, old, command, started)
            return sweep.run()
    except KeyboardInterrupt:
        # Before there was anything, or once more at the end.
        return Outcome(False, True, round(time.monotonic() - started, 2), 0, [])
    except OSError as e:
        raise SweepError(
            f"{folder} cannot be written: {e.strerror or e}. Make room, or name another folder "
            "(--out); what is there is whole, and --resume goes on with it"
        ) from e


def _check_resumable(plan: Plan, old: Results, path: Path, *, resume: bool) -> None:
    if not resume:
        raise SweepError(f"{path} is there already: --resume goes on with it, --out takes another")
    if old.header.mode != plan.mode or list(old.cells.values()) != list(plan.cells):
        raise SweepError(f"{path} is of a sweep of other cells (--{old.header.mode})")


def _write_beginning(
    path: Path, plan: Plan, seed: int, host: Mapping[str, Any] | None, planted: Planted | None
) -> None:
    # All of it or nothing: a file without its cells can neither be gone on with nor begun again.
    header = Header(
        kvmmm=_version(), commit=facts.commit(),
        started=datetime.now(UTC).isoformat(timespec="seconds"), mode=plan.mode, seed=seed,
        host=facts.host_facts() if host is None else host,
    )  # fmt: skip
    beginning = path.with_name(path.name + _BEGINNING_SUFFIX)
    with Writer(beginning) as writer:
        writer.write(header)
        if planted is not None:
            writer.write_other("planted", **planted.as_json())
        for cell in plan.cells:
            writer.write(cell)
        if plan.mode in MODES:
            from kvmmm.bench.crossover.probes import method

            writer.write_other("method", **method())
    beginning.replace(path)


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
        self._parts = parts_of(plan.cells)
        self._n_due = [[len(due(p, n)) for n in range(plan.rounds)] for p in self._parts]
        self._cell_ids = {cell.id for cell in plan.cells}
        self._n_wanted = max(sum(map(self._n_samples_of, self._slots)), 1)
        # Until something is measured, what others took.
        n_all = plan.n_processes * sum(map(sum, self._n_due))
        self._guess_s = estimate_s(plan) * self._n_wanted / max(n_all, 1)
        self._beginnings_s = 0.0
        self._n_begun = 0
        self._running: tuple[int, Slot, set[tuple[str, int]]] = 0, Slot((), None), set()

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

    def _n_samples_of(self, slot: Slot) -> int:
        return sum(self._n_due[slot.part][n] for n in slot.rounds)

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
            process, self._parts[slot.part], slot.rounds, begun + share_s, self._seed, self._planted
        )  # fmt: skip
        left: Sequence[int] = list(slot.rounds)
        self._running = process, slot, set()
        is_complete = False
        spoiled: dict[str, int] = {}
        n_before = self._n_samples
        try:
            with Worker(job, command=self._command) as worker:
                for line in worker.lines():
                    if line is None:
                        self._show(process)
                        continue
                    kind = line["kind"]
                    self._take(line)
                    if kind == "ready":
                        self._n_begun += 1
                        self._beginnings_s += time.monotonic() - begun
                    elif kind == "ended":
                        # Those that it had no time for are not missing.
                        is_complete, left = True, []
                        spoiled = line.get("spoiled", {})
                    elif kind == "canary":
                        left = [number for number in left if number != line["round"]]
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
                continues=slot.continues, part=slot.part,
                seconds=round(time.monotonic() - begun, 2), spoiled=spoiled,
            )  # fmt: skip

    def _take(self, line: Mapping[str, Any]) -> None:
        # What could not be read again, or is another's, must not get into the file.
        kind = line["kind"]
        try:
            if kind == "sample":
                self._take_sample(Sample(**checked_fields(kind, line)))
            elif kind == "canary":
                self._writer.write(Canary(**checked_fields(kind, line)))
            elif kind == "error":
                fields = {name: value for name, value in line.items() if name != "kind"}
                self._errors[f"{line['cell']}: {line['why']}"] = None
                self._writer.write_other(kind, **fields)
        except (ValueError, LookupError, TypeError) as e:
            raise WorkerError(self._running[0], f"wrote a {kind} that is none: {e}") from e

    def _take_sample(self, sample: Sample) -> None:
        process, slot, seen = self._running
        key = sample.cell, sample.round
        is_ours = sample.process == process and sample.round in slot.rounds
        if not is_ours or key in seen or sample.cell not in self._cell_ids:
            raise ValueError(f"cell {sample.cell}, round {sample.round}")
        seen.add(key)
        self._writer.write(sample)
        self._n_samples += 1

    def _show(self, process: int) -> None:
        if self._progress is None:
            return
        elapsed = time.monotonic() - self._started
        left = self._guess_left(elapsed)
        if self._plan.seconds is not None:
            left = min(left, max(self._seconds_left(), 0.0))
        done = elapsed / (elapsed + left) if elapsed + left else 1.0
        self._progress(done, left, f"process {process + 1}, {self._n_samples} samples")

    def _guess_left(self, elapsed: float) -> float:
        # By what samples took so far, and beginnings; with few of them, by what is usual.
        n_left = max(self._n_wanted - self._n_samples, 0)
        if self._n_samples < min(_FEW_SAMPLES, self._n_wanted):
            return max(self._guess_s - elapsed, 0.0)
        a_sample_s = (elapsed - self._beginnings_s) / self._n_samples
        a_beginning_s = self._beginnings_s / max(self._n_begun, 1)
        return n_left * a_sample_s + len(self._slots) * a_beginning_s
