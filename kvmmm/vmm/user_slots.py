"""Memslots that come when a CPU gets there: what `lazy_slots` means to the exits of a `UserVM`.

A plain access to a frame without a slot is an MMIO exit; what KVM cannot emulate, a fetch among
them, is a failure that can be restarted once the slots are there (`emulation`). Both ask
`GuestPhysical`, which knows whose the frame is; the memory manager was asked before, by a #PF.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.vmm.emulation import Provider

if TYPE_CHECKING:
    from kvmmm.platform.kvm.guest_physical import GuestPhysical
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.safemem.ffi import MmioExit


class LazySlots:
    """Serves the EPT violations of one vCPU.

    Attributes:
        n_mmio: How many came as MMIO exits.
    """

    __slots__ = ("_physical", "_provider", "n_mmio")

    def __init__(self, physical: GuestPhysical, vcpu: Vcpu) -> None:
        self._physical = physical
        self._provider = Provider(vcpu, self, self)
        self.n_mmio = 0

    @property
    def n_violations(self) -> int:
        """EPT violations served, however they came."""
        return self.n_mmio + self._provider.n_pages

    def on_mmio(self, exit_: MmioExit) -> bool:
        """Register the slot, then perform the access.

        Returns:
            False: somebody has cut the file short, and not all of the bytes are there.
        """
        self.n_mmio += 1
        self.handle_user_fault(exit_.gpa, WRITE if exit_.is_write else READ)
        window = self._physical.window_at(exit_.gpa)
        if window is None or not window.file.may_fault:
            self._physical.complete(exit_)
            return True
        fo = exit_.gpa - window.base
        if exit_.is_write:
            return window.file.write_from(fo, memoryview(exit_.data)) == exit_.size_bytes
        data = bytearray(exit_.size_bytes)
        n_bytes = window.file.read_into(fo, memoryview(data))
        exit_.value = int.from_bytes(data, "little")
        return n_bytes == exit_.size_bytes

    def restart(self, instruction: bytes) -> None:
        """Register the slots of what an instruction touches.

        Raises:
            EmulationError: All were there.
        """
        self._provider.restart(instruction, self.n_mmio)

    # ---- what `Provider` asks of memory; addresses are guest-physical ----

    @property
    def max_addr(self) -> int:
        """One past the last address."""
        return 1 << 64

    def is_mapped(self, addr: int, _access: int) -> bool:
        """Whether there is a slot."""
        return self._physical.vm.memslots.find(addr) is not None

    def handle_user_fault(self, addr: int, access: int) -> None:
        """Register a slot."""
        self._physical.serve_violation(addr, access)

    def read(self, addr: int, length_bytes: int, *, ignore_permissions: bool = False) -> bytes:  # noqa: ARG002
        """Return bytes of a frame, within one page."""
        window = self._physical.window_at(addr)
        if window is None:
            return b""
        fo = addr - window.base
        with window.file.view_of(FileRange(fo, fo + length_bytes)) as view:
            return bytes(view)
