"""Memslots: which host memory a guest-physical range reaches.

A slot cannot be split, resized or re-flagged in place, only deleted and created anew (Linux
virt/kvm/kvm_main.c, __kvm_set_memory_region). Deleting one drops every translation of the VM, and
for a moment legal memory has no slot: so that is done with every vCPU outside KVM_RUN. Adding needs
no stop.
"""

from __future__ import annotations

from kvmmm.errors import IoctlError, RangeError, StateError
from kvmmm.hostarch.addr import PAGE_MASK
from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import address_of, ffi, ioctl
from kvmmm.segment import SegmentSet


class Memslot:
    """One slot. Immutable.

    Attributes:
        number: KVM's number for it.
        gpa: First guest-physical address.
        length_bytes: Its length.
        hva: Host address that `gpa` reaches.
        flags: KVM_MEM_READONLY or 0.
    """

    __slots__ = ("flags", "gpa", "hva", "length_bytes", "number")

    def __init__(self, number: int, gpa: int, length_bytes: int, hva: int, flags: int) -> None:
        self.number = number
        self.gpa = gpa
        self.length_bytes = length_bytes
        self.hva = hva
        self.flags = flags

    @property
    def end(self) -> int:
        """One past the last guest-physical address."""
        return self.gpa + self.length_bytes

    @property
    def delta(self) -> int:
        """Host address minus guest-physical address, the same for the whole slot."""
        return self.hva - self.gpa

    def __repr__(self) -> str:
        kind = "ro" if self.flags & abi.KVM_MEM_READONLY else "rw"
        return f"<memslot {self.number} {kind} [{self.gpa:#x}, {self.end:#x})>"


class MemslotTable:
    """The slots of one VM, by guest-physical address.

    Not locked: the owner (`MemslotAddressSpace`, or a VM before it runs) serialises changes.

    Attributes:
        vm_fd: The VM's descriptor; -1 once it is closed.
        limit: How many slots there can be.
    """

    def __init__(self, vm_fd: int, limit: int) -> None:
        self.vm_fd = vm_fd
        self.limit = limit
        self.by_gpa: SegmentSet[Memslot] = SegmentSet()
        self._free_numbers: list[int] = []
        self._next_number = 0
        self._region = ffi.new("struct kvm_userspace_memory_region *")
        self._region_hva = address_of(self._region)

    def __len__(self) -> int:
        return len(self.by_gpa)

    def find(self, gpa: int) -> Memslot | None:
        """Return the slot that covers `gpa`."""
        return self.by_gpa.find_value(gpa)

    def overlapping(self, start: int, end: int) -> list[Memslot]:
        """Return the slots that share a byte with [start, end), ascending."""
        return [slot for _, _, slot in self.by_gpa.segments(start, end)]

    def add(self, gpa: int, length_bytes: int, hva: int, flags: int = 0) -> Memslot:
        """Register [gpa, gpa + length_bytes) over host memory at `hva`.

        Raises:
            RangeError: Unaligned, empty, or it overlaps a slot (named).
            StateError: No slot number is left.
            IoctlError: KVM refused.
        """
        end = gpa + length_bytes
        if (gpa | length_bytes | hva) & PAGE_MASK or length_bytes <= 0:
            raise RangeError(gpa, end, f"a memslot (hva {hva:#x}) is made of whole 4 KiB pages")
        if len(self.by_gpa) >= self.limit:
            raise StateError(f"all {self.limit} memslots of this VM are taken")
        number = self._free_numbers.pop() if self._free_numbers else self._next_number
        slot = Memslot(number, gpa, length_bytes, hva, flags)
        self.by_gpa.insert(gpa, end, slot)
        try:
            self._set(number, flags, gpa, length_bytes, hva)
        except IoctlError:
            self.by_gpa.remove(gpa, end)
            if number < self._next_number:
                self._free_numbers.append(number)
            raise
        if number == self._next_number:
            self._next_number += 1
        return slot

    def remove(self, slot: Memslot) -> None:
        """Delete a slot.

        Preconditions:
            - No vCPU of the VM is inside KVM_RUN.
        """
        self._set(slot.number, 0, slot.gpa, 0, slot.hva)
        self.by_gpa.remove(slot.gpa, slot.end)
        self._free_numbers.append(slot.number)

    def _set(self, number: int, flags: int, gpa: int, length_bytes: int, hva: int) -> None:
        region = self._region
        region.slot = number
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = length_bytes
        region.userspace_addr = hva
        rc = ioctl(self.vm_fd, abi.KVM_SET_USER_MEMORY_REGION, self._region_hva)
        if rc < 0:
            raise IoctlError(
                "KVM_SET_USER_MEMORY_REGION",
                f"slot={number}, flags={flags:#x}, gpa={gpa:#x}, "
                f"size={length_bytes:#x}, hva={hva:#x}",
                -rc,
            )
