"""`Epoch`: one world, and the cases made in it; what is wrong with one comes out as `Finding`."""

from __future__ import annotations

import faulthandler
import gc
import random
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kvmmm.errors import AddressSpaceIOUnavailableError, KvmmmError

from .disturb import disturb_until
from .draw import Draw
from .entries import ENTRIES
from .hostile import HostileError
from .parts import PARTS
from .raw import RAW
from .world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from .record import Record

_CHECK_EVERY = 250
_ALLOWED = (
    KvmmmError, TypeError, ValueError, OverflowError, BufferError, OSError, MemoryError,
    HostileError, KeyboardInterrupt, RuntimeError,
)  # fmt: skip
_ALL = {**ENTRIES, **PARTS, **RAW}
_NAMES = list(_ALL)
_WEIGHTS = [weight for weight, _ in _ALL.values()]


class Finding(Exception):  # noqa: N818 - it is what is looked for
    """Something is wrong: `kind` in a word, and where."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(text)


class Epoch:
    """What one seed does.

    Args:
        seed: Decides everything but how threads interleave.
        record: Where each case is noted before it is made.
        first: Leave out the cases before this one.
        is_quiet: Leave out other threads and signals: then it does the same each time.
    """

    def __init__(
        self, seed: int, record: Record, *, first: int = 0, is_quiet: bool = False
    ) -> None:
        rng = random.Random(seed)  # noqa: S311
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self._record = record
        self._first = first
        self._has_tables = rng.random() < 0.6
        self._n_disturbers = 0 if is_quiet else rng.choice((0, 0, 1, 1, 2))
        self._n_callers = 1 if is_quiet else rng.choice((1, 1, 1, 2))
        self._has_faulthandler = rng.random() < 0.5
        self._has_signals = rng.random() < 0.3 and not is_quiet
        self._policy = {
            "release_bytes": rng.choice((64 << 10, 64 << 10, 4096, 1)),
            "mirror": rng.choice((0, 0, 1)),
            "mirror_reuses": rng.choice((1, 3)),
            "mirror_min_run_pages": rng.choice((1, 16)),
            "mirror_vmas": rng.choice((0, 0, 20, 100)),
        }
        self._failures: list[BaseException] = []

    @property
    def is_alone(self) -> bool:
        """Nobody else is at work: references can be counted."""
        return self._n_callers == 1 and not self._n_disturbers

    def run(self, n_cases: int) -> None:
        """Make the world, all cases, and look whether everything is as it was.

        Raises:
            Finding: Something is wrong.
        """
        self._record.note(
            f"# seed {self.seed}: tables {self._has_tables}, {self._n_callers} callers, "
            f"{self._n_disturbers} disturbers, faulthandler {self._has_faulthandler}, signals "
            f"{self._has_signals}, {list(self._policy.values())}"
        )
        n_fds = _n_descriptors()
        if self._has_faulthandler:
            faulthandler.enable()
        world = World(has_tables=self._has_tables, policy=self._policy)
        try:
            self._run_threads(world, n_cases)
            self._in(world.check, "at the end")
        finally:
            self._note_signals(on=False)
            if not sys.exc_info()[0]:
                self._in(world.close, "closing")
            if self._has_faulthandler:
                faulthandler.disable()
        del world
        gc.collect()
        n_left = _n_descriptors() - n_fds
        if n_left > 0:
            raise Finding("leak", f"{n_left} descriptors")

    def _run_threads(self, world: World, n_cases: int) -> None:
        end = threading.Event()
        threads = [
            threading.Thread(
                target=disturb_until,
                args=(world, random.Random(f"{self.seed}/{n}"), end, self._failures),  # noqa: S311
                daemon=True,
            )
            for n in range(self._n_disturbers)
        ]
        if self._n_callers > 1:
            threads.append(
                threading.Thread(target=self._call_in_thread, args=(world, n_cases), daemon=True)
            )
        for thread in threads:
            thread.start()
        self._note_signals(on=self._has_signals)
        try:
            self._call(world, range(0, n_cases, self._n_callers))
        finally:
            self._note_signals(on=False)
            end.set()
            for thread in threads:
                thread.join()
        for failure in self._failures:
            if isinstance(failure, Finding):
                raise failure
            raise Finding("exception", f"in another thread: {failure!r}") from failure

    def _call_in_thread(self, world: World, n_cases: int) -> None:
        try:
            self._call(world, range(1, n_cases, 2))
        except BaseException as e:  # noqa: BLE001 - told by the main thread
            self._failures.append(e)

    @staticmethod
    def _note_signals(*, on: bool) -> None:
        # System calls and waits are interrupted again and again.
        if on:
            signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.003 if on else 0, 0.003 if on else 0)

    def _call(self, world: World, numbers: range) -> None:
        for number in numbers:
            # From the seed and the number alone: it can be made again without those before it.
            rng = random.Random(self.seed << 20 | number)  # noqa: S311
            if number < self._first or self._failures:
                continue
            self._case(Draw(world, rng, is_alone=self.is_alone), number)
            if self.is_alone and number % _CHECK_EVERY == _CHECK_EVERY - 1:
                self._in(world.check, f"after case {number}")

    def _case(self, draw: Draw, number: int) -> None:
        name = draw.rng.choices(_NAMES, _WEIGHTS)[0]
        self.counts[name] += 1
        try:
            call = _ALL[name][1](draw)
        except AttributeError:
            self.counts[f"{name} (not there)"] += 1
            return
        except _ALLOWED:
            return  # nothing to call it on
        kept = draw.temporary
        counts = [sys.getrefcount(one) for one in kept]
        self._record.note(f"{number} {name} {call}")
        try:
            result = call.make()
            wrong = call.judge_result(result)
            del result
        except _ALLOWED as e:
            wrong = call.judge_error(e)
            if isinstance(e, AddressSpaceIOUnavailableError):
                wrong = "AddressSpaceIOUnavailableError came out"
            if isinstance(e, RecursionError):
                wrong = repr(e)
        except BaseException as e:
            if isinstance(e, AttributeError) and (draw.was_blank or "packed" in str(e)):
                return
            raise Finding("exception", f"case {number}: {name} {call}: {e!r}") from e
        if wrong and not draw.was_blank:
            raise Finding("answer", f"case {number}: {name} {call}: {wrong}")
        if self.is_alone:
            self._look_after(draw.world, kept, counts, f"case {number}: {name} {call}")

    @staticmethod
    def _look_after(world: World, kept: list[object], counts: list[int], where: str) -> None:
        # Fewer may be: hostile arguments drop others.
        if _has_more(kept, counts):
            gc.collect()  # errors whose frames know them
            if _has_more(kept, counts):
                raise Finding("reference", where)
        wrong = world.canaries_are_wrong()
        if wrong:
            raise Finding("overrun", f"{where}: {wrong}")

    @staticmethod
    def _in(check: Callable[[], object], where: str) -> None:
        try:
            check()
        except Finding:
            raise
        except BaseException as e:
            raise Finding("invariant", f"{where}: {e!r}") from e


def _has_more(kept: list[object], counts: list[int]) -> bool:
    now = [sys.getrefcount(one) for one in kept]
    return any(after > before for before, after in zip(counts, now, strict=True))


def _n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
