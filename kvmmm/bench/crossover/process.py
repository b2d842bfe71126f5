"""The parent's end of a worker: lines that come in, a deadline that holds, a certain end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Self

from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from kvmmm.bench.crossover.worker import Job

_GRACE_S = 3.0
_POLL_S = 0.25
_SILENCE_S = 60.0
_STDERR_BYTES = 2000
_LINE_BYTES = 1 << 20
_SHOWN_BYTES = 80
COMMAND = (sys.executable, "-m", "kvmmm.bench.crossover.worker")


class WorkerError(KvmmmError, RuntimeError):
    """A process of the sweep died, or had to be ended.

    Attributes:
        process: Its number.
        why: What happened.
    """

    def __init__(self, process: int, why: str) -> None:
        self.process = process
        self.why = why
        super().__init__(f"process {process}: {why}")


class Worker:
    """One process. A context manager: afterwards it has ended, whatever it did.

    Args:
        job: What it does.
        command: What is started; another one for tests.
        grace_s: How much later than told it may be; None, the usual.
    """

    def __init__(
        self, job: Job, *, command: Sequence[str] = COMMAND, grace_s: float | None = None
    ) -> None:
        self._process = job.process
        # What it does when it is told to end in time, and a little.
        self._deadline = job.deadline_s + (_GRACE_S if grace_s is None else grace_s)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        # Not by a pipe: who never reads it would keep us waiting.
        told = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        environment = {k: v for k, v in os.environ.items() if k != "KVMMM_DEBUG"}
        # A session of its own: Ctrl-C is the parent's.
        try:
            told.write(job.as_json().encode())
            told.seek(0)
            self._child = subprocess.Popen(
                command, stdin=told, stdout=subprocess.PIPE, stderr=self._errors,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            self._errors.close()
            raise WorkerError(self._process, f"cannot be started: {e.strerror or e}") from e
        finally:
            told.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdout, self._errors):
            if stream is not None and not stream.closed:
                stream.close()

    def lines(self) -> Iterator[dict[str, Any] | None]:
        """Yield what it writes; None now and then, when there is nothing.

        Raises:
            WorkerError: It died, fell silent, or is too late.
        """
        stdout = self._child.stdout
        assert stdout is not None  # noqa: S101 - asked for
        pending = b""
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now > self._deadline:
                    raise WorkerError(self._process, "not done in time: ended")
                if now - heard > _SILENCE_S:
                    raise WorkerError(self._process, f"silent for {_SILENCE_S:g} s: ended")
                if not selector.select(_POLL_S):
                    yield None
                    continue
                chunk = os.read(stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                heard = time.monotonic()
                *whole, pending = (pending + chunk).split(b"\n")
                for line in whole:
                    yield self._parsed(line)
                if len(pending) > _LINE_BYTES:
                    raise self._wrote(pending)
        self._check_end()

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(line)
        except ValueError as e:
            raise self._wrote(line) from e
        if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str):
            raise self._wrote(line)
        return fields

    def _wrote(self, line: bytes) -> WorkerError:
        return WorkerError(self._process, f"wrote {line[:_SHOWN_BYTES]!r}")

    def _check_end(self) -> None:
        try:
            status = self._child.wait(max(self._deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired as e:
            raise WorkerError(self._process, "does not end: ended") from e
        if status:
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace").strip()
            last = text[-_STDERR_BYTES:].splitlines()[-1:] or [""]
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise WorkerError(self._process, f"died ({how}): {last[0]}")
