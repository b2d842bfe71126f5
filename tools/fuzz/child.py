"""The process that makes the cases: it tells epochs and findings as lines of JSON, and may die."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from .epoch import Epoch, Finding
from .hostile import HostileError
from .record import Record
from .watch import FOUND

if TYPE_CHECKING:
    import argparse

_REPEATS = 4
_REPEAT_EVERY = 12
_LEAKED_BLOCKS = 6
"""In each of the last two of so many repeats of one epoch: what grows so is not a cache."""
_WARM_EPOCHS = 4
_RSS_GROWTH_BYTES = 64 << 20


def run(options: argparse.Namespace) -> int:
    """Make epochs from `options.seed` on, `options.epochs` of them; returns an exit status."""
    # Whoever waits for us may want to know where we hang.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.unraisablehook = _note_unraisable
    with Record(Path(options.record)) as record:
        warm_bytes = 0
        for n, seed in enumerate(range(options.seed, options.seed + options.epochs)):
            epoch = Epoch(seed, record, first=options.first)
            try:
                _provoke(options.provoke, options.first, record)
                epoch.run(options.cases)
                if n % _REPEAT_EVERY == _REPEAT_EVERY - 1 or options.repeat:
                    _repeat(seed, record, options.cases)
                if n == _WARM_EPOCHS:
                    warm_bytes = _rss_bytes()
                elif n > _WARM_EPOCHS:
                    _check_growth(_rss_bytes() - warm_bytes)
            except Finding as e:
                _tell(seed=seed, kind=e.kind, text=str(e), trace=traceback.format_exc())
                return FOUND
            _tell(seed=seed, cases=sum(epoch.counts.values()), counts=dict(epoch.counts))
    return 0


def _check_growth(n_bytes: int) -> None:
    if n_bytes > _RSS_GROWTH_BYTES:
        raise Finding("leak", f"{n_bytes >> 20} MiB more than after {_WARM_EPOCHS} epochs")


def _note_unraisable(unraisable: object) -> None:
    # Hostile callbacks raise where nobody can be told; anything else is shown.
    if not isinstance(getattr(unraisable, "exc_value", None), HostileError):
        sys.__unraisablehook__(unraisable)  # type: ignore[arg-type]


def _repeat(seed: int, record: Record, n_cases: int) -> None:
    # The same again and again, without threads: what is left over each time has leaked.
    blocks = []
    for _ in range(_REPEATS):
        Epoch(seed, record, is_quiet=True).run(n_cases)
        gc.collect()
        sys._clear_type_cache()  # noqa: SLF001 - it keeps up to 4096 names
        blocks.append(sys.getallocatedblocks())
    grown = [after - before for before, after in itertools.pairwise(blocks)]
    if min(grown[-2:]) > _LEAKED_BLOCKS:
        raise Finding("leak", f"{grown} blocks more after each time (--repeat)")


def _provoke(what: str, first: int, record: Record) -> None:
    # Defects on purpose, to see whether they are found: "hang", or "reference at 30" for one that
    # takes case 30.
    kind, _, at = what.partition(" at ")
    if not kind or (at and first > int(at)):
        return
    record.note(f"provoke {what}")
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "hang":
        signal.pause()
    else:
        raise Finding(kind, "on purpose")


def _rss_bytes() -> int:
    n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return n_pages * resource.getpagesize()


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)
