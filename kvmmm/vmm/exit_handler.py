"""What each exit means. Runs on the vCPU's thread, between two KVM_RUNs.

Every method is a handler that the C loop calls: None goes on with the guest, a `RunResult` ends
the run.

    MMIO exit ─────────► on_mmio ─► mm.handle_user_fault ─► slot ─► the access by hand
    emulation failure ─► on_cold ─► Provider.restart ─► mm.handle_user_fault for what is missing
    #PF by default IDT ► on_trap ─► mm.handle_user_fault ─► back to the instruction

When no memory is left for it, the run ends, and the guest can run on once there is some. Then an
instruction is run again, and faults again, but for an MMIO exit: KVM waits for that very access, so
it is kept, and served before anything else (`serve_unserved`).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, VcpuError
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.platform.kvm import boot, exits
from kvmmm.safemem.ffi import lib
from kvmmm.vmm import result
from kvmmm.vmm.emulation import EmulationError, Provider
from kvmmm.vmm.result import RunResult

if TYPE_CHECKING:
    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.address_space import MemslotAddressSpace
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.platform.kvm.vm import Vm
    from kvmmm.safemem.ffi import IoExit, MmioExit
    from kvmmm.vmm.boot_tables import BootTables
    from kvmmm.vmm.console import Console
    from kvmmm.vmm.stop_report import StopReporter
    from kvmmm.vmm.system_area import SystemArea

PF = 14
_PF_WRITE, _PF_FETCH = 1 << 1, 1 << 4
HAS_ERROR_CODE = frozenset((8, 10, 11, 12, 13, PF, 17, 21, 29, 30))
_MAX_REPEATS = 3
"""The same #PF so often in a row: the page tables forbid what the mm allows."""


class TrapFrame:
    """What the CPU pushed before it entered a stub (SDM Vol. 3A 6.14.2)."""

    __slots__ = ("cs", "error_code", "rflags", "rip", "rsp", "ss", "vector")

    def __init__(self, vector: int, words: bytes) -> None:
        self.vector = vector
        offset = 8 if vector in HAS_ERROR_CODE else 0
        self.error_code = struct.unpack_from("<Q", words)[0] if offset else None
        self.rip, self.cs, self.rflags, self.rsp, self.ss = struct.unpack_from("<5Q", words, offset)


class ExitHandler:
    """Handlers of one vCPU.

    Attributes:
        n_mmio: EPT violations that came as MMIO exits.
        n_served_again: How many of those are second tries, after there had been no memory.
        n_page_faults: #PFs that came through the default IDT and were handed to the mm.
        shortage: What there was no memory for, last: the arguments of ArenaExhaustedError.
        provider: Makes failed instructions restartable; counts the pages.
    """

    def __init__(
        self, vm: Vm, vcpu: Vcpu, mm: MemoryManager, space: MemslotAddressSpace, area: SystemArea,
        tables: BootTables, console: Console, reporter: StopReporter,
    ) -> None:  # fmt: skip
        self._vm = vm
        self._vcpu = vcpu
        self._mm = mm
        self._space = space
        self._area = area
        self._tables = tables
        self._console = console
        self._reporter = reporter
        self._coalesced = False
        self._last_fault: tuple[int, int] | None = None
        self._repeats = 0
        # What KVM waits for; valid until the vCPU enters again.
        self._unserved: MmioExit | None = None
        self.shortage = (0, 0, 0)
        self.n_mmio = 0
        self.n_served_again = 0
        self.n_page_faults = 0
        self.provider = Provider(vcpu, mm, space)

    def attach(self) -> None:
        """Register with the vCPU."""
        vcpu = self._vcpu
        vcpu.on_mmio = self.on_mmio
        vcpu.on_cold = self.on_cold
        vcpu.on_console = self.on_console
        vcpu.set_port(lib.KVMMM_PORT_EXIT, lib.KVMMM_PORT_KIND_VALUE, self.on_exit)
        vcpu.set_port(lib.KVMMM_PORT_DOORBELL, lib.KVMMM_PORT_KIND_DOORBELL, None)
        vcpu.set_port(lib.KVMMM_PORT_INPUT, lib.KVMMM_PORT_KIND_VALUE, self.on_input)
        vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_EXIT, self.on_trap)
        vcpu.set_port(lib.KVMMM_PORT_COM1, lib.KVMMM_PORT_KIND_COM1, None)
        vcpu.set_port(lib.KVMMM_PORT_DEBUGCON, lib.KVMMM_PORT_KIND_CONSOLE, None)
        vcpu.set_port(lib.KVMMM_PORT_DEBUG_EXIT, lib.KVMMM_PORT_KIND_VALUE, self.on_debug_exit)

    # ---- memory ----

    def on_mmio(self, exit_: MmioExit) -> RunResult | None:
        """Serve an EPT violation: a missing slot, or a write to a READONLY one."""
        self.n_mmio += 1
        access = WRITE if exit_.is_write else READ
        try:
            if self._tables.generation != self._mm.generation:
                # What a slot cannot withhold, execution, the tables must, before there is a slot.
                self._tables.refresh()
            self._mm.handle_user_fault(exit_.gpa, access)
            self._complete(exit_, access)
        except GuestFaultError as e:
            stored = exit_.value if exit_.is_write and exit_.size_bytes == 8 else None
            return self._reporter.fault(e, is_past_store=exit_.is_write, stored=stored)
        except ArenaExhaustedError as e:
            self._unserved = exit_
            return self._no_memory(e, exit_.gpa)
        return None

    def serve_unserved(self) -> RunResult | None:
        """Serve the access for which there was no memory, if the last run has ended with one.

        Before the vCPU is entered in any way. Whatever comes of it but a success or a fault leaves
        it to be served: until KVM goes on, an access by hand can be repeated.
        """
        exit_ = self._unserved
        if exit_ is None:
            return None
        self.n_served_again += 1
        answer = self.on_mmio(exit_)
        if answer is None or answer.outcome != result.MEMORY:
            self._unserved = None
        return answer

    def _no_memory(self, error: ArenaExhaustedError, addr: int | None) -> RunResult:
        self.shortage = (error.wanted_bytes, error.free_bytes, error.capacity_bytes)
        return self._reporter.memory(error, addr)

    def _complete(self, exit_: MmioExit, access: int) -> None:
        """Perform the access by hand: whoever unmaps meanwhile waits, or has come first."""
        mm = self._mm
        with mm.active_lock:
            pma = mm.pmas.find_value(exit_.gpa)
            if (
                pma is not None
                and pma.file is mm.arena
                and self._space.is_mapped(exit_.gpa, access)
            ):
                self._space.complete(exit_)
                return
        # A file that somebody may cut short under our hands; or what was just mapped is gone again.
        # The mm's copies take care of both.
        if exit_.is_write:
            mm.copy_out(exit_.gpa, exit_.data)
        else:
            exit_.value = int.from_bytes(mm.read(exit_.gpa, exit_.size_bytes), "little")

    def on_cold(self, reason: int) -> RunResult | None:
        """Serve or report any exit that is neither I/O nor MMIO."""
        exit_ = exits.decode(self._vcpu, reason)
        if isinstance(exit_, exits.InternalErrorExit) and exit_.is_emulation_failure:
            return self._restart(exit_)
        return end_of(exit_, self._reporter)

    def _restart(self, exit_: exits.InternalErrorExit) -> RunResult | None:
        try:
            if self._tables.generation != self._mm.generation:
                self._tables.refresh()
            self.provider.restart(exit_.instruction, self.n_mmio)
        except GuestFaultError as e:
            return self._reporter.fault(e, is_past_store=False)
        except ArenaExhaustedError as e:
            return self._no_memory(e, None)  # nothing has happened: it fails again
        except EmulationError as e:
            return self._reporter.emulation(e)
        return None

    # ---- the default IDT ----

    def on_trap(self, _exit: IoExit) -> RunResult | None:
        """Serve an exception that came through the default IDT."""
        regs = self._vcpu.regs
        layout = self._area.layout()
        vector = boot.vector_of_stub(regs.rip, layout.stubs_gpa)
        words = self._area.read(regs.rsp, 48)
        if vector is None or len(words) < 48:
            return None  # ring 0 wrote to our port by itself: nobody's trap
        frame = TrapFrame(vector, words)
        if vector != PF:
            return self._reporter.exception(frame)
        return self._on_page_fault(frame)

    def _on_page_fault(self, frame: TrapFrame) -> RunResult | None:
        sregs = self._vcpu.get_sregs()
        addr, code = int(sregs.cr2), frame.error_code or 0
        access = WRITE if code & _PF_WRITE else EXECUTE if code & _PF_FETCH else READ
        if self._tables.refresh():
            # They told of what was mapped before.
            self._return_from(frame, sregs)
            return None
        fault = (frame.rip, addr)
        self._repeats = self._repeats + 1 if fault == self._last_fault else 0
        self._last_fault = fault
        if sregs.cr3 != self._area.layout().root_gpa or self._repeats >= _MAX_REPEATS:
            # Tables of the guest's own: what they forbid is its own business, and it has no
            # handler.
            return self._reporter.exception(frame)
        self.n_page_faults += 1
        try:
            self._mm.handle_user_fault(addr, access)
        except GuestFaultError as e:
            return self._reporter.fault(e, is_past_store=False, frame=frame)
        except ArenaExhaustedError as e:
            self._last_fault = None  # it will be the same, and served
            self._return_from(frame, sregs)
            return self._no_memory(e, addr)
        self._return_from(frame, sregs)
        return None

    def _return_from(self, frame: TrapFrame, sregs: object) -> None:
        """Do what iretq would, by registers: works the same in every ring on every KVM."""
        self._vcpu.return_to_frame(
            sregs, rip=frame.rip, cs=frame.cs, rflags=frame.rflags, rsp=frame.rsp, ss=frame.ss
        )

    # ---- console and exit ----

    def on_console(self) -> None:
        """Drain; and once ports are used for printing, have KVM queue what comes on them."""
        self._console.drain()
        if not self._coalesced and self._vcpu.legacy_bytes:
            self._coalesced = True
            ports = (lib.KVMMM_PORT_COM1, lib.KVMMM_PORT_DEBUGCON)
            if all(self._vm.coalesce_port(port) for port in ports):
                self._vcpu.set_coalesced(self._vm.coalesced_page)

    def on_input(self, _port: int, _value: int) -> None:
        """Fill the guest's input ring."""
        self._console.drain()  # a prompt should be seen before its answer is waited for
        self._console.fill_input(self._area)

    def on_exit(self, _port: int, value: int | None) -> RunResult | None:
        """End the run with the guest's status; an IN says nothing, and reads as ones."""
        return None if value is None else RunResult(result.EXITED, status=value & 0xFF)

    def on_debug_exit(self, _port: int, value: int | None) -> RunResult | None:
        """End the run as QEMU's isa-debug-exit does; an IN reads as ones."""
        return None if value is None else RunResult(result.EXITED, status=(value << 1 | 1) & 0xFF)


def end_of(exit_: exits.ColdExit, reporter: StopReporter) -> RunResult:
    """Return what an exit that nobody can serve comes to.

    Args:
        exit_: What `exits.decode` made of it.
        reporter: Who tells.

    Raises:
        VcpuError: It says nothing about the guest's program.
    """
    if isinstance(exit_, exits.HltExit):
        return reporter.halted()
    if isinstance(exit_, exits.ShutdownExit):
        return reporter.shutdown()
    if isinstance(exit_, exits.FailEntryExit):
        raise VcpuError(
            f"the hardware refused the vCPU's state (reason {exit_.hardware_reason:#x}); "
            "on VMX see SDM Vol. 3C 27.3.1"
        )
    if isinstance(exit_, exits.InternalErrorExit):
        words = " ".join(f"{word:#x}" for word in exit_.data)
        raise VcpuError(f"KVM internal error {exit_.suberror} [{words}]; dmesg may say more")
    raise VcpuError(f"unexpected exit: {exits.OtherExit(exit_.reason).name}")
