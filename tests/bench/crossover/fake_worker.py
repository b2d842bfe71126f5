"""Stands for a worker: reads a job, writes what its first argument says.

fake_worker.py KIND
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_SAMPLE = '{"kind": "sample", "cell": %s, "process": %s, "round": %s, "ns": {"internal": %s}}\n'
GARBAGE = {
    "babbles": "hello\n",
    "lists": "[]\n",
    "is kindless": '{"cell": "c0"}\n',
    "invents": _SAMPLE % ('"c9"', 0, 2, 1),
    "repeats": _SAMPLE % ('"c0"', 0, 1, 1),
    "impersonates": _SAMPLE % ('"c0"', 7, 2, 1),
    "runs ahead": _SAMPLE % ('"c0"', 0, 99, 1),
    "divides by zero": _SAMPLE % ('"c0"', 0, 2, "NaN"),
    "says words": _SAMPLE % ('"c0"', 0, 2, '"quick"'),
    "sings": '{"kind": "canary", "process": 0, "round": 1}\n',
    "sighs": '{"kind": "error", "process": 0}\n',
    "drones": "x" * (3 << 20),
}
"""What no worker writes; the sweep must neither keep it nor end by it."""


def say(kind: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def fail(kind: str) -> None:
    if kind == "dies":
        sys.stderr.write("warning\nno memory left\n")
        sys.stderr.flush()
        os.kill(os.getpid(), 9)
    if kind == "hangs":
        time.sleep(100)
    if kind in GARBAGE:
        sys.stdout.write(GARBAGE[kind])
        sys.stdout.flush()


def measure(kind: str, job: Any) -> None:
    process = job["process"]
    for number in job["rounds"]:
        for cell in job["cells"]:
            ns = {"internal": 10.0, "internal2": 10.0, "mirror": 20.0}
            say("sample", cell=cell[0], process=process, round=number, ns=ns)
        if number == 1 and process == 0:
            fail(kind)
        if number == 0 and kind == "complains":
            say("error", cell=job["cells"][0][0], process=process, round=0, why="not resident")
        say("canary", process=process, round=number, ghz=3.0, steal_ticks=0)
        if kind == "slow":
            time.sleep(0.3)


def main() -> None:
    kind = sys.argv[1]
    if kind == "deaf":
        sys.exit(3)
    if kind == "asleep":
        time.sleep(100)
    job = json.loads(sys.stdin.read())
    say("ready", process=job["process"])
    if kind == "silent":
        return
    measure(kind, job)
    say("ended", process=job["process"])


if __name__ == "__main__":
    main()
