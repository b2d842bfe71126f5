"""LocalClusters in a process of their own, and fake sweeps on them; writes what came as JSON.

fake_cluster.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvmmm.bench.crossover import cluster, cluster_host

SWEEP = Path(__file__).with_name("fake_sweep.py")


def by_name(dask_worker: Any) -> str:
    """Every worker a host of its own."""
    return f"test-{os.getpid()}-{dask_worker.name}"


def broken() -> str:
    raise OSError("no such file")


# Name: which sweep, who tells hosts apart.
SCENARIOS = {
    "process": ("works", cluster_host.host_identity),
    "one": ("works", cluster_host.host_identity),
    "three": ("works", by_name),
    "fails": ("first-fails", by_name),
    "busy": ("works", cluster_host.host_identity),
    "broken": ("works", broken),
    "interrupt": ("waits", cluster_host.host_identity),
}


def interrupt_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def play(scenario: str, address: str, folder: Path) -> dict[str, Any]:
    kind, identify = SCENARIOS[scenario]
    folder.mkdir()
    log = folder / "log"
    shown: list[object] = []
    with ExitStack() as stack:
        if scenario == "interrupt":
            waits = (log.with_suffix(".waits"),)
            threading.Thread(target=interrupt_when, args=waits).start()
        if scenario == "busy":
            stack.enter_context(cluster_host._only_one(cluster_host.host_identity()))
        try:
            outcome = cluster.sweep_cluster(
                address, folder / "out", ["--quick", "--seed=3"], seconds=20,
                progress=lambda *line: shown.append(line), identify=identify,
                command=[sys.executable, str(SWEEP), kind, str(log)],
            )  # fmt: skip
        except cluster.ClusterError as e:
            return {"error": str(e)}
    return {
        "hosts": [[host.host, str(host.folder), host.problem] for host in outcome.hosts],
        "folders": [str(folder) for folder in outcome.folders],
        "interrupted": outcome.interrupted,
        "log": log.read_text() if log.exists() else "",
        "shown": shown[-1:],
    }


def main() -> None:
    from distributed import LocalCluster

    folder = Path(sys.argv[1])
    quiet = {"threads_per_worker": 1, "dashboard_address": None}
    with ThreadPoolExecutor() as pool:
        # A worker in a process of its own takes seconds to start: meanwhile, three threads.
        starting = pool.submit(LocalCluster, n_workers=1, **quiet)
        with LocalCluster(n_workers=3, processes=False, protocol="tcp", **quiet) as local:
            answers = {
                name: play(name, local.scheduler_address, folder / name)
                for name in SCENARIOS
                if name != "process"
            }
        with starting.result() as local:
            answers["process"] = play("process", local.scheduler_address, folder / "process")
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
