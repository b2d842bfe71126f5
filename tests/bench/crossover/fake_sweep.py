"""Stands for `kvmmm bench crossover`: writes some results, or fails, as its first argument says.

fake_sweep.py KIND LOG [ARGUMENTS...] --out FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text(text)


def main() -> int:
    kind, log = sys.argv[1], Path(sys.argv[2])
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    with log.open("a") as f:
        f.write(f"begin {time.monotonic()} {' '.join(sys.argv[3:-2])}\n")
    if kind == "first-fails":
        try:
            os.close(os.open(log.with_suffix(".first"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            sys.stderr.write("it cannot be measured here\n")
            return 69
    if kind == "waits":

        def end(_signal: int, _frame: object) -> None:
            write(folder, '{"kind": "header"}\n')
            sys.exit(130)

        signal.signal(signal.SIGINT, end)
        log.with_suffix(".waits").touch()
        time.sleep(60)
    time.sleep(0.2)
    write(folder, '{"kind": "header"}\n{"kind": "footer"}\n')
    with log.open("a") as f:
        f.write(f"end {time.monotonic()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
