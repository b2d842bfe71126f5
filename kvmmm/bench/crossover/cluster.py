"""The same sweep on every host of a Dask cluster, each by itself; the results in one place.

    workers ──► who shares a kernel? ──► one task a host ──► a sweep in a process of its own
                                                               └─► OUT/HOSTNAME/results.jsonl

Two sweeps on one host would measure each other. So workers are told apart by the kernel that they
run on, not by their addresses; one of each is chosen; and a lock on the host refuses a sweep that
somebody else's cluster starts there meanwhile.

A worker needs kvmmm installed, nothing of the client's.
"""

from __future__ import annotations

import importlib
import re
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvmmm.bench.crossover.cluster_host import Swept, host_identity, stop_here, sweep_here
from kvmmm.bench.crossover.extras import need
from kvmmm.bench.crossover.finish import conclude
from kvmmm.bench.crossover.plan import DEFAULT, FULL, QUICK, SELF_CHECK
from kvmmm.bench.crossover.record import FILE_NAME
from kvmmm.errors import EXIT_USAGE, KvmmmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Progress = Callable[[int, int, str], object]
    """Called with hosts done, hosts in all, and what is going on."""

CONNECT_S = 10
LOST_S = 60.0
"""A worker that the scheduler has not seen for so long does not come back."""
GRACE_S = 60.0
"""What a sweep may take beyond its budget, and after it was told to stop."""
_POLL_S = 0.25
# A sweep's budget, and the analysis after it; a full one takes what it takes.
_SECONDS = {QUICK: 180, DEFAULT: 1200, FULL: 7 * 86400}
_EXIT_INCOMPLETE, _EXIT_INTERRUPTED = 1, 130


class ClusterError(KvmmmError, RuntimeError):
    """There is no cluster at an address, or nobody in it who could measure.

    Attributes:
        address: The scheduler's.
        why: Why.
    """

    exit_code = EXIT_USAGE

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"cluster {address}: {why}")


class ClusterOutcome(NamedTuple):
    """What came of a cluster.

    Attributes:
        hosts: One a host, by name.
        interrupted: Whether somebody pressed Ctrl-C.
    """

    hosts: Sequence[HostOutcome]
    interrupted: bool

    @property
    def folders(self) -> list[Path]:
        """Where there are results, complete or not: what can be compared."""
        return [host.folder for host in self.hosts if host.folder is not None]


class HostOutcome(NamedTuple):
    """What came of one host.

    Attributes:
        host: Its name; the worker's address where it could not say it.
        folder: Where its results are; None where there are none.
        problem: What went wrong; empty where nothing did. There may be results nevertheless.
    """

    host: str
    folder: Path | None
    problem: str


def sweep_cluster(
    address: str, out: Path, arguments: Sequence[str], *, seconds: float,
    progress: Progress | None = None, command: Sequence[str] | None = None,
    identify: Callable[[], str] = host_identity,
) -> ClusterOutcome:  # fmt: skip
    """Run `kvmmm bench crossover` on every host of a cluster, on all of them at once.

    One host's failure is not another's. Ctrl-C does not come out of here: it stops the sweeps, and
    what they have until then is collected; a second one does.

    Args:
        address: The scheduler's: `tcp://10.0.0.1:8786`.
        out: Where a folder for each host is made.
        arguments: Of the command, such as `--quick`.
        seconds: How long a sweep should take at most; it is ended some time after that.
        progress: See there.
        command: What runs on a worker, with the arguments and `--out FOLDER` behind it; None, the
            worker's own kvmmm.
        identify: Says on a worker which host that is.

    Raises:
        MissingExtraError: dask.distributed is not installed.
        ClusterError: There is no cluster, or no worker in it.
        OSError: The folders cannot be written.
    """
    need("distributed", what="--cluster", extra="cluster")
    # With no types, installed or not.
    distributed: Any = importlib.import_module("distributed")
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as e:
        raise ClusterError(address, str(e) or type(e).__name__) from e
    with client:
        hosts = _hosts_of(client, address, identify)
        run = _Run(client, out, progress or (lambda *_: None))
        return run.run(hosts, (list(arguments), list(command) if command else None, seconds))


def run(address: str, mode: str, folder: Path) -> int:
    """Do `kvmmm bench crossover --cluster`: sweep, report every host, compare them.

    Args:
        address: The scheduler's.
        mode: One of `plan.MODES`, but not the self-check: that has nothing to compare.
        folder: Where everything goes; a folder for each host in it.

    Returns:
        An exit status.
    """
    if mode == SELF_CHECK:
        raise ClusterError(address, "the self-check is about one host: run it there")
    outcome = sweep_cluster(
        address, folder, [] if mode == DEFAULT else [f"--{mode}"], seconds=_SECONDS[mode],
        progress=_Teller(),
    )  # fmt: skip
    for host in outcome.hosts:
        click.echo(f"{host.host}: {host.problem or 'measured'}", err=bool(host.problem))
    _tell_results(outcome.folders, folder)
    if outcome.interrupted:
        return _EXIT_INTERRUPTED
    return _EXIT_INCOMPLETE if any(host.problem for host in outcome.hosts) else 0


def _tell_results(folders: Sequence[Path], out: Path) -> None:
    # What was measured is there; that it cannot be analysed here is no reason to fail.
    lines: list[str] = []
    try:
        for folder in folders:
            lines = conclude(folder)
        if len(folders) > 1:
            from kvmmm.bench.crossover import compare

            lines = [compare.main(folders, out).text]
    except KvmmmError as e:
        click.echo(f"no report: {e}", err=True)
    for line in lines:
        click.echo(line)


class _Teller:
    # A line when something has changed: there is nothing to see in between.

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, n_done: int, n_hosts: int, names: str) -> None:
        line = f"{n_done} of {n_hosts} hosts done" + (f": {names}" if names else "")
        if line != self._last:
            click.echo(line, err=True)
        self._last = line


def _hosts_of(client: Any, address: str, identify: Callable[[], str]) -> dict[str, str]:  # noqa: ANN401 - dask has no types
    # Identity of each host -> the worker that is to measure it. `run` does not wait for a worker's
    # threads, which may be busy.
    answers: Mapping[str, Any] = client.run(identify, on_error="return")
    hosts: dict[str, str] = {}
    problems = []
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, str):
            hosts.setdefault(answer, worker)
        else:
            problems.append(f"{worker}: {answer!r}")
    if not hosts:
        raise ClusterError(address, "; ".join(problems) or "it has no workers")
    return hosts


class _Run:
    # One round over the hosts.

    def __init__(self, client: Any, out: Path, progress: Progress) -> None:  # noqa: ANN401 - dask
        self._client = client
        self._out = out
        self._progress = progress
        self._token = uuid.uuid4().hex
        self._outcomes: list[HostOutcome] = []
        self._names: set[str] = set()
        self._interrupted = False

    def run(
        self, hosts: Mapping[str, str], job: tuple[list[str], list[str] | None, float]
    ) -> ClusterOutcome:
        self._out.mkdir(parents=True, exist_ok=True)
        pending = {
            worker: self._client.submit(
                sweep_here, self._token, identity, *job,
                workers=[worker], allow_other_workers=False, pure=False, retries=0,
            )
            for identity, worker in hosts.items()
        }  # fmt: skip
        n_hosts = len(pending)
        seen = dict.fromkeys(pending, time.monotonic())
        deadline = time.monotonic() + job[2] + 2 * GRACE_S
        while pending:
            try:
                self._progress(len(self._outcomes), n_hosts, ", ".join(sorted(self._names)))
                self._look(pending, seen, deadline)
                time.sleep(_POLL_S)
            except KeyboardInterrupt:
                if self._interrupted:
                    raise
                self._interrupted = True
                deadline = time.monotonic() + GRACE_S
                self._client.run(stop_here, self._token, workers=list(pending), on_error="ignore")
        self._progress(n_hosts, n_hosts, ", ".join(sorted(self._names)))
        found = sorted(self._outcomes, key=lambda outcome: outcome.host)
        return ClusterOutcome(found, self._interrupted)

    def _look(self, pending: dict[str, Any], seen: dict[str, float], deadline: float) -> None:
        present = set(self._client.nthreads())
        now = time.monotonic()
        for worker, future in list(pending.items()):
            if worker in present:
                seen[worker] = now
            if future.done():
                del pending[worker]
                self._take(worker, future)
            elif now - seen[worker] > LOST_S or now > deadline:
                del pending[worker]
                future.cancel(force=True)
                why = "it took too long" if worker in present else "the worker has gone"
                self._outcomes.append(HostOutcome(worker, None, why))

    def _take(self, worker: str, future: Any) -> None:  # noqa: ANN401 - dask
        try:
            swept = Swept(*future.result())
        except Exception as e:  # noqa: BLE001 - whatever it was, the other hosts go on
            self._outcomes.append(HostOutcome(worker, None, f"{type(e).__name__}: {e}"))
            return
        name = self._name_for(swept.hostname)
        folder = None
        if swept.results is not None:
            folder = self._out / name
            folder.mkdir(exist_ok=True)
            (folder / FILE_NAME).write_bytes(swept.results)
        self._outcomes.append(HostOutcome(name, folder, swept.problem))

    def _name_for(self, hostname: str) -> str:
        # A folder's name; hosts that have the same one are told apart by a number.
        base = re.sub(r"[^A-Za-z0-9._-]", "-", hostname).strip(".-") or "host"
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}-{number}"
        self._names.add(name)
        return name
