"""What happens on a host of the cluster: one sweep, in a process of its own, and only one.

Here is all that a worker is asked to call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from kvmmm.bench.crossover.record import FILE_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_END_S = 30.0
_TAIL_BYTES = 2000
_LINES_SHOWN = 3
_PROBLEMS_SHOWN = 300

_running: dict[str, list[subprocess.Popen[bytes]]] = {}
"""Sweeps of this worker, by the token of the client's run."""


class Swept(NamedTuple):
    """What a worker answers.

    Attributes:
        hostname: Of the host.
        results: The results' file; None where there is none.
        problem: What went wrong; empty where nothing did.
    """

    hostname: str
    results: bytes | None
    problem: str


def host_identity() -> str:
    """Return what is the same for everybody on this kernel, containers included."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def sweep_here(
    token: str, identity: str, arguments: Sequence[str], command: Sequence[str] | None,
    seconds: float,
) -> Swept:  # fmt: skip
    """Run a sweep and return its results.

    Args:
        token: What `stop_here` will be told.
        identity: Of this host; there is one sweep at a time for each.
        arguments: Of the command.
        command: See `cluster.sweep_cluster`.
        seconds: The budget; a sweep that goes on for much longer is ended.
    """
    command = command or [sys.executable, "-m", "kvmmm", "bench", "crossover"]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_only_one(identity))
        except BlockingIOError:
            return Swept(socket.gethostname(), None, "another sweep runs on this host")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmmm-sweep-")))
        said = stack.enter_context((folder / "said").open("w+b"))
        problem = _run(token, [*command, *arguments, "--out", str(folder / "out")], said, seconds)
        return Swept(socket.gethostname(), _results(folder / "out"), problem)


def stop_here(token: str) -> None:
    """Have the sweeps of a run end as if by Ctrl-C."""
    for process in _running.get(token, ()):
        process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def _only_one(identity: str) -> Iterator[None]:
    name = f"kvmmm-sweep-{zlib.crc32(identity.encode()):08x}.lock"
    path = Path(tempfile.gettempdir()) / name
    try:
        # Somebody else's, and in a sticky directory: with O_CREAT it would be refused
        # (fs.protected_regular, proc_sys_fs(5)).
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _run(token: str, command: Sequence[str], said: IO[bytes], seconds: float) -> str:
    # A session of its own: a Ctrl-C in the worker's terminal is the worker's affair. Its answer is
    # made anew where the results go; what went wrong is not in it.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
        start_new_session=True,
    )  # fmt: skip
    _running.setdefault(token, []).append(process)
    is_late = False
    try:
        is_late = _wait(process, seconds + _END_S)
    finally:
        _running[token].remove(process)
        if process.poll() is None:
            # With all that it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if is_late:
        return f"it was ended after {seconds + _END_S:.0f} s"
    if process.returncode in {0, 130}:
        return "" if process.returncode == 0 else "interrupted"
    said.seek(0, os.SEEK_END)
    said.seek(max(said.tell() - _TAIL_BYTES, 0))
    lines = said.read().decode(errors="replace").strip().splitlines()
    last = "; ".join(lines[-_LINES_SHOWN:])[-_PROBLEMS_SHOWN:]
    return f"it ended with {process.returncode}: {last}"


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    # Whether it had to be told to end.
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        return True
    return False


def _results(folder: Path) -> bytes | None:
    try:
        return (folder / FILE_NAME).read_bytes()
    except OSError as e:
        if e.errno not in {errno.ENOENT, errno.ENOTDIR}:
            raise
        return None
