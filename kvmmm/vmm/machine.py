"""`Machine`: what `MicroVM` and `UserVM` have in common: a run from its start to its result."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from kvmmm.errors import IoctlError, KvmmmError, StateError
from kvmmm.hostarch.units import parse_duration_ns
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.result import RESUMABLE, RunResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.vmm.console import Console
    from kvmmm.vmm.statistics import RunStatistics
    from kvmmm.vmm.stop_report import StopReporter

_MAX_TRIES = 100
"""So often KVM_RUN may fail with EFAULT in a row, 1 ms apart, when no file was cut short: whoever
cuts one may have noticed it first, and be at taking the pages back."""


class Machine(ABC):
    """One VM with one vCPU, which runs on the thread that calls `run`.

    A timer makes it leave the guest 20 times a second, for Ctrl-C and whatever else Python's signal
    handlers do.

    Lifetime: `close`, or the end of a `with`. Not to be shared between threads, but for `stop` and
    copies through `mm`.

    Attributes:
        vcpu: The vCPU, for registers and for handlers of one's own (`on_out`).
    """

    vcpu: Vcpu
    _console: Console
    _reporter: StopReporter

    def __init__(self) -> None:
        # What `close` undoes, last first.
        self._closers: list[Callable[[], None]] = []
        self._is_loaded = False
        self._has_ended = False
        self._last_result: RunResult | None = None

    @abstractmethod
    def statistics(self) -> RunStatistics:
        """Return counts and times since the VM was made."""

    @abstractmethod
    def _prepare(self) -> None:
        """Do what is left to do before the guest runs, or runs on."""

    @abstractmethod
    def _managers(self) -> Iterable[MemoryManager]:
        """Return the memory of all whom the vCPU runs."""

    def _run_vcpu(self, timeout_ns: int) -> object:
        """Run until there is an answer, as `VcpuCore.run` does."""
        return self.vcpu.run(timeout_ns)

    def _run_guest(self, timeout_ns: int) -> object:
        # KVM_RUN fails with EFAULT where there is no page behind a memslot: somebody has cut a
        # mapped file short. Nothing has happened yet. Once the mm has taken the pages back, the
        # guest's next try is a fault like any other.
        until_ns = time.monotonic_ns() + timeout_ns
        n_tries = 0
        while True:
            try:
                return self._run_vcpu(timeout_ns)
            except IoctlError as e:
                if e.errno != errno.EFAULT or e.ioctl != "KVM_RUN":
                    raise
            if self._revalidate_files():
                n_tries = 0
            elif (n_tries := n_tries + 1) < _MAX_TRIES:
                time.sleep(0.001)
            else:
                raise _unreadable()
            if timeout_ns:
                timeout_ns = until_ns - time.monotonic_ns()
                if timeout_ns <= 0:
                    return -lib.KVMMM_STOP_DEADLINE

    def _revalidate_files(self) -> bool:
        """Take back what is gone of the files that are mapped; whether anything was."""
        from kvmmm.memmap.host_file import HostFile

        files = set()
        for mm in self._managers():
            with mm.mapping_lock:
                mappables = {vma.mappable for _, _, vma in mm.vmas}
            files |= {mappable for mappable in mappables if isinstance(mappable, HostFile)}
        return sum(file.revalidate() for file in files) > 0  # all of them

    def _is_broken(self) -> bool:
        """Return whether an exception out of `_run_guest` has left the guest unable to run on."""
        # Out of a handler it leaves an access half done; out of a tick it does not.
        return self.vcpu.handler_failed

    def _count_tests(self) -> tuple[int, int]:
        """Return (passed, failed) as the guest reported them."""
        return 0, 0

    def run(self, timeout: float | str | None = None) -> RunResult:
        """Run the guest until it exits, fails, is stopped, or the deadline passes.

        Args:
            timeout: Deadline in seconds, or as `"250ms"`; None for none.

        Returns:
            What it came to. A deadline, a stop, `RunResult("paused")` from a handler, and memory
            that is exhausted leave the guest able to run on (`result.RESUMABLE`): nothing is lost,
            and nothing happens twice. Anything else ends it.

        Raises:
            StateError: Nothing is loaded, it is running, or it has ended.
            KeyboardInterrupt: Ctrl-C, when this is the main thread; a note says where it was.
            Whatever a handler or the console's sink raises; that ends the guest.
            VcpuError: KVM gave up.
            IoctlError: KVM_RUN failed; with EFAULT, guest memory cannot be read on the host.
        """
        self._check_runnable()
        timeout_ns = parse_duration_ns(timeout) if timeout is not None else 0
        self._settle()
        self._prepare()
        self._reporter.begin_run()
        try:
            answer = self._run_guest(timeout_ns)
        except BaseException as e:
            self._has_ended = self._is_broken()
            if isinstance(e, KeyboardInterrupt):
                self._console.drain()
                e.add_note(self._reporter.stopped("Ctrl-C").report)
            raise
        result = self._result_of(answer, timeout_ns)
        self._console.drain()
        result.console = self._console.take_output()
        result.tests = self._count_tests()
        result.defer_stats(self.statistics)
        self._last_result = result
        return result

    def _result_of(self, answer: object, timeout_ns: int) -> RunResult:
        if answer == -lib.KVMMM_STOP_DEADLINE:
            return self._reporter.deadline(timeout_ns)
        if answer == -lib.KVMMM_STOP_REQUEST:
            return self._reporter.stopped("stop()")
        if isinstance(answer, RunResult):
            self._has_ended = answer.outcome not in RESUMABLE
            return answer
        raise KvmmmError(f"a handler answered {answer!r}, which is no RunResult")

    def _settle(self) -> None:
        """Have the last result's statistics taken, before anything changes them."""
        if self._last_result is not None:
            self._last_result.settle()
            self._last_result = None

    def stop(self) -> None:
        """End the run from any thread, within moments; `run` returns outcome `stopped`.

        A stop that comes while nothing runs ends the next run before its first instruction.
        """
        self.vcpu.stop()

    def on_out(
        self, port: int, handler: Callable[..., object] | None, *, value_only: bool = False
    ) -> None:
        """Have `handler` called when the guest uses an I/O port.

        Args:
            port: The port; ring 3 may use those of `boot.OPEN_PORTS`.
            handler: `handler(exit)` with an `IoExit`, or with `value_only` `handler(port, value)`,
                which is twice as fast. A `RunResult` it returns ends the run; None goes on. For IN,
                the first kind sets `exit.value`, the second returns the number (its `value` is
                None). No handler: nobody is at that port.
            value_only: Which of the two.
        """
        kind = lib.KVMMM_PORT_KIND_VALUE if value_only else lib.KVMMM_PORT_KIND_EXIT
        self.vcpu.set_port(port, kind if handler is not None else 0, handler)

    def _check_runnable(self) -> None:
        self._check_open()
        if not self._is_loaded:
            raise StateError("nothing is loaded: call load() first")
        if self._has_ended:
            raise StateError(f"this guest has ended: make another {type(self).__name__}")
        if self.vcpu.thread_id:
            raise StateError("this VM is running already")

    def _check_open(self) -> None:
        if not self._closers:
            raise StateError("this VM is closed")

    def close(self) -> None:
        """Release everything, vCPU first, arena last. Idempotent; also after an error in between.

        Raises:
            StateError: The guest is running.
            BufferError: A memoryview of guest memory is still held.
        """
        if self._closers:
            self._settle()
        while self._closers:
            self._closers[-1]()
            self._closers.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_closers"):
            self._last_result = None  # whoever held it would hold us by it
            self.close()


def _unreadable() -> IoctlError:
    return IoctlError(
        "KVM_RUN", "", errno.EFAULT,
        "the guest got to memory that the host itself cannot read or write, and none of the files "
        "that are mapped was cut short: their storage may have failed, or somebody has changed "
        "this process's mapping of it",
    )  # fmt: skip
