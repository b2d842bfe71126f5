"""Stands for a worker: reads a job, writes what its first argument says.

fake_worker.py KIND
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


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
    if kind == "babbles":
        sys.stdout.write("hello\n")
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
    job = json.loads(sys.stdin.read())
    say("ready", process=job["process"])
    if kind == "silent":
        return
    measure(kind, job)
    say("ended", process=job["process"])


if __name__ == "__main__":
    main()
