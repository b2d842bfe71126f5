"""One vCPU: registers, translation, the cold half of it.

The KVM_RUN loop, the general registers and the two hot exits are C (`VcpuCore`); this adds the cold
half. General registers travel through kvm_run at every exit; special ones are fetched when asked
for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmmm.errors import IoctlError
from kvmmm.platform.kvm import abi, boot
from kvmmm.safemem.ffi import VcpuCore, address_of, ffi, ioctl, lib

if TYPE_CHECKING:
    from kvmmm.platform.kvm.device import Device
    from kvmmm.platform.kvm.trial import Trial


def _check(name: str, arguments: str, rc: int) -> int:
    if rc < 0:
        raise IoctlError(name, arguments, -rc)
    return rc


class Vcpu(VcpuCore):
    """A vCPU. Made by `Vm.create_vcpu`, closed by its VM. Owns the descriptor from the start.

    `run` and `once` must be called on one thread at a time; `stop` from any.
    """

    __slots__ = ("_sync", "device", "number")

    def __init__(self, fd: int, device: Device, number: int) -> None:
        try:
            super().__init__(fd, device.vcpu_mmap_bytes)
        except BaseException:
            os.close(fd)
            raise
        try:
            self._set_up(fd, device, number)
        except BaseException:
            self.close()
            raise

    def _set_up(self, fd: int, device: Device, number: int) -> None:
        self.device = device
        self.number = number
        self._sync = ffi.cast("struct kvm_run *", self.run_hva)
        _check("KVM_SET_CPUID2", "supported", ioctl(fd, abi.KVM_SET_CPUID2, device.cpuid.table_hva))
        if device.trial.has_avx:
            _check("KVM_SET_XCRS", "xcr0=7", ioctl(fd, abi.KVM_SET_XCRS, device.trial.xcrs_hva))

    @property
    def trial(self) -> Trial:
        """What the host's KVM allows."""
        return self.device.trial

    def load_boot_state(self, layout: boot.BootLayout) -> None:
        """Set the special registers for 64-bit ring 0, at the next run.

        Args:
            layout: Guest-physical addresses of root table, GDT, IDT and TSS.
        """
        run = self._sync
        sregs = lib.kvmmm_sync_sregs(run)
        ffi.memmove(sregs, self.trial.sregs, len(self.trial.sregs))
        sregs.cr3 = layout.root_gpa
        sregs.gdt.base = layout.gdt_gpa
        sregs.idt.base = layout.idt_gpa
        sregs.tr.base = layout.tss_gpa
        run.kvm_dirty_regs |= abi.KVM_SYNC_X86_SREGS

    def get_sregs(self) -> Any:  # noqa: ANN401 - a cffi struct
        """Return struct kvm_sregs as it is now (KVM_GET_SREGS)."""
        sregs = ffi.new("struct kvm_sregs *")
        _check("KVM_GET_SREGS", "", ioctl(self.fd, abi.KVM_GET_SREGS, address_of(sregs)))
        return sregs

    def set_sregs(self, sregs: Any) -> None:  # noqa: ANN401 - a cffi struct
        """Set the special registers (KVM_SET_SREGS)."""
        _check("KVM_SET_SREGS", "", ioctl(self.fd, abi.KVM_SET_SREGS, address_of(sregs)))

    def return_to_frame(
        self,
        sregs: Any,  # noqa: ANN401 - a cffi struct
        *,
        rip: int,
        cs: int,
        rflags: int,
        rsp: int,
        ss: int,
    ) -> None:
        """Do what iretq would with such a frame, at the next run; works alike in every ring.

        Args:
            sregs: What `get_sregs` gave at this exit; changed.
            rip: Where to go on.
            cs: Code selector, kernel's or user's.
            rflags: Flags.
            rsp: Stack pointer.
            ss: Stack selector.
        """
        boot.load_return_segments(sregs, cs, ss)
        sregs.tr.type = self.trial.tss_type
        run = self._sync
        ffi.memmove(lib.kvmmm_sync_sregs(run), sregs, ffi.sizeof("struct kvm_sregs"))
        run.kvm_dirty_regs |= abi.KVM_SYNC_X86_SREGS
        regs = self.regs
        regs.rip, regs.rflags, regs.rsp = rip, rflags, rsp

    def translate(self, gva: int) -> int | None:
        """Return the guest-physical address that the CPU's page tables give for `gva`.

        Only that: KVM fills the permission fields with constants (Linux arch/x86/kvm/x86.c,
        kvm_arch_vcpu_ioctl_translate). None where nothing is mapped.
        """
        request = ffi.new("struct kvm_translation *")
        request.linear_address = gva
        _check("KVM_TRANSLATE", f"{gva:#x}", ioctl(self.fd, abi.KVM_TRANSLATE, address_of(request)))
        return int(request.physical_address) if request.valid else None

    def get_xsave(self) -> bytes:
        """Return the CPU's XSAVE area, standard format, 4096 bytes (KVM_GET_XSAVE)."""
        area = ffi.new("uint8_t[4096]")
        _check("KVM_GET_XSAVE", "", ioctl(self.fd, abi.KVM_GET_XSAVE, address_of(area)))
        return bytes(ffi.buffer(area))

    @property
    def legacy_bytes(self) -> bool:
        """Whether the guest prints by ports (COM1, 0xe9)."""
        return bool(self.statistics()["legacy_bytes"])

    def run_bytes(self, length_bytes: int = 2048) -> bytes:
        """Return the start of kvm_run, for decoding a cold exit."""
        return bytes(ffi.buffer(ffi.cast("uint8_t *", self.run_hva), length_bytes))
