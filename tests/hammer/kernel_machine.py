"""`KernelMachine`: a `MicroVM` whose guest stamps a region of guest-physical memory.

Boot tables, one vCPU; translations are memslots, and every removal pauses the vCPU. What the guest
may not access reads as zero here, and takes no stores: it goes on behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.access import WRITE
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import STOPPED, RunResult
from tests.hammer.guest import (
    BAD_PORT,
    FORGETFUL_CODE,
    LEAVE_ALONE,
    N_CELLS,
    NEXT,
    ONLY_READ,
    PAGE,
    registers,
)  # fmt: skip
from tests.hammer.machine import Backing
from tests.hammer.stamper import STOP, Stamper
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.errors import GuestFaultError
    from kvmmm.safemem.ffi import IoExit, MmioExit

MIB = 1 << 20
_REFUSED = RunResult("refused")
OWN, REGION, PARK, KEPT = 6 * MIB, 8 * MIB, 10 * MIB, 12 * MIB


class _Refusals:
    """Stands in for the VM's reporter, where that would end the run.

    Attributes:
        last: The last refusal.
        frame: That of the exception, if it came through the IDT.
    """

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter
        self.last: GuestFaultError | None = None
        self.frame: Any = None

    def fault(self, e: GuestFaultError, *, frame: Any = None, **_facts: Any) -> RunResult:
        self.last, self.frame = e, frame
        return _REFUSED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


class _Runs:
    """What a `Stamper` takes for a vCPU."""

    def __init__(self, vm: MicroVM) -> None:
        self._vm = vm
        self.stop = vm.stop
        self.regs = vm.vcpu.regs

    @property
    def in_guest(self) -> bool:
        return self._vm.vcpu.in_guest

    def run(self, timeout_ns: int) -> object:
        result = self._vm.run(timeout_ns / 1e9)
        return STOP if result.outcome == STOPPED else result


class KernelMachine:
    """See the module comment.

    Args:
        ring: Where the guest's loop runs.
        nap: As in `UserMachine`.
        options: For `MicroVM`.

    Attributes:
        n_faults, n_refused: As in `UserMachine`.
    """

    region, park = REGION, PARK
    stride_bytes, fills, hops = PAGE, False, False

    def __init__(self, ring: int, nap: Callable[[], object] = int, **options: Any) -> None:
        self.n_faults = self.n_refused = 0
        self._nap = nap
        self._vm = MicroVM(memory=16 * MIB, **options)
        enter = Code().ring(ring).bytes
        self._next = BASE + len(enter) + NEXT
        self._vm.load(enter + FORGETFUL_CODE, base=BASE)
        self._vm.on_out(BAD_PORT, lambda _exit: RunResult("bad"))
        self.mm, self.arena, self.vm = self._vm.mm, self._vm.arena, self._vm.vm
        self.backing = Backing(self.arena, N_CELLS, PAGE)
        self.mm.mmap(
            self.backing.length_bytes, 0, addr=KEPT, fixed=True, replace=True, private=False,
            mappable=self.backing.shared,
        )  # fmt: skip
        self.vcpu = self._vm.vcpu
        for name, value in registers(0, REGION, PAGE, N_CELLS, OWN).items():
            setattr(self.vcpu.regs, name, value)
        self._catch_refusals()
        self.mm.zero_out(OWN, PAGE)
        found = self.mm.pmas.find(OWN)
        assert found is not None
        own_page = self.arena.view_of(found[2].file_range(OWN, OWN + PAGE))
        self.stampers = [Stamper(_Runs(self._vm), own_page, int)]

    # ---- what the guest may not do ----

    def _catch_refusals(self) -> None:
        handler = self._vm._handler
        self._refusals = handler._reporter = _Refusals(handler._reporter)
        self.vcpu.on_mmio = self._go_on_after(handler.on_mmio, self._skip_access)
        self.vcpu.on_cold = self._go_on_after(handler.on_cold, self._skip_instruction)
        on_trap = self._go_on_after(handler.on_trap, self._return_behind)
        self.vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_EXIT, on_trap)

    def _go_on_after(self, serve: Any, skip: Callable[[Any], object]) -> Callable[[Any], object]:
        def on_exit(exit_: Any) -> object:
            self.n_faults += 1
            self._nap()
            answer = serve(exit_)
            if answer is not _REFUSED:
                return answer
            self.n_refused += 1
            e = self._refusals.last
            assert e is not None
            assert REGION <= e.addr < REGION + N_CELLS * PAGE, e
            flag = ONLY_READ if e.access == WRITE else LEAVE_ALONE
            self.stampers[0].give_up((e.addr - REGION) // PAGE, flag)
            skip(exit_)
            return None

        return on_exit

    def _skip_access(self, exit_: MmioExit) -> None:
        # It is under way, and will be completed: with nothing.
        if not exit_.is_write:
            exit_.value = 0

    def _skip_instruction(self, _reason: int) -> None:
        self.vcpu.regs.rip = self._next

    def _return_behind(self, _exit: IoExit) -> None:
        self._vm._handler._last_fault = None  # it was not served, and will come again
        frame = self._refusals.frame
        self.vcpu.return_to_frame(
            self.vcpu.get_sregs(), rip=self._next, cs=frame.cs, rflags=frame.rflags,
            rsp=frame.rsp, ss=frame.ss,
        )  # fmt: skip

    # ---- the end ----

    def stop(self) -> None:
        for stamper in self.stampers:
            stamper.end()

    def close(self) -> None:
        for stamper in self.stampers:
            stamper.close()
        self.mm.close()
        self._vm.close()
        self.backing.file.close()
