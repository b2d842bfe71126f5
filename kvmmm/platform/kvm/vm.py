"""One VM: its descriptor, memslots and vCPUs, released in the right order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from kvmmm.errors import IoctlError, StateError
from kvmmm.platform.kvm import abi, boot
from kvmmm.platform.kvm.device import Device, open_device
from kvmmm.platform.kvm.memslot import MemslotTable
from kvmmm.platform.kvm.vcpu import Vcpu
from kvmmm.safemem.ffi import PauseGate, address_of, ffi, ioctl

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Vm:
    """A virtual machine without memory or CPUs, to which both are added.

    Lifetime: `close`, or the end of a `with`, or garbage collection; vCPUs go first. The host
    memory behind the slots must outlive the VM: whoever adds slots closes the VM before that
    memory.

    Attributes:
        fd: Its descriptor; -1 once closed.
        device: The /dev/kvm it came from.
        memslots: Its slots.
        vcpus: Its vCPUs, in order of creation.
        restarts_emulation: Whether an instruction that KVM could not emulate can be restarted.
    """

    def __init__(self, device: Device | None = None, *, max_memslots: int | None = None) -> None:
        self.fd = -1
        self.vcpus: list[Vcpu] = []
        self._gate = PauseGate(self.vcpus)
        self.device = device or open_device()
        self.fd = ioctl(self.device.fd, abi.KVM_CREATE_VM)
        if self.fd < 0:
            raise IoctlError("KVM_CREATE_VM", "type=0", -self.fd)
        self.memslots = MemslotTable(self.fd, max_memslots or self.device.max_memslots)
        # Best effort: only VMX needs it, and only before the first vCPU.
        ioctl(self.fd, abi.KVM_SET_TSS_ADDR, boot.VMX_TSS_ADDR)
        self.restarts_emulation = self._enable_emulation_failure_exits()

    def _enable_emulation_failure_exits(self) -> bool:
        if not self.device.capability(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
            return False
        return self.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1) >= 0

    def enable_cap(self, capability: int, argument: int) -> int:
        """Call KVM_ENABLE_CAP on the VM; returns what the kernel said, -errno on failure."""
        request = ffi.new("struct kvm_enable_cap *")
        request.cap = capability
        request.args[0] = argument
        return ioctl(self.fd, abi.KVM_ENABLE_CAP, address_of(request))

    def create_vcpu(self) -> Vcpu:
        """Add a vCPU, with the supported CPUID and the features that the host's KVM allows.

        Raises:
            IoctlError: KVM refused.
        """
        number = len(self.vcpus)
        fd = ioctl(self.fd, abi.KVM_CREATE_VCPU, number)
        if fd < 0:
            raise IoctlError("KVM_CREATE_VCPU", f"id={number}", -fd)
        vcpu = Vcpu(fd, self.device, number)
        vcpu.set_gate(self._gate)  # a pause that lasts already counts
        self.vcpus.append(vcpu)
        return vcpu

    def paused(self) -> AbstractContextManager[None]:
        """Return a context manager: within it every vCPU is outside KVM_RUN.

        Any thread may pause, a vCPU's own handler too; pauses nest and overlap. Whoever is in the
        guest is kicked, waits, and goes on afterwards without its Python noticing. Do not wait
        within it for a vCPU to run on.
        """
        return self._gate

    def coalesce_port(self, port: int) -> bool:
        """Have KVM queue writes to a port instead of exiting; False where it cannot."""
        page = self.device.capability(abi.KVM_CAP_COALESCED_MMIO)
        if not page or not self.device.capability(abi.KVM_CAP_COALESCED_PIO):
            return False
        zone = ffi.new("struct kvm_coalesced_mmio_zone *", {"addr": port, "size": 1, "pio": 1})
        return ioctl(self.fd, abi.KVM_REGISTER_COALESCED_MMIO, address_of(zone)) == 0

    @property
    def coalesced_page(self) -> int:
        """Page of a vCPU's mapping in which KVM queues coalesced writes."""
        return self.device.capability(abi.KVM_CAP_COALESCED_MMIO)

    def close(self) -> None:
        """Close vCPUs, then the VM. Idempotent.

        Raises:
            StateError: A vCPU is running.
        """
        if any(vcpu.thread_id for vcpu in self.vcpus):
            raise StateError("the vCPU is running: stop it first")
        while self.vcpus:
            self.vcpus[-1].close()
            self.vcpus.pop()
        if self.fd >= 0:
            # Forgotten first: Ctrl-C in between must not have it closed twice.
            fd, self.fd, self.memslots.vm_fd = self.fd, -1, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
