"""What a run came to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.statistics import RunStatistics

EXITED = "exited"
FAULT = "fault"
EXCEPTION = "exception"
MEMORY = "memory"
EMULATION = "emulation"
SHUTDOWN = "shutdown"
HALTED = "halted"
DEADLINE = "deadline"
STOPPED = "stopped"
PAUSED = "paused"

RESUMABLE = frozenset((DEADLINE, STOPPED, PAUSED, MEMORY))
"""After these the guest can run on. `PAUSED` is for handlers: they answer `RunResult(PAUSED)` where
the host wants to do something that takes a guest that does not run, `fork` for one. After `MEMORY`
the host should free some first: otherwise the next run ends as this one did."""

_EXIT_CODES = {
    FAULT: errors.EXIT_FAULT,
    EXCEPTION: errors.EXIT_EXCEPTION,
    MEMORY: errors.EXIT_MEMORY,
    EMULATION: errors.EXIT_EMULATION,
    SHUTDOWN: errors.EXIT_SHUTDOWN,
    DEADLINE: errors.EXIT_DEADLINE,
    STOPPED: errors.EXIT_STOPPED,
    PAUSED: errors.EXIT_STOPPED,
    HALTED: 0,
}


class RunResult:
    """How a run ended.

    Attributes:
        outcome: One of the constants of this module: `"exited"` when the guest ended it itself.
        status: The guest's exit status, 0 to 255; None unless it exited.
        report: What happened and where, one screen of text; empty when the guest exited.
        console: What the guest printed in this run; empty when a sink was given.
        addr: Guest address of a fault; None otherwise.
        tests: (passed, failed) as the guest reported them.
    """

    __slots__ = ("_stats", "_take_stats", "addr", "console", "outcome", "report", "status", "tests")

    def __init__(
        self, outcome: str, *, status: int | None = None, report: str = "", addr: int | None = None
    ) -> None:
        self.outcome = outcome
        self.status = status
        self.report = report
        self.addr = addr
        self.console = b""
        self.tests = (0, 0)
        self._stats: RunStatistics | None = None
        self._take_stats: Callable[[], RunStatistics] | None = None

    @property
    def stats(self) -> RunStatistics | None:
        """Counts and times as they were when the run ended, gathered when first asked for."""
        self.settle()
        return self._stats

    def defer_stats(self, take: Callable[[], RunStatistics]) -> None:
        """Have `take` called for `stats`; whoever changes what it counts calls `settle` first."""
        self._take_stats = take

    def settle(self) -> None:
        """Gather the statistics now, if that has not been done."""
        if self._take_stats is not None:
            self._stats = self._take_stats()
            self._take_stats = None

    @property
    def ok(self) -> bool:
        """Whether the guest exited with status 0 and none of its tests failed."""
        return self.outcome == EXITED and self.status == 0 and not self.tests[1]

    @property
    def exit_code(self) -> int:
        """What the command line ends with: the guest's status, or kvmmm's code for the cause."""
        return self.status if self.status is not None else _EXIT_CODES[self.outcome]

    def __repr__(self) -> str:
        status = f", status={self.status}" if self.status is not None else ""
        return f"<RunResult {self.outcome}{status}>"
