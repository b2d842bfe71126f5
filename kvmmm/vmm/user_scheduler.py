"""Who runs: the processes of a `UserVM` take turns on its one vCPU.

    running ──slice over, sched_yield──► waiting ──its turn──► running
       │ fork: the child waits, with the parent's registers and 0 in rax
       └──exit──► gone: its memory is freed at the turn after it

A process's registers are in the vCPU while it runs, and in its `state` while it waits. The root of
its page tables is not part of them: it may change while it waits, and is loaded anew at each turn.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from typing import TYPE_CHECKING

from kvmmm.errors import MmError
from kvmmm.mm.manager import Counters
from kvmmm.safemem.ffi import lib
from kvmmm.vmm import result
from kvmmm.vmm.result import RunResult
from kvmmm.vmm.user_process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
    from kvmmm.platform.kvm.vcpu import Vcpu

SLICE_NS = 50_000_000
"""How long a process runs while others wait."""
MAX_PROCESSES = 512

_GO_ON = object()
_TURN = object()
"""What a handler answers to have the vCPU's run end and be begun anew: with the same process, or
with the next one."""


class Scheduler:
    """The processes of one VM, in turn.

    Args:
        vcpu: What they run on.
        new_space: Makes the page tables of a child.

    Attributes:
        running: Who runs, or ran last.
        first: The process whose status the run has.
        waiting: Who waits, the next one first.
        is_broken: Whether a turn was interrupted: nobody can run on.
    """

    __slots__ = (
        "_ended_counters", "_new_space", "_next_pid", "_vcpu", "first", "is_broken", "running",
        "waiting",
    )  # fmt: skip

    def __init__(self, vcpu: Vcpu, new_space: Callable[[], PageTableAddressSpace]) -> None:
        self._vcpu = vcpu
        self._new_space = new_space
        self._next_pid = 1
        self._ended_counters = Counters()
        self.running: Process | None = None
        self.first: Process | None = None
        self.waiting: deque[Process] = deque()
        self.is_broken = False

    def take_pid(self) -> int:
        """Return a number that no process has had."""
        pid = self._next_pid
        self._next_pid += 1
        return pid

    def begin(self, process: Process) -> None:
        """Have the first process run; the vCPU has its registers already."""
        process.space.activate(self._vcpu)
        self._vcpu.on_fault = process.mm.handle_user_fault
        self.running = self.first = process

    def run(self, timeout_ns: int) -> object:
        """Run them until there is an answer, as `VcpuCore.run` does."""
        deadline_ns = time.monotonic_ns() + timeout_ns if timeout_ns else 0
        while True:
            slice_ns = SLICE_NS if self.waiting else 0
            if deadline_ns:
                left_ns = max(1, deadline_ns - time.monotonic_ns())
                slice_ns = min(left_ns, slice_ns or left_ns)
            answer = self._vcpu.run(slice_ns)
            if answer is _GO_ON:
                continue
            is_over = answer == -lib.KVMMM_STOP_DEADLINE
            if is_over and (not deadline_ns or time.monotonic_ns() < deadline_ns):
                answer = _TURN
            if answer is not _TURN:
                return answer
            self.is_broken = True  # unless it comes to its end: Ctrl-C may come in between
            self._turn()
            self.is_broken = False

    def _turn(self) -> None:
        # Whoever is not gone is in `running` or `waiting` at any time, so that `close` finds him.
        vcpu, old = self._vcpu, self.running
        if not self.waiting or old is None:
            return
        new = self.waiting[0]
        if old.status is None:
            old.state = vcpu.save_state()
            self.waiting.append(old)
        assert new.state is not None  # noqa: S101 - who waits has it
        vcpu.load_state(new.state)
        new.space.activate(vcpu)
        vcpu.on_fault = new.mm.handle_user_fault
        new.state = None
        self.running = self.waiting.popleft()
        if old.status is not None:
            add_counters(self._ended_counters, old.mm.counters)
            old.close()

    # ---- system calls ----

    def yield_cpu(self) -> object:
        """Answer a sched_yield: the next process runs."""
        if not self.waiting:
            return 0
        self._vcpu.regs.rax = 0
        return _TURN

    def fork(self, parent: Process) -> object:
        """Answer a fork: the parent goes on, the child waits for its turn.

        Raises:
            MmError: EAGAIN, there are too many processes.
            ArenaExhaustedError: No memory for the child's tables.
            OSError: What the mm says.
        """
        if len(self.waiting) + 1 >= MAX_PROCESSES:
            raise MmError(errno.EAGAIN, "fork", 0, f"{MAX_PROCESSES} processes are enough")
        regs = self._vcpu.regs
        regs.rax = 0
        state = self._vcpu.save_state()
        space = self._new_space()
        try:
            mm = parent.mm.fork(space)
        except BaseException:
            space.release()
            raise
        child = Process(self.take_pid(), mm, space, parent.image, parent=parent, files=parent.files)
        child.state = state
        self.waiting.append(child)
        regs.rax = child.pid
        return _GO_ON  # from now on there are slices

    def end(self, process: Process, status: int) -> object:
        """Answer an exit: the next process runs, or the run is over."""
        process.status = status
        if self.waiting:
            return _TURN
        first = self.first or process
        return RunResult(result.EXITED, status=first.status)

    # ---- the end ----

    def counters(self) -> Counters:
        """Return what all processes together have counted."""
        total = Counters()
        add_counters(total, self._ended_counters)
        for process in (*self.waiting, *([self.running] if self.running is not None else ())):
            add_counters(total, process.mm.counters)
        return total

    def close(self) -> None:
        """Free the memory of all that live. Idempotent.

        Preconditions:
            - The vCPU does not run any more.
        """
        while self.waiting:
            self.waiting[-1].close()
            self.waiting.pop()
        if self.running is not None:
            self.running.space.deactivate(self._vcpu)
            self.running.close()


def add_counters(total: Counters, more: Counters) -> None:
    """Add `more` to `total`."""
    for name in Counters.__slots__:
        setattr(total, name, getattr(total, name) + getattr(more, name))
