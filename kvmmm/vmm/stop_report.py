"""The facts behind a stop: registers, code, symbols, maps, suspicions; `report.py` renders them.

Everything here is cold: it runs once, when a run has come to an end.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from kvmmm.errors import GuestBusError, KvmmmError
from kvmmm.hostarch.access import WRITE
from kvmmm.vmm import report, result
from kvmmm.vmm.cpu_state import CpuState
from kvmmm.vmm.emulation import Provider
from kvmmm.vmm.insn import store_ending_at
from kvmmm.vmm.result import RunResult

if TYPE_CHECKING:
    from kvmmm.errors import ArenaExhaustedError, GuestFaultError
    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.vmm.emulation import EmulationError
    from kvmmm.vmm.exit_handler import TrapFrame
    from kvmmm.vmm.image import Image
    from kvmmm.vmm.microvm import MicroVM
    from kvmmm.vmm.symbol import SymbolTable


class Reported(Protocol):
    """What a report asks of a VM."""

    vcpu: Vcpu

    @property
    def mm(self) -> MemoryManager:
        """The memory of the program that was stopped."""

    @property
    def image(self) -> Image | None:
        """The program."""


class _Trapped:
    """A CPU as it was before it entered a stub: its state with the frame's registers in place."""

    def __init__(self, cpu: CpuState, frame: TrapFrame) -> None:
        self._cpu = cpu
        self.values = cpu.values | {
            "rip": frame.rip, "rsp": frame.rsp, "rflags": frame.rflags, "cs": frame.cs,
            "ss": frame.ss,
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a register
        return self.values[name] if name in self.values else getattr(self._cpu, name)


class StopReporter(ABC):
    """Turns the end of a run into a `RunResult`; one for each VM."""

    def __init__(self, vm: Reported) -> None:
        self._vm = vm
        self._symbols: SymbolTable | None = None
        self._began_ns = 0

    def begin_run(self) -> None:
        """Start the clock."""
        self._began_ns = time.monotonic_ns()

    # ---- ends that carry a fault ----

    def fault(
        self,
        error: GuestFaultError,
        *,
        is_past_store: bool,
        stored: int | None = None,
        frame: TrapFrame | None = None,
    ) -> RunResult:
        """An access that the memory manager refused.

        Args:
            error: What was refused.
            is_past_store: Whether it came by an MMIO write, at which rip is past the instruction.
            stored: Then, the 8 bytes written: a call pushes its return address, the way to find it.
            frame: Where it came by the default IDT, what the CPU pushed.
        """
        cpu = self._cpu(frame)
        is_past = is_past_store and bool(error.access & WRITE)
        facts = report.FaultFacts(
            self._state(cpu), error.addr, error.access, is_past=is_past,
            store=self._store(error.addr, cpu, stored) if is_past else None,
            vector=frame.vector if frame else None,
            error_code=frame.error_code if frame else None,
            warnings=self._warnings(cpu), hint=self._fault_hint(error),
        )  # fmt: skip
        return RunResult(result.FAULT, report=report.render_fault(facts), addr=error.addr)

    def memory(self, error: ArenaExhaustedError, addr: int | None) -> RunResult:
        """No frame is left to back an access."""
        where = "" if addr is None else f"at guest address {addr:#x}: "
        return self._stop(result.MEMORY, report.ARENA, detail=f"{where}{error}", addr=addr)

    def emulation(self, error: EmulationError) -> RunResult:
        """KVM cannot run an instruction."""
        return self._stop(result.EMULATION, report.EMULATION, code=error.instruction)

    def exception(self, frame: TrapFrame) -> RunResult:
        """An exception that nobody handles, as a stub met it."""
        cpu = self._cpu(frame)
        addr = cpu.values["cr2"] if frame.vector == 14 else None
        return self._exception(cpu, frame.vector, frame.error_code, addr)

    def exception_at(self, vector: int, error_code: int | None, addr: int | None) -> RunResult:
        """The same, where the vCPU's registers are the interrupted program's already."""
        return self._exception(self._cpu(None), vector, error_code, addr)

    def _exception(
        self, cpu: CpuState | _Trapped, vector: int, error_code: int | None, addr: int | None
    ) -> RunResult:
        return self._stop(
            result.EXCEPTION, report.EXCEPTION, cpu=cpu, vector=vector, error_code=error_code,
            addr=addr, hint=self._exception_hint(vector),
        )  # fmt: skip

    # ---- ends without one ----

    def shutdown(self) -> RunResult:
        """A triple fault; SVM has reset the registers, so none are shown."""
        facts = report.StopFacts(
            report.SHUTDOWN, elapsed_ns=self._elapsed_ns(), warnings=self._warnings(self._cpu(None))
        )
        return RunResult(result.SHUTDOWN, report=report.render_stop(facts))

    def halted(self) -> RunResult:
        """A hlt that nothing can end: there is no interrupt controller."""
        cpu = self._cpu(None)
        where = self._state(cpu).name_of(cpu.values["rip"])
        return RunResult(
            result.HALTED,
            report=f"the guest halted before {where}: no interrupt can wake it, so this is its end",
        )

    def deadline(self, timeout_ns: int) -> RunResult:
        """The deadline has passed."""
        return self._stop(
            result.DEADLINE, report.DEADLINE, detail=f"it was given {timeout_ns / 1e9:g} s"
        )

    def stopped(self, by: str) -> RunResult:
        """Somebody stopped it."""
        cause = report.INTERRUPT if by == "Ctrl-C" else report.STOP
        return self._stop(result.STOPPED, cause, detail="" if by == "Ctrl-C" else f"by {by}")

    # ---- facts ----

    def _stop(
        self, outcome: str, cause: str, *, cpu: CpuState | _Trapped | None = None,
        addr: int | None = None, **facts: Any,  # noqa: ANN401 - StopFacts's own
    ) -> RunResult:  # fmt: skip
        cpu = cpu or self._cpu(None)
        stop = report.StopFacts(
            cause,
            self._state(cpu),
            elapsed_ns=self._elapsed_ns(),
            warnings=self._warnings(cpu),
            **facts,
        )
        return RunResult(outcome, report=report.render_stop(stop), addr=addr)

    def _elapsed_ns(self) -> int:
        return time.monotonic_ns() - self._began_ns

    def _cpu(self, frame: TrapFrame | None) -> CpuState | _Trapped:
        cpu = CpuState(self._vm.vcpu)
        return _Trapped(cpu, frame) if frame is not None else cpu

    def _state(self, cpu: CpuState | _Trapped) -> report.GuestState:
        mm = self._vm.mm
        with mm.mapping_lock:
            vmas = [(start, end, vma.perms, vma.name) for start, end, vma in mm.vmas]
        return report.GuestState(cpu.values, read=self._read, symbols=self._resolve, vmas=vmas)

    def _resolve(self, addr: int) -> str | None:
        if self._symbols is None:
            from kvmmm.vmm.symbol import SymbolTable

            image = self._vm.image
            if image is None:
                return None
            self._symbols = SymbolTable.from_image(image)
        return self._symbols.resolve(addr)

    def _store(
        self, addr: int, cpu: Any, stored: int | None  # noqa: ANN401 - Registers
    ) -> tuple[int, str] | None:  # fmt: skip
        return store_ending_at(self._read, cpu.rip, addr, cpu, stored=stored)

    @abstractmethod
    def _read(self, gva: int, length_bytes: int) -> bytes:
        """Return guest-virtual memory, up to the first absent byte."""

    def _warnings(self, _cpu: CpuState | _Trapped) -> list[str]:
        """Return what looks suspicious, one line each."""
        return []

    def _fault_hint(self, _error: GuestFaultError) -> str:
        """Return what to do about a fault; empty for the usual."""
        return ""

    def _exception_hint(self, _vector: int) -> str:
        """Return what to do about an exception; empty for the usual."""
        return ""


class KernelStopReporter(StopReporter):
    """The reporter of a guest kernel: its virtual addresses go through tables of its own."""

    def __init__(self, vm: MicroVM) -> None:
        super().__init__(vm)
        self._provider = Provider(vm.vcpu, vm.mm, vm.address_space)

    def _read(self, gva: int, length_bytes: int) -> bytes:
        return self._provider.read(gva, length_bytes)

    def _fault_hint(self, error: GuestFaultError) -> str:
        if isinstance(error, GuestBusError):
            return "the file that is mapped there ends before: map less of it, or make it longer"
        return ""

    def _warnings(self, cpu: CpuState | _Trapped) -> list[str]:
        """Say which of the things that a CPU writes to by itself lie in read-only memory.

        There KVM emulates instructions with the table's address for their operand, or spins:
        whatever else the report says, this explains it.
        """
        sregs = cpu.sregs
        found = []
        for name, addr, is_linear in (
            ("page tables (CR3)", int(sregs.cr3) & ~0xFFF, False),
            ("GDT", int(sregs.gdt.base), True),
            ("IDT", int(sregs.idt.base), True),
            ("TSS", int(sregs.tr.base), True),
        ):
            try:
                gpa = self._vm.vcpu.translate(addr) if is_linear else addr
            except KvmmmError:
                continue
            vma = self._vm.mm.vmas.find_value(gpa) if gpa is not None else None
            if vma is not None and not vma.effective_perms & WRITE:
                found.append(
                    f"the guest's {name} at {addr:#x} lies in read-only memory, where a CPU cannot "
                    "mark it: put it in a writable section, or load with --rwx"
                )
        return found
