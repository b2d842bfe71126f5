"""`Disturber`: a second thread of the host: it pauses, stops and reads meanwhile."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError
from tests.hammer.guest import MAGIC, N_CELLS
from tests.hammer.watch import Violation, say

if TYPE_CHECKING:
    from collections.abc import Callable


_REST_S = 0.03


class Disturber:
    """Runs until it is ended.

    Attributes:
        error: What ended it before.
        n_done: How much it did.
    """

    def __init__(self, machine: Any, seed: int) -> None:
        self._machine = machine
        self._rng = random.Random(seed)
        self._is_ending = False
        self.error: BaseException | None = None
        self.n_done = 0
        self._thread = threading.Thread(target=self._run, name="disturber", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        choices: list[Callable[[], None]] = [self._pause, self._stop, self._read, self._read]
        try:
            while not self._is_ending:
                time.sleep(self._rng.random() * _REST_S)
                self._rng.choice(choices)()
                self.n_done += 1
        except BaseException as e:  # noqa: BLE001 - the hammer looks at it
            self.error = e

    def _pause(self) -> None:
        with self._machine.vm.paused():
            time.sleep(self._rng.random() * 0.0002)

    def _stop(self) -> None:
        self._rng.choice(self._machine.stampers).vcpu.stop()

    def _read(self) -> None:
        """Copy while translations and frames go."""
        cell = self._rng.randrange(N_CELLS)
        try:
            data = self._machine.mm.read(
                self._machine.region + cell * self._machine.stride_bytes, 8
            )
        except GuestFaultError:
            return
        word = int.from_bytes(data, "little")
        if word and word >> 32 != MAGIC << 16 | cell:
            raise Violation(f"copy_in found {say(word)} in cell {cell}")

    def end(self) -> None:
        self._is_ending = True
        if self._thread.ident is not None:
            self._thread.join(30)
            assert not self._thread.is_alive(), "it waits for something"
