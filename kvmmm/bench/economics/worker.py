"""A process of the sweep: `python -m kvmmm.bench.economics.worker`; stdin: a job, stdout: lines."""

from __future__ import annotations

import sys

from kvmmm.bench.crossover.worker import work
from kvmmm.bench.economics.probes import Guests

COMMAND = (sys.executable, "-m", "kvmmm.bench.economics.worker")


if __name__ == "__main__":
    work(lambda _cells: Guests())
