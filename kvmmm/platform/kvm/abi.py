"""Numbers of <linux/kvm.h>: ioctls, capabilities, exit reasons, flags, under their own names.

The ioctl numbers are computed by ioctl-opt from direction, number and size, and compared with the
compiler's by a test. Source: Linux include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from ioctl_opt import IOC, IOC_NONE, IOC_READ, IOC_WRITE

from kvmmm.safemem.ffi import ffi

KVMIO = 0xAE
KVM_API_VERSION = 12


def _io(number: int) -> int:
    return int(IOC(IOC_NONE, KVMIO, number, 0))


def _iow(number: int, size_bytes: int) -> int:
    return int(IOC(IOC_WRITE, KVMIO, number, size_bytes))


def _ior(number: int, size_bytes: int) -> int:
    return int(IOC(IOC_READ, KVMIO, number, size_bytes))


def _iowr(number: int, size_bytes: int) -> int:
    return int(IOC(IOC_READ | IOC_WRITE, KVMIO, number, size_bytes))


_CPUID2_BYTES = 8  # struct kvm_cpuid2 without its flexible array
_XCRS_BYTES = 392
_XSAVE_BYTES = 4096
_VCPU_EVENTS_BYTES = 64
_MSRS_BYTES = 8  # struct kvm_msrs without its flexible array
_MP_STATE_BYTES = 4
_DEBUGREGS_BYTES = 128

# On /dev/kvm.
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, _CPUID2_BYTES)
# On a VM.
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, ffi.sizeof("struct kvm_userspace_memory_region"))
KVM_SET_TSS_ADDR = _io(0x47)
KVM_REGISTER_COALESCED_MMIO = _iow(0x67, ffi.sizeof("struct kvm_coalesced_mmio_zone"))
KVM_UNREGISTER_COALESCED_MMIO = _iow(0x68, ffi.sizeof("struct kvm_coalesced_mmio_zone"))
KVM_ENABLE_CAP = _iow(0xA3, ffi.sizeof("struct kvm_enable_cap"))
# On a vCPU.
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, ffi.sizeof("struct kvm_regs"))
KVM_SET_REGS = _iow(0x82, ffi.sizeof("struct kvm_regs"))
KVM_GET_SREGS = _ior(0x83, ffi.sizeof("struct kvm_sregs"))
KVM_SET_SREGS = _iow(0x84, ffi.sizeof("struct kvm_sregs"))
KVM_TRANSLATE = _iowr(0x85, ffi.sizeof("struct kvm_translation"))
KVM_GET_MSRS = _iowr(0x88, _MSRS_BYTES)
KVM_SET_MSRS = _iow(0x89, _MSRS_BYTES)
KVM_SET_CPUID2 = _iow(0x90, _CPUID2_BYTES)
KVM_GET_MP_STATE = _ior(0x98, _MP_STATE_BYTES)
KVM_SET_MP_STATE = _iow(0x99, _MP_STATE_BYTES)
KVM_GET_VCPU_EVENTS = _ior(0x9F, _VCPU_EVENTS_BYTES)
KVM_SET_VCPU_EVENTS = _iow(0xA0, _VCPU_EVENTS_BYTES)
KVM_GET_DEBUGREGS = _ior(0xA1, _DEBUGREGS_BYTES)
KVM_SET_DEBUGREGS = _iow(0xA2, _DEBUGREGS_BYTES)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_GET_XSAVE = _ior(0xA4, _XSAVE_BYTES)
KVM_SET_XSAVE = _iow(0xA5, _XSAVE_BYTES)
KVM_GET_XCRS = _ior(0xA6, _XCRS_BYTES)
KVM_SET_XCRS = _iow(0xA7, _XCRS_BYTES)
KVM_GET_XSAVE2 = _ior(0xCF, _XSAVE_BYTES)

KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_SYNC_MMU = 16
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_XCRS = 56
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_SYNC_REGS = 74
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_COALESCED_PIO = 162
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_XSAVE2 = 208

KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2

KVM_SYNC_X86_REGS = 1
KVM_SYNC_X86_SREGS = 2
KVM_SYNC_X86_EVENTS = 4

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24

EXIT_NAMES = {
    value: name.removeprefix("KVM_EXIT_").lower()
    for name, value in list(globals().items())
    if name.startswith("KVM_EXIT_")
}
"""Exit reasons by number, as text: `mmio`, `internal_error`."""

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1

# Source: Linux arch/x86/include/asm/msr-index.h.
MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
MSR_PAT = 0x277
MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SYSCALL_MASK = (
    0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084,
)  # fmt: skip
MSR_KERNEL_GS_BASE = 0xC000_0102
