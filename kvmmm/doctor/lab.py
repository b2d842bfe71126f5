"""`Lab`: a tiny VM around some machine code, and what came out of it.

The guest says something by `out`: PORT_END ends the run, PORT_STEP hands over to a script, a
generator that is sent rax and goes on until it yields. Exceptions by the default IDT are recorded,
and end the run unless the check says how far to skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from kvmmm.doctor.code import BASE, ENTER_RING3, MEMORY_BYTES, PORT_END, PORT_STEP, STACK_TOP
from kvmmm.errors import KvmmmError
from kvmmm.platform.kvm import boot
from kvmmm.safemem.ffi import lib
from kvmmm.vmm import result
from kvmmm.vmm.cpu_state import GENERAL
from kvmmm.vmm.exit_handler import TrapFrame
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import RunResult
from kvmmm.vmm.vector import trap_name

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from kvmmm.safemem.ffi import IoExit

    Script = Generator[None, int, Any]

TIMEOUT_SECONDS = 10.0
"""For any run. Ample: what is probed may be a virtual machine in an emulator."""


class ProbeError(KvmmmError):
    """A guest did not do what every KVM should have it do; the message says what it did."""


class Trap:
    """An exception that the guest raised.

    Attributes:
        frame: What the CPU pushed.
        cr2: The address of a #PF.
    """

    __slots__ = ("cr2", "frame")

    def __init__(self, frame: TrapFrame, cr2: int) -> None:
        self.frame = frame
        self.cr2 = cr2


class Lab:
    """A VM with a flat guest at BASE.

    Args:
        code: What it runs, 4 KiB at most.
        ring: 0, or 3 to have `ENTER_RING3` put before it.
        data: What stands at DATA.
        skips: The nth exception is stepped over by that many bytes; the one after the last ends the
            run, and so does any when there are none.

    Attributes:
        vm: The MicroVM.
        traps: Exceptions so far.
        registers: General registers at PORT_END.
        start: Address of the first byte of `code`.
    """

    def __init__(
        self, code: bytes, *, ring: int = 3, data: bytes = b"", skips: Sequence[int] = ()
    ) -> None:
        prologue = ENTER_RING3 if ring else b""
        self.start = BASE + len(prologue)
        self.traps: list[Trap] = []
        self.registers: dict[str, int] = {}
        self._skips = skips
        self._script: Script | None = None
        self._has_begun = False
        self._answer: Any = None
        image = (prologue + code).ljust(0x1000, b"\0") + data.ljust(0x2000, b"\0")
        self.vm = MicroVM(MEMORY_BYTES)
        try:
            self.vm.load(image, base=BASE)
            self.vm.vcpu.regs.rsp = STACK_TOP
            self.vm.on_out(PORT_END, self._on_end)
            self.vm.on_out(PORT_STEP, self._on_step)
            self.vm.on_out(lib.KVMMM_PORT_TRAP, self._on_trap)
        except BaseException:
            self.vm.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._script is not None:
            self._script.close()  # it may hold views of guest memory
            self._script = None
        self.vm.close()

    def run(self, *, expects_trap: bool = False) -> dict[str, int]:
        """Run to PORT_END, or to the last exception if one is expected; returns the registers.

        Raises:
            ProbeError: It ended otherwise.
        """
        run_result = self.run_raw()
        if run_result.outcome != result.EXITED:
            headline = run_result.report.partition("\n")[0]
            raise ProbeError(f"{run_result.outcome}: {headline}")
        if self.traps and not expects_trap:
            frame = self.traps[-1].frame
            raise ProbeError(
                f"{trap_name(frame.vector, frame.error_code)} at code byte {frame.rip - self.start}"
            )
        if expects_trap and not self.traps:
            raise ProbeError("no exception came")
        return self.registers

    def run_raw(self, script: Script | None = None) -> RunResult:
        """Run to whatever end, with `script` at PORT_STEP; returns what it came to."""
        if script is not None:
            self._script = script
        return self.vm.run(timeout=TIMEOUT_SECONDS)

    def play(self, script: Script) -> Any:  # noqa: ANN401 - the script's own
        """Run the guest with `script` at the other end of PORT_STEP; returns the script's answer.

        The script runs on the vCPU's thread with the guest outside KVM_RUN. The part before its
        first `yield` answers the guest's first step. When it returns, the run is over.
        """
        self._script = script
        self.run()
        return self._take_answer()

    def _take_answer(self) -> Any:  # noqa: ANN401 - the script's own
        if self._script is not None:
            raise ProbeError("the guest ended before the script did")
        return self._answer

    def write_area(self, offset: int, data: bytes) -> None:
        """Change kvmmm's own pages of this VM: descriptors, for checks that need other ones."""
        with self.vm.arena.view_of(self.vm.area.file_range) as view:
            view[offset : offset + len(data)] = data

    def _snapshot(self) -> dict[str, int]:
        regs = self.vm.vcpu.regs
        return {name: getattr(regs, name) for name in GENERAL}

    def _on_end(self, _exit: IoExit) -> RunResult:
        self.registers = self._snapshot()
        return RunResult(result.EXITED, status=0)

    def _on_step(self, _exit: IoExit) -> RunResult | None:
        script = self._script
        if script is None:
            return None
        try:
            if self._has_begun:
                script.send(self.vm.vcpu.regs.rax)
            else:
                self._has_begun = True
                next(script)
        except StopIteration as e:
            self._script, self._answer = None, e.value
            return RunResult(result.EXITED, status=0)
        return None

    def _on_trap(self, _exit: IoExit) -> RunResult | None:
        vcpu, area = self.vm.vcpu, self.vm.area
        vector = boot.vector_of_stub(vcpu.regs.rip, area.layout().stubs_gpa)
        if vector is None:
            raise ProbeError("the exception port was used by something else than a stub")
        frame = TrapFrame(vector, area.read(vcpu.regs.rsp, 48))
        sregs = vcpu.get_sregs()
        self.traps.append(Trap(frame, int(sregs.cr2)))
        if len(self.traps) > len(self._skips):
            self.registers = self._snapshot()
            return RunResult(result.EXITED, status=0)
        rip = frame.rip + self._skips[len(self.traps) - 1]
        vcpu.return_to_frame(
            sregs, rip=rip, cs=frame.cs, rflags=frame.rflags, rsp=frame.rsp, ss=frame.ss
        )
        return None
