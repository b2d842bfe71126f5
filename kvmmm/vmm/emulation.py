"""Instructions that KVM had to emulate and could not: made restartable.

An access to a guest-physical address without a slot is emulated by KVM, which knows plain moves
but not AVX, x87 or cmpxchg16b, and cannot fetch instructions from there at all. With
KVM_CAP_EXIT_ON_EMULATION_FAILURE nothing has happened yet when it gives up: make everything
present that the instruction touches, and let the CPU run it again. Newer kernels emulate more;
nothing here depends on which instructions those are.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from kvmmm.errors import GuestFaultError, KvmmmError
from kvmmm.hostarch.access import EXECUTE
from kvmmm.hostarch.addr import page_down
from kvmmm.platform.kvm.address_space import FETCH, pages_of
from kvmmm.vmm.cpu_state import CpuState

if TYPE_CHECKING:
    from kvmmm.platform.kvm.vcpu import Vcpu

MAX_INSTRUCTION_BYTES = 15


class Memory(Protocol):
    """Guest-physical memory: a `MemoryManager` over memslots, for one."""

    def handle_user_fault(self, addr: int, access: int, /) -> None:
        """Make `access` possible, or raise."""

    def read(self, addr: int, length_bytes: int, /, *, ignore_permissions: bool) -> bytes:
        """Return bytes of it."""


class Slots(Protocol):
    """What of it a CPU reaches: a `MemslotAddressSpace`, for one."""

    @property
    def max_addr(self) -> int:
        """One past the last address."""

    def is_mapped(self, addr: int, access: int, /) -> bool:
        """Whether a CPU can make `access` without an exit."""


class EmulationError(KvmmmError):
    """Nothing was missing: KVM cannot run this instruction.

    Attributes:
        instruction: Its bytes, as many as could be read.
    """

    def __init__(self, instruction: bytes) -> None:
        self.instruction = instruction
        super().__init__(f"KVM cannot run the instruction {instruction.hex(' ')}")


class Provider:
    """Makes present what an instruction touches.

    Attributes:
        n_pages: Pages found missing so far; each was a fault, served or refused.
    """

    def __init__(self, vcpu: Vcpu, mm: Memory, space: Slots) -> None:
        self._vcpu = vcpu
        self._mm = mm
        self._space = space
        self.n_pages = 0
        self._last_attempt = (-1, -1)
        # The legacy area and the header; with AVX the upper halves of 16 registers (SDM Vol. 1
        # 13.4).
        self._xsave_bytes = 832 if vcpu.trial.has_avx else 576

    def restart(self, instruction: bytes, n_mmio: int) -> None:
        """Serve one emulation failure; when this returns, run the vCPU again.

        Args:
            instruction: Bytes at rip as KVM reports them; may be empty.
            n_mmio: MMIO exits served so far: whether anything happened since the last failure.

        Raises:
            GuestFaultError: An operand, or the instruction itself, may not be accessed.
            ArenaExhaustedError: No memory is left.
            EmulationError: Everything was there already.
        """
        # Imported late: capstone takes longer to import than a VM to start.
        from kvmmm.vmm.decode import UndecodableError
        from kvmmm.vmm.operand import memory_operands

        cpu = CpuState(self._vcpu)
        n_served = self._provide(cpu.rip, 1, EXECUTE)
        with suppress(GuestFaultError):  # the instruction need not be that long
            n_served += self._provide(cpu.rip + MAX_INSTRUCTION_BYTES - 1, 1, EXECUTE)
        code = self.read(cpu.rip, MAX_INSTRUCTION_BYTES) or instruction
        try:
            operands = memory_operands(code, cpu.rip, cpu, xsave_bytes=self._xsave_bytes)
        except UndecodableError:
            operands = []
        for operand in operands:
            n_served += self._provide(operand.gva, operand.length_bytes, operand.access)
        if n_served:
            return
        # Nothing was missing. KVM may have read an operand by MMIO exits, which installed it,
        # before it gave up (cmpxchg16b): so once more, but not twice without anything served in
        # between.
        attempt = (cpu.rip, n_mmio)
        if attempt == self._last_attempt:
            raise EmulationError(code)
        self._last_attempt = attempt

    def _provide(self, gva: int, length_bytes: int, access: int) -> int:
        """Make `access` to each page of [gva, gva + length_bytes) possible; how many it was not."""
        n_served = 0
        for page in pages_of(gva, length_bytes):
            gpa = self._vcpu.translate(max(page, gva))
            if gpa is None:
                continue  # not in the guest's own tables: the CPU raises #PF, the guest's own
            if self._space.is_mapped(gpa, FETCH if access & EXECUTE else access):
                continue
            self.n_pages += 1
            self._mm.handle_user_fault(gpa, access)
            n_served += 1
        return n_served

    def read(self, gva: int, length_bytes: int) -> bytes:
        """Return guest memory through the CPU's page tables, up to the first absent byte."""
        data = b""
        for page in pages_of(gva, length_bytes):
            start = max(page, gva)
            gpa = self._vcpu.translate(start)
            if gpa is None:
                break
            n_bytes = min(gva + length_bytes, page_down(start) + 4096) - start
            piece = self._peek(gpa, n_bytes)
            data += piece
            if len(piece) < n_bytes:
                break
        return data

    def _peek(self, gpa: int, n_bytes: int) -> bytes:
        # Looking must not allocate: what no slot covers has no bytes yet.
        if not self._space.is_mapped(gpa, 0) or gpa >= self._space.max_addr:
            return b""
        try:
            return self._mm.read(gpa, n_bytes, ignore_permissions=True)
        except KvmmmError:
            return b""
