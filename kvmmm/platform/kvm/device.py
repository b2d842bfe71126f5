"""/dev/kvm, opened and asked once a process.

Asking is dear (KVM_GET_SUPPORTED_CPUID alone costs as much as creating a vCPU), and the answers do
not change: the descriptor, the capabilities and the CPUID table are kept for the life of the
process.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from functools import cached_property
from typing import TYPE_CHECKING

from kvmmm.errors import IoctlError, KvmUnavailableError, SyscallError
from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import address_of, ffi, ioctl, lib

if TYPE_CHECKING:
    from kvmmm.platform.kvm.trial import Trial

DEVICE_PATH = "/dev/kvm"

_MISSING = """\
KVM is not available here. On a physical machine: enable virtualisation (VT-x, AMD-V) in the
firmware and type `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`. In a virtual machine: have
nested virtualisation switched on for it. In a container: start it with `--device=/dev/kvm`."""
_CLOSED = """\
This user may not open it. Type `sudo usermod -aG kvm $USER` and log in again. On a CI runner:
echo 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' |
sudo tee /etc/udev/rules.d/99-kvm.rules && sudo udevadm control --reload-rules &&
sudo udevadm trigger --name-match=kvm"""


_VMX = (0x1, 1 << 5)
_SVM = (0x80000001, 1 << 2)
_ECX = 5
"""Where an entry has it."""


class Cpuid:
    """What KVM_GET_SUPPORTED_CPUID says, and the few facts of it that we use.

    VMX and SVM are taken out: what a vCPU of a guest's own leaves in KVM is no part of `VcpuState`,
    so that such a guest could neither be saved nor forked.

    Attributes:
        table: struct kvm_cpuid2 as a cffi array, ready for KVM_SET_CPUID2.
        physical_bits: MAXPHYADDR, which bounds every guest-physical address.
        has_giant_pages: Whether 1 GiB page-table leaves work.
    """

    _ENTRY = struct.Struct("<10I")  # function index flags eax ebx ecx edx padding[3]
    _MAX_ENTRIES = 256

    def __init__(self, fd: int) -> None:
        self.table = ffi.new("uint8_t[]", 8 + self._ENTRY.size * self._MAX_ENTRIES)
        header = ffi.cast("uint32_t *", self.table)
        header[0] = self._MAX_ENTRIES
        self.table_hva = address_of(self.table)
        rc = ioctl(fd, abi.KVM_GET_SUPPORTED_CPUID, self.table_hva)
        if rc < 0:
            raise IoctlError("KVM_GET_SUPPORTED_CPUID", f"nent={self._MAX_ENTRIES}", -rc)
        used = 8 + self._ENTRY.size * header[0]
        self.entries = list(self._ENTRY.iter_unpack(ffi.buffer(self.table)[8:used]))
        for function, bit in (_VMX, _SVM):
            self._hide(function, bit)
        self.physical_bits = (self._register(0x80000008, 3) & 0xFF) or 36
        self.has_giant_pages = bool(self._register(0x80000001, 6) >> 26 & 1)

    def _hide(self, function: int, ecx_bit: int) -> None:
        for i, entry in enumerate(self.entries):
            if entry[0] == function and entry[_ECX] & ecx_bit:
                hidden = [*entry[:_ECX], entry[_ECX] & ~ecx_bit, *entry[_ECX + 1 :]]
                self.entries[i] = tuple(hidden)
                self._ENTRY.pack_into(ffi.buffer(self.table), 8 + i * self._ENTRY.size, *hidden)

    def _register(self, function: int, column: int) -> int:
        return next((entry[column] for entry in self.entries if entry[0] == function), 0)


class Device:
    """The process's /dev/kvm.

    Attributes:
        fd: Its descriptor, open for the life of the process.
        vcpu_mmap_bytes: Size of a vCPU's mapping.
    """

    def __init__(self, path: str = DEVICE_PATH) -> None:
        self.path = path
        self.fd = _open(path)
        self._capabilities: dict[int, int] = {}
        try:
            self._check()
            self.vcpu_mmap_bytes = ioctl(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE)
            _claim_kick_signal()
        except BaseException:
            os.close(self.fd)
            raise

    def _check(self) -> None:
        version = ioctl(self.fd, abi.KVM_GET_API_VERSION)
        if version < 0:
            raise KvmUnavailableError(-version, f"{self.path} is no KVM device", _MISSING)
        if version != abi.KVM_API_VERSION:
            raise KvmUnavailableError(
                errno.ENOTSUP,
                f"{self.path} speaks KVM API version {version}, not {abi.KVM_API_VERSION}",
                "This is no KVM that any current software can use: update the kernel.",
            )
        self._require(abi.KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS", "4.17")
        self._require(abi.KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "4.13")
        self._require(abi.KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM", "3.7")

    def _require(self, capability: int, name: str, since: str) -> None:
        if not self.capability(capability):
            raise KvmUnavailableError(
                errno.ENOTSUP,
                f"{self.path} does not offer {name}",
                f"Linux {since} and later offer it on x86-64: update the kernel.",
            )

    def capability(self, number: int) -> int:
        """Return KVM_CHECK_EXTENSION's answer for the device, asked once; 0 when absent."""
        answer = self._capabilities.get(number)
        if answer is None:
            answer = max(0, ioctl(self.fd, abi.KVM_CHECK_EXTENSION, number))
            self._capabilities[number] = answer
        return answer

    @cached_property
    def cpuid(self) -> Cpuid:
        """The supported CPUID table, asked once."""
        return Cpuid(self.fd)

    @cached_property
    def trial(self) -> Trial:
        """What had to be tried, tried once."""
        from kvmmm.platform.kvm.trial import Trial

        return Trial(self)

    @cached_property
    def max_memslots(self) -> int:
        """How many memslots a VM may have; 32 where the kernel does not say."""
        return self.capability(abi.KVM_CAP_NR_MEMSLOTS) or 32


def _claim_kick_signal() -> None:
    signal = lib.kvmmm_kick_init()
    if signal < 0:
        raise SyscallError(-signal, "no real-time signal is free for kicking vCPUs")


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as e:
        raise KvmUnavailableError(
            e.errno or errno.EACCES, f"{path} is closed to you", _CLOSED
        ) from e
    except OSError as e:
        what = f"{path} is missing" if e.errno == errno.ENOENT else f"{path}: {e.strerror}"
        raise KvmUnavailableError(e.errno or errno.ENODEV, what, _MISSING) from e


_lock = threading.Lock()
_devices: dict[str, Device] = {}


def open_device(path: str = DEVICE_PATH) -> Device:
    """Return the process's device, opening it at the first call.

    Raises:
        KvmUnavailableError: It is missing, closed to this user, or too old; `.remedy` says what to
            type.
    """
    device = _devices.get(path)
    if device is None:
        with _lock:
            device = _devices.get(path)
            if device is None:
                device = _devices[path] = Device(path)
    return device
