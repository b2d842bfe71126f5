"""`Stamper`: a vCPU that stamps and reads, on a thread of its own, until it is told to end."""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from kvmmm.errors import IoctlError
from kvmmm.safemem.ffi import lib
from tests.hammer.guest import FLAGS_OFFSET, N_CELLS, TURN_BITS
from tests.hammer.watch import say

if TYPE_CHECKING:
    from collections.abc import Callable

RUN_S = 300
STOP = -lib.KVMMM_STOP_REQUEST
_MAX_FAILED_IN_A_TURN = 500


class Stamper:
    """One vCPU's thread.

    Args:
        vcpu: Ready to run.
        own_page: The page of its own, as the host sees it.
        on_failure: Asked when KVM_RUN fails with EFAULT, which says that a page is not there any
            more; then it is run again.

    Attributes:
        answer: What its run came to; None while it runs.
        n_stops: How often it was stopped on the way.
        n_failed: How often KVM_RUN failed with EFAULT.
    """

    def __init__(self, vcpu: Any, own_page: memoryview, on_failure: Callable[[], object]) -> None:
        self.vcpu = vcpu
        self.answer: object = None
        self.n_stops = self.n_failed = 0
        self._own_page = own_page
        self._on_failure = on_failure
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="stamper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._run_on()
        except BaseException as e:  # noqa: BLE001 - the host looks at it
            self.answer = e

    def _run_on(self) -> object:
        seen, n_failed = -1, 0
        while True:
            try:
                answer = self.vcpu.run(RUN_S * 1_000_000_000)
            except IoctlError as e:
                # Again and again in one turn would be for ever.
                n_failed = n_failed + 1 if self.turn == seen else 0
                seen = self.turn
                if e.errno != errno.EFAULT or n_failed > _MAX_FAILED_IN_A_TURN:
                    raise
                self.n_failed += 1
                self._on_failure()
                continue
            if answer != STOP or self._is_ending:
                return answer
            self.n_stops += 1

    @property
    def turn(self) -> int:
        """How many turns it has begun."""
        word = int(struct.unpack_from("<Q", self._own_page)[0])
        return word & (1 << TURN_BITS) - 1

    @property
    def is_in_guest(self) -> bool:
        return bool(self.vcpu.in_guest)

    def give_up(self, cell: int, flag: int) -> None:
        """Have it not try that again, until it is encouraged."""
        self._own_page[FLAGS_OFFSET + 8 * cell] |= flag

    def encourage(self) -> None:
        """Have it try everything again."""
        self._own_page[FLAGS_OFFSET : FLAGS_OFFSET + 8 * N_CELLS] = bytes(8 * N_CELLS)

    def wait_for_turns(self, n: int, seconds: float = 60.0) -> bool:
        """Wait for `n` turns more; False if it has ended, or does not get there."""
        wanted = self.turn + n
        deadline = time.monotonic() + seconds
        while self.turn < wanted:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                return False
            time.sleep(0.0001)
        return True

    @property
    def has_ended(self) -> bool:
        return self.answer is not None

    def end(self) -> None:
        """Have it leave; whatever it says."""
        self._is_ending = True
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + 30
        while self._thread.is_alive():
            assert time.monotonic() < deadline, "the vCPU does not stop"
            self.vcpu.stop()
            self._thread.join(1)

    def close(self) -> None:
        """Let go of its page."""
        self._own_page.release()

    def last_words(self) -> str:
        """What it left with, when it was not asked to."""
        if isinstance(self.answer, BaseException):
            return f"the vCPU's thread ended: {self.answer!r}"
        regs = self.vcpu.regs
        more = getattr(self.answer, "report", "")
        return (
            f"the vCPU ended with {self.answer!r} at {regs.rip:#x}: cell at {regs.rsi:#x} holds "
            f"{say(regs.rax)}, expected are stamps of cell {regs.r8 & 0xFFFF}; compared with "
            f"{say(regs.rcx)}, turn {regs.r13 & (1 << TURN_BITS) - 1}"
            + (f"\n{more}" if more else "")
        )
