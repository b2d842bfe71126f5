"""What the host's KVM allows where only trying tells, found in a throw-away VM, once a process.

CPUID lies in both directions on nested KVMs, and VMX, SVM and emulations of them do not agree on
everything. So each question is put to KVM itself, by a guest of one instruction where it must be.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, Self

from kvmmm.errors import IoctlError
from kvmmm.platform.kvm import abi, boot
from kvmmm.safemem.ffi import HostMapping, IoExit, VcpuCore, address_of, ffi, ioctl, lib

if TYPE_CHECKING:
    from kvmmm.platform.kvm.device import Device

_TIMEOUT_NS = 5_000_000_000

# The guest-physical pages of the guest that tries a port: three tables, code, then GDT and TSS.
_CODE, _GDT, _TSS, _MEMORY_BYTES = 0x3000, 0x4000, 0x4100, 0x5000
_TABLE, _LEAF_2M = 0x7, 0x87  # present, writable, user; and a page-directory leaf


class Trial:
    """What was found.

    Attributes:
        has_avx: CR4.OSXSAVE and XCR0 = x87|SSE|AVX were taken.
        has_fsgsbase: CR4.FSGSBASE was taken.
        ports_open: Ring 3 can use a port through the TSS's I/O bitmap.
        tsc_hz: The guest's TSC frequency; 0 where KVM does not say.
        tss_type: The type in TR that made it so. KVM_GET_SREGS may tell another (SVM: always busy).
        sregs: Special registers for 64-bit ring 0, lacking only table addresses; bytes.
        xcrs_hva: Address of a struct kvm_xcrs with XCR0 = 7.
    """

    __slots__ = (
        *(
            "_xcrs",
            "has_avx",
            "has_fsgsbase",
            "ports_open",
            "sregs",
            "tsc_hz",
            "tss_type",
            "xcrs_hva",
        ),
    )

    def __init__(self, device: Device) -> None:
        self._xcrs = boot.xcrs_with_avx()
        self.xcrs_hva = address_of(self._xcrs)
        sregs = ffi.new("struct kvm_sregs *")
        with _Machine(device) as machine:
            machine.get_sregs(sregs)
            self.tsc_hz = machine.tsc_hz()
            boot.fill_sregs(sregs)
            self.has_fsgsbase = machine.takes(sregs, boot.CR4_FSGSBASE)
            self.has_avx = machine.takes(sregs, boot.CR4_OSXSAVE) and machine.sets(self.xcrs_hva)
            if not self.has_avx:
                sregs.cr4 &= ~boot.CR4_OSXSAVE
        # VMX insists on a busy TSS in TR; an emulated SVM has been seen that reads the I/O bitmap
        # of an available one only.
        self.ports_open = False
        for tss_type in (boot.TSS_BUSY, boot.TSS_AVAILABLE):
            sregs.tr.type = tss_type
            with _Machine(device) as machine:
                if machine.outputs_from_ring_3(sregs):
                    self.ports_open = True
                    break
        else:
            sregs.tr.type = boot.TSS_BUSY
        self.tss_type = int(sregs.tr.type)
        self.sregs = bytes(ffi.buffer(sregs))


class _Machine:
    """The smallest VM that can execute one instruction in ring 3."""

    def __init__(self, device: Device) -> None:
        self._vm_fd = ioctl(device.fd, abi.KVM_CREATE_VM)
        if self._vm_fd < 0:
            raise IoctlError("KVM_CREATE_VM", "type=0", -self._vm_fd)
        self._vcpu: VcpuCore | None = None
        try:
            ioctl(self._vm_fd, abi.KVM_SET_TSS_ADDR, boot.VMX_TSS_ADDR)
            fd = self._vm_ioctl("KVM_CREATE_VCPU", abi.KVM_CREATE_VCPU, 0)
            try:
                self._vcpu = VcpuCore(fd, device.vcpu_mmap_bytes)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd
            ioctl(fd, abi.KVM_SET_CPUID2, device.cpuid.table_hva)  # a refusal shows in the answers
        except BaseException:
            self.close()
            raise

    def _vm_ioctl(self, name: str, request: int, argument: int) -> int:
        rc = ioctl(self._vm_fd, request, argument)
        if rc < 0:
            raise IoctlError(name, "self-test", -rc)
        return rc

    def get_sregs(self, sregs: Any) -> None:  # noqa: ANN401 - a cffi struct
        """Fill in the special registers as KVM made them."""
        rc = ioctl(self._fd, abi.KVM_GET_SREGS, address_of(sregs))
        if rc < 0:
            raise IoctlError("KVM_GET_SREGS", "self-test", -rc)

    def tsc_hz(self) -> int:
        """Return the guest's TSC frequency; 0 where KVM does not say."""
        return max(0, ioctl(self._fd, abi.KVM_GET_TSC_KHZ)) * 1000

    def takes(self, sregs: Any, cr4_bits: int) -> bool:  # noqa: ANN401 - a cffi struct
        """Set CR4 bits in `sregs`, and leave them there if KVM takes them."""
        # SET_SREGS wants a paging root only at entry: CR3 = 0 is fine for asking.
        sregs.cr4 |= cr4_bits
        if ioctl(self._fd, abi.KVM_SET_SREGS, address_of(sregs)) == 0:
            return True
        sregs.cr4 &= ~cr4_bits
        return False

    def sets(self, xcrs_hva: int) -> bool:
        """Return whether KVM takes this struct kvm_xcrs."""
        return ioctl(self._fd, abi.KVM_SET_XCRS, xcrs_hva) == 0

    def outputs_from_ring_3(self, sregs: Any) -> bool:  # noqa: ANN401 - a cffi struct
        """Execute `out %al, $port` in ring 3; False when it raised an exception instead."""
        memory_fd = os.memfd_create("kvmmm-trial", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory_fd, _MEMORY_BYTES)
            mapping = HostMapping(memory_fd, _MEMORY_BYTES, 4096)
        finally:
            os.close(memory_fd)
        with memoryview(mapping) as memory:
            struct.pack_into("<Q", memory, 0x0000, 0x1000 | _TABLE)
            struct.pack_into("<Q", memory, 0x1000, 0x2000 | _TABLE)
            struct.pack_into("<Q", memory, 0x2000, _LEAF_2M)
            memory[_CODE : _CODE + 2] = bytes((0xE6, lib.KVMMM_PORT_EXIT))
            memory[_GDT : _GDT + boot.GDT_BYTES] = boot.gdt(_TSS)
            memory[_TSS : _TSS + boot.TSS_BYTES] = boot.tss(_MEMORY_BYTES)
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.memory_size = _MEMORY_BYTES
        region.userspace_addr = mapping.hva
        self._vm_ioctl(
            "KVM_SET_USER_MEMORY_REGION", abi.KVM_SET_USER_MEMORY_REGION, address_of(region)
        )
        works = self._run(sregs)
        self.close()  # before the memory that it uses
        mapping.close()
        return works

    def _run(self, sregs: Any) -> bool:  # noqa: ANN401 - a cffi struct
        mine = ffi.new("struct kvm_sregs *", sregs[0])
        boot.load_return_segments(mine, lib.KVMMM_USER_CS, lib.KVMMM_USER_DS)
        mine.cr3 = 0
        mine.gdt.base, mine.tr.base = _GDT, _TSS
        mine.idt.base = mine.idt.limit = 0  # an exception ends in a triple fault
        if self._vcpu is None or ioctl(self._fd, abi.KVM_SET_SREGS, address_of(mine)) < 0:
            return False
        self._vcpu.set_port(lib.KVMMM_PORT_EXIT, lib.KVMMM_PORT_KIND_EXIT, None)
        self._vcpu.regs.rip = _CODE
        self._vcpu.regs.rflags = boot.RFLAGS_RESERVED
        return isinstance(self._vcpu.once(_TIMEOUT_NS), IoExit)

    def close(self) -> None:
        """Close vCPU and VM. Idempotent."""
        if self._vcpu is not None:
            self._vcpu.close()
            self._vcpu = None
        if self._vm_fd >= 0:
            os.close(self._vm_fd)
            self._vm_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
