"""`Watch`: starts children, sees them die or hang, says what is needed to see it again."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .record import Record

FOUND = 3
"""The exit status of a child that has told what it found."""
REPOSITORY = Path(__file__).resolve().parents[2]
TAIL_LINES = 12
_EPOCHS_A_CHILD = 50
_POLL_SECONDS = 0.2
_SHOW_SECONDS = 10.0
_STARVED = 10
"""So many times the deadline a child is given that waits for a CPU."""
_BUSY_TICKS = 20
"""Of CPU time in a second (100): with fewer somebody else has the rest."""


class Finding:
    """What a child found, or what became of it.

    Attributes:
        seed: The epoch's.
        kind: A word.
        text: What happened.
        tail: The last cases before it.
    """

    def __init__(self, seed: int, kind: str, text: str, tail: list[str]) -> None:
        self.seed = seed
        self.kind = kind
        self.text = text
        self.tail = tail

    def __str__(self) -> str:
        lines = [f"{self.kind} in seed {self.seed}", self.text.rstrip(), "the last cases:"]
        lines += [f"    {line}" for line in self.tail]
        lines.append(f'again: make fuzz ARGS="--seed {self.seed} --replay"')
        return "\n".join(line for line in lines if line)


class Watch:
    """Runs children until the time is up.

    Args:
        deadline_seconds: A child that makes no case for so long hangs.
        extra: Arguments for every child.
        environment: For every child, beside ours.
        command: What starts one.

    Attributes:
        n_cases: Cases of epochs that ended.
        n_epochs: Those.
        counts: Cases by entry point.
        findings: What was found.
    """

    def __init__(
        self, *, deadline_seconds: float = 30.0, extra: list[str] | None = None,
        environment: dict[str, str] | None = None, command: list[str] | None = None,
    ) -> None:  # fmt: skip
        self._deadline_seconds = deadline_seconds
        self._extra = extra or []
        self._environment = environment or {}
        self._command = command or [sys.executable, "-m", "tools.fuzz"]
        self.n_cases = self.n_epochs = 0
        self.counts: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self._begin = time.monotonic()
        self._shown = 0.0

    def run(self, seed: int, minutes: float, *, max_findings: int) -> None:
        """Run children from `seed` on until the time is up, or so much was found."""
        end = self._begin + minutes * 60
        while time.monotonic() < end and len(self.findings) < max_findings:
            finding, seed = self.child(seed, _EPOCHS_A_CHILD, end)
            if finding is not None:
                self.findings.append(finding)
                self._say(f"\n{finding}\n")

    def child(
        self, seed: int, n_epochs: int, end: float, more: tuple[str, ...] = ()
    ) -> tuple[Finding | None, int]:
        """Run one child; returns what was found, and the first seed that it did not finish."""
        with tempfile.TemporaryDirectory(prefix="kvmmm-fuzz-") as folder:
            record = Path(folder, "record")
            errors = Path(folder, "stderr")
            with Record(record):
                pass  # made here: the child may not come that far
            process = self._start(seed, n_epochs, record, errors, more)
            try:
                return self._attend(process, seed, record, errors, end)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def _start(
        self, seed: int, n_epochs: int, record: Path, errors: Path, more: tuple[str, ...]
    ) -> subprocess.Popen[bytes]:
        arguments = [
            "--child",
            "--seed",
            str(seed),
            "--epochs",
            str(n_epochs),
            "--record",
            str(record),
        ]
        with errors.open("wb") as file:
            return subprocess.Popen(
                [*self._command, *arguments, *self._extra, *more],
                stdout=subprocess.PIPE, stderr=file, cwd=REPOSITORY,
                env=os.environ | self._environment,
                start_new_session=True,  # Ctrl-C is ours alone
            )  # fmt: skip

    def _attend(
        self, process: subprocess.Popen[bytes], seed: int, record: Path, errors: Path, end: float
    ) -> tuple[Finding | None, int]:
        assert process.stdout is not None  # noqa: S101 - for mypy
        alive, last = time.monotonic(), 0
        with selectors.DefaultSelector() as selector, Record(record) as lines:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(_POLL_SECONDS):
                    line = process.stdout.readline()
                    if not line:
                        break
                    facts = json.loads(line)
                    if "kind" in facts:
                        told = f"{facts['text']}\n{facts['trace']}"
                        tail = lines.tail(TAIL_LINES)
                        return Finding(facts["seed"], facts["kind"], told, tail), facts["seed"] + 1
                    seed = facts["seed"] + 1
                    self._count(facts)
                now = time.monotonic()
                if now > end:
                    return None, seed
                if (number := lines.last()) != last:
                    alive, last = now, number
                elif now - alive > self._deadline_seconds:
                    if now - alive < _STARVED * self._deadline_seconds and _is_starved(process.pid):
                        continue
                    return self._hung(process, seed, lines, errors), seed + 1
                self._progress(end, lines)
            status = process.wait()
            if status in (0, FOUND):
                return None, seed
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            text = errors.read_text(errors="replace")[-6000:]
            return Finding(seed, f"crash ({name})", text, lines.tail(TAIL_LINES)), seed + 1

    def _hung(
        self, process: subprocess.Popen[bytes], seed: int, lines: Record, errors: Path
    ) -> Finding:
        # Where it is: faulthandler writes that, whoever has the GIL. Twice: does it move?
        states = [_states(process.pid)]
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            time.sleep(1)
            states.append(_states(process.pid))
        process.kill()
        text = errors.read_text(errors="replace")[-12000:]
        return Finding(seed, "hang", "\n".join([text, *states]), lines.tail(TAIL_LINES))

    def _count(self, facts: dict[str, Any]) -> None:
        self.n_epochs += 1
        self.n_cases += facts["cases"]
        self.counts.update(facts["counts"])

    # ---- for people ----

    def _progress(self, end: float, lines: Record) -> None:
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        if now - self._shown < (1.0 if is_terminal else _SHOW_SECONDS):
            return
        self._shown = now
        seconds = max(now - self._begin, 0.001)
        left = max(end - now, 0) / 60
        text = (
            f"{self.n_cases} cases, {self.n_cases / seconds:.0f} a second, "
            f"{len(self.findings)} findings, {left:.1f} minutes left"
        )
        del lines
        self._say(f"\r{text}    " if is_terminal else f"{text}\n")

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def summary(self) -> str:
        """Return what was done: cases, entry points by count, findings."""
        seconds = time.monotonic() - self._begin
        lines = [f"{self.n_cases} cases in {self.n_epochs} epochs, {seconds / 60:.1f} minutes"]
        lines += [f"  {count:9} {name}" for name, count in self.counts.most_common()]
        if not self.findings:
            lines.append("nothing found")
        lines += [f"found: {f.kind}, seed {f.seed}" for f in self.findings]
        return "\n".join(lines)


def _states(pid: int) -> str:
    """Return each thread's state, its system call, and the ticks of CPU time that it has taken."""
    told = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        try:
            fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            call = (task / "syscall").read_text(encoding="ascii").split()[:3]
        except OSError:
            continue  # it has ended
        ticks = int(fields[11]) + int(fields[12])
        told.append(f"{task.name} {fields[0]} {ticks} {' '.join(call)}")
    return "; ".join(told)


def _is_starved(pid: int) -> bool:
    """Whether a thread could run, and hardly does: others have the CPUs."""
    before = _states(pid)
    time.sleep(1)
    after = _states(pid)
    ticks = [sum(int(task.split()[2]) for task in text.split("; ")) for text in (before, after)]
    return " R " in after and ticks[1] - ticks[0] < _BUSY_TICKS
