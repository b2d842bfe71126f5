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
    from kvmmm.platform.kvm.vcpu_state import VcpuState


def _check(name: str, arguments: str, rc: int) -> int:
    if rc < 0:
        raise IoctlError(name, arguments, -rc)
    return rc


class Vcpu(VcpuCore):
    """A vCPU. Made by `Vm.create_vcpu`, closed by its VM. Owns the descriptor from the start.

    `run` and `once` must be called on one thread at a time; `stop` and `set_root` from any.
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
        self.set_tss_type(device.trial.tss_type)
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
        sregs = lib.kvmmm_sync_sregs(self._sync)
        ffi.memmove(sregs, self.trial.sregs, len(self.trial.sregs))
        sregs.cr3 = layout.root_gpa
        sregs.gdt.base = layout.gdt_gpa
        sregs.idt.base = layout.idt_gpa
        sregs.tr.base = layout.tss_gpa
        self.sregs_written(True)

    def get_sregs(self) -> Any:  # noqa: ANN401 - a cffi struct
        """Return a copy of struct kvm_sregs as the next run begins with it."""
        self.fetch_sregs()
        sregs = ffi.new("struct kvm_sregs *")
        ffi.memmove(sregs, lib.kvmmm_sync_sregs(self._sync), ffi.sizeof("struct kvm_sregs"))
        return sregs

    def set_sregs(self, sregs: Any) -> None:  # noqa: ANN401 - a cffi struct
        """Set the special registers at once, so that a refusal shows here (KVM_SET_SREGS).

        TR's type is replaced by the one that works here; KVM tells "busy" whatever it is.
        """
        sregs.tr.type = self.trial.tss_type
        _check("KVM_SET_SREGS", "", ioctl(self.fd, abi.KVM_SET_SREGS, address_of(sregs)))
        self.registers_replaced(False)

    def set_syscall_entry(self, stub_gva: int) -> None:
        """Have SYSCALL enter at `stub_gva`, an `out` to a port of kind KVMMM_PORT_KIND_SYSCALL.

        The stub must not care in which ring it runs, on a page that ring 3 may execute: not every
        KVM changes rings at SYSCALL. Flags that would disturb it are cleared on the way (SDM Vol.
        3A 5.8.8).
        """
        from kvmmm.platform.kvm.vcpu_state import SYSCALL_FLAGS, SYSCALL_SELECTORS, set_msrs

        set_msrs(
            self,
            (
                (abi.MSR_STAR, SYSCALL_SELECTORS),
                (abi.MSR_LSTAR, stub_gva),
                (abi.MSR_SYSCALL_MASK, SYSCALL_FLAGS),
            ),
        )
        self.set_syscall_stub(stub_gva)

    def save_state(self) -> VcpuState:
        """Return everything that makes up the CPU; the run goes on as if nothing had happened.

        While nothing runs the vCPU, or in a handler of its own. What the last exit left pending is
        completed first, with the handlers.

        Raises:
            VcpuError: An access is pending that no handler serves.
            IoctlError: KVM refused.
        """
        from kvmmm.platform.kvm.vcpu_state import save

        return save(self)

    def load_state(self, state: VcpuState) -> None:
        """Become what `state` says, at once; a vCPU of another VM may have saved it.

        Raises:
            VcpuError: An access is pending that no handler serves.
            IoctlError: KVM refused.
        """
        from kvmmm.platform.kvm.vcpu_state import load

        load(self, state)

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
        ffi.memmove(lib.kvmmm_sync_sregs(self._sync), sregs, ffi.sizeof("struct kvm_sregs"))
        self.sregs_written(False)
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
