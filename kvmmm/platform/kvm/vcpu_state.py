"""A vCPU's state as a value: saved from one, loaded into another, of another VM too.

Memory, the ports' handlers and where traps go are not part of it. The time stamp counter is not
either: not every KVM can set it.

Order of loading, as KVM's ioctls build on each other (Linux arch/x86/kvm/x86.c): special registers
first (the mode), then XCR0 before the XSAVE area, general registers before the events (setting them
forgets a pending exception).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmmm.errors import IoctlError, VcpuError
from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import address_of, ffi, ioctl, lib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmmm.platform.kvm.vcpu import Vcpu

SYSCALL_SELECTORS = lib.KVMMM_KERNEL_CS << 32 | lib.KVMMM_USER32_CS << 48
"""MSR_STAR: SYSCALL loads CS 0x10 and SS 0x18, SYSRET the user's (SDM Vol. 3A 5.8.8)."""

_TF, _IF, _DF, _NT, _AC = 1 << 8, 1 << 9, 1 << 10, 1 << 14, 1 << 18
SYSCALL_FLAGS = _TF | _IF | _DF | _NT | _AC
"""MSR_SYSCALL_MASK: flags that SYSCALL clears."""

_MSRS = (
    *(abi.MSR_STAR, abi.MSR_LSTAR, abi.MSR_CSTAR, abi.MSR_SYSCALL_MASK, abi.MSR_KERNEL_GS_BASE),
    *(abi.MSR_SYSENTER_CS, abi.MSR_SYSENTER_ESP, abi.MSR_SYSENTER_EIP, abi.MSR_PAT),
)
# FS and GS bases and EFER are special registers.

_MSR = struct.Struct("<IIQ")  # struct kvm_msr_entry: index, reserved, data
_HEADER_BYTES = 8  # of struct kvm_msrs

# What is read and written whole: attribute, request that reads, request that writes, bytes. In the
# order of loading; `msrs` come before the events.
_PARTS = (
    ("sregs", abi.KVM_GET_SREGS, abi.KVM_SET_SREGS, ffi.sizeof("struct kvm_sregs")),
    ("xcrs", abi.KVM_GET_XCRS, abi.KVM_SET_XCRS, 392),
    ("xsave", abi.KVM_GET_XSAVE, abi.KVM_SET_XSAVE, 4096),  # but see _xsave_part
    ("regs", abi.KVM_GET_REGS, abi.KVM_SET_REGS, ffi.sizeof("struct kvm_regs")),
    ("debugregs", abi.KVM_GET_DEBUGREGS, abi.KVM_SET_DEBUGREGS, 128),
    ("mp_state", abi.KVM_GET_MP_STATE, abi.KVM_SET_MP_STATE, 4),
    ("events", abi.KVM_GET_VCPU_EVENTS, abi.KVM_SET_VCPU_EVENTS, 64),
)
_NAMES = {getattr(abi, name): name for name in dir(abi) if name.startswith(("KVM_GET", "KVM_SET"))}


class VcpuState:
    """What makes up a CPU. Immutable; structs of <linux/kvm.h> as bytes.

    Attributes:
        regs: struct kvm_regs.
        sregs: struct kvm_sregs; FS and GS bases and CR3 are in it.
        xsave: struct kvm_xsave, as long as the host's KVM makes it.
        xcrs: struct kvm_xcrs.
        events: struct kvm_vcpu_events.
        debugregs: struct kvm_debugregs.
        mp_state: struct kvm_mp_state.
        msrs: (index, value), those that the host's KVM knows of the ones that matter.
    """

    __slots__ = ("debugregs", "events", "mp_state", "msrs", "regs", "sregs", "xcrs", "xsave")

    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    events: bytes
    debugregs: bytes
    mp_state: bytes

    def __init__(self, parts: dict[str, bytes], msrs: tuple[tuple[int, int], ...]) -> None:
        for name, *_ in _PARTS:
            setattr(self, name, parts[name])
        self.msrs = msrs

    def differences(self, other: VcpuState) -> list[str]:
        """Return the names of the attributes in which the two differ."""
        return [name for name in self.__slots__ if getattr(self, name) != getattr(other, name)]


def save(vcpu: Vcpu) -> VcpuState:
    """Return the vCPU's state. See `Vcpu.save_state`."""
    _complete(vcpu)
    parts = {}
    for name, request, _, size_bytes in _parts(vcpu):
        area = ffi.new("uint8_t[]", size_bytes)
        _ioctl(vcpu, request, address_of(area))
        parts[name] = bytes(ffi.buffer(area))
    return VcpuState(parts, tuple(_get_msrs(vcpu)))


def load(vcpu: Vcpu, state: VcpuState) -> None:
    """Give the vCPU that state. See `Vcpu.load_state`."""
    _complete(vcpu)
    for name, _, request, _ in _PARTS:
        if name == "events":
            set_msrs(vcpu, state.msrs)
        area = ffi.from_buffer(getattr(state, name))
        if name == "sregs":
            area = ffi.new("struct kvm_sregs *")
            ffi.memmove(area, state.sregs, len(state.sregs))
            area.tr.type = vcpu.trial.tss_type
        _ioctl(vcpu, request, address_of(area))
    vcpu.registers_replaced(True)


def set_msrs(vcpu: Vcpu, msrs: Iterable[tuple[int, int]]) -> None:
    """Set model-specific registers (KVM_SET_MSRS).

    Raises:
        IoctlError: KVM refused one; `.arguments` names it.
    """
    for index, value in msrs:
        area = _msr_area(index, value)
        rc = ioctl(vcpu.fd, abi.KVM_SET_MSRS, address_of(area))
        if rc != 1:  # how many it set
            raise IoctlError("KVM_SET_MSRS", f"{index:#x}={value:#x}", -rc)


def _get_msrs(vcpu: Vcpu) -> Iterable[tuple[int, int]]:
    for index in _MSRS:
        area = _msr_area(index, 0)
        if ioctl(vcpu.fd, abi.KVM_GET_MSRS, address_of(area)) == 1:
            yield index, _MSR.unpack_from(ffi.buffer(area), _HEADER_BYTES)[2]


def _msr_area(index: int, value: int) -> object:
    return ffi.new("uint8_t[]", struct.pack("<II", 1, 0) + _MSR.pack(index, 0, value))


def _complete(vcpu: Vcpu) -> None:
    pending = vcpu.complete_pending()
    if pending is not None:
        raise VcpuError(f"its state cannot be taken: {pending!r} is pending, and nobody serves it")


def _parts(vcpu: Vcpu) -> list[tuple[str, int, int, int]]:
    return [_xsave_part(vcpu) if part[0] == "xsave" else part for part in _PARTS]


def _xsave_part(vcpu: Vcpu) -> tuple[str, int, int, int]:
    # Larger than 4096 bytes only where the process asked for such features (AMX).
    size_bytes = vcpu.device.capability(abi.KVM_CAP_XSAVE2)
    request = abi.KVM_GET_XSAVE2 if size_bytes else abi.KVM_GET_XSAVE
    return ("xsave", request, abi.KVM_SET_XSAVE, size_bytes or 4096)


def _ioctl(vcpu: Vcpu, request: int, hva: int) -> None:
    rc = ioctl(vcpu.fd, request, hva)
    if rc < 0:
        raise IoctlError(_NAMES[request], "", -rc)
