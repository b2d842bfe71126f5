"""A run has two threads: the vCPU's own, and the caller's, which waits and can be interrupted.

A stop sets kvm_run.immediate_exit first and then kicks the vCPU's thread with a signal, again and
again until it answers. KVM completes a pending access before it looks at immediate_exit, so a
stopped guest is between two instructions, and can be run on.
"""

from __future__ import annotations

import _thread
from typing import TYPE_CHECKING

from kvmmm.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.vcpu import Vcpu

_WAIT_NS = 50_000_000
"""How long the waiting thread sleeps at most: then Python's signal handlers can run."""

_FINISHED, _CONSOLE = 1, 2


class Supervisor:
    """Runs a vCPU on a thread of its own and waits for it.

    Args:
        vcpu: What to run.
        on_console: Called on the waiting thread when console output is pending.
    """

    __slots__ = (
        "_answer",
        "_error",
        "_has_begun",
        "_is_running",
        "_on_console",
        "_vcpu",
        "is_stopping",
    )

    def __init__(self, vcpu: Vcpu, on_console: Callable[[], None]) -> None:
        self._vcpu = vcpu
        self._on_console = on_console
        self._answer: object = None
        self._error: BaseException | None = None
        self._is_running = False
        self._has_begun = False
        # Set by stop(), for handlers that wait for something; cleared when a run has answered.
        self.is_stopping = False

    def run(self, timeout_ns: int) -> object:
        """Run until a handler answers, a stop, or the deadline; returns what `VcpuCore.run` does.

        Args:
            timeout_ns: Deadline from now; 0 for none.

        Raises:
            StateError: It is running already.
            KeyboardInterrupt: Ctrl-C came while waiting (only on the main thread); the guest has
                been
                stopped, and can be run on.
            Whatever a handler, or the console's sink, raised.
        """
        if self._is_running:
            raise StateError("this VM is running already")
        self._is_running = True
        self._has_begun = False
        self._answer = self._error = None
        self._vcpu.start()
        try:
            self._start_and_wait(timeout_ns)
        finally:
            self._is_running = False
            self.is_stopping = False
        if self._error is not None:
            raise self._error
        return self._answer

    def _main(self, timeout_ns: int) -> None:
        self._has_begun = True
        try:
            self._answer = self._vcpu.run(timeout_ns)
        except BaseException as e:  # noqa: BLE001 - it travels to the waiting thread
            self._error = e
        finally:
            self._vcpu.finish()

    def _start_and_wait(self, timeout_ns: int) -> None:
        interruption: BaseException | None = None
        try:
            _thread.start_new_thread(self._main, (timeout_ns,))
        except BaseException as e:  # noqa: BLE001 - see below
            interruption = e
        while not self._is_over(interruption):
            try:
                state = self._vcpu.wait(_WAIT_NS)
                if state == _FINISHED:
                    break
                if state == _CONSOLE:
                    self._on_console()
            except BaseException as e:  # noqa: BLE001 - Ctrl-C or a sink's error: end the run first
                interruption = interruption or e
                self.stop()
        if interruption is not None:
            self._vcpu.clear_stop()  # ours, if the run ended by itself meanwhile
            raise interruption

    def _is_over(self, interruption: BaseException | None) -> bool:
        # Ctrl-C can hit while the thread is being made: only then, and only if it never was, nobody
        # will say that the run is over.
        if interruption is None or self._has_begun:
            return False
        self.stop()
        return self._vcpu.wait(_WAIT_NS * 20) == _FINISHED or not self._has_begun

    def stop(self) -> None:
        """Ask the run to end; from any thread or handler. One too early ends the next run."""
        self.is_stopping = True
        self._vcpu.stop()
