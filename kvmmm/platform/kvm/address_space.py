"""`MemslotAddressSpace`: an mm address is a guest-physical address, a translation is a memslot.

    EPT violation (MMIO exit) ──► mm.handle_user_fault ──► map_file: a slot ──► complete: the access

After an MMIO exit KVM finishes the pending access from kvm_run, whatever slots were added
meanwhile. So the order is: install the slot, then perform the access by hand. A fragment for memory
that has a slot by now is normal (an access is cut into at most 8 bytes, and at page boundaries).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError, StateError
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, page_down
from kvmmm.platform.kvm import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.platform.base import File
    from kvmmm.platform.kvm.memslot import Memslot
    from kvmmm.platform.kvm.vm import Vm
    from kvmmm.safemem.ffi import MmioExit

_SLOTS_KEPT_FREE = 4
"""Below this many free slots neighbours are merged before another is added; with none, all go."""


class MemslotAddressSpace:
    """The guest-physical address space of one VM.

    Slots that the mm did not ask for (the system area) are registered on the VM directly and are
    never touched here: `max_addr` ends below them.

    Not locked: the mm calls it with its own lock held.

    Attributes:
        n_merges: How often neighbouring slots became one.
        n_evictions: How often all slots were dropped because none was free.
    """

    def __init__(self, vm: Vm, max_addr: int) -> None:
        self.vm = vm
        self.max_addr = max_addr
        self._slots = vm.memslots
        self.n_merges = 0
        self.n_evictions = 0

    @property
    def min_window_bytes(self) -> int:
        """2 MiB while slots are plentiful; grows as they run out, so that a few more cover all."""
        if self._n_free > self._slots.limit // 2:
            return HUGE_PAGE_BYTES
        per_slot = self.max_addr // max(self._n_free, 1)
        window = HUGE_PAGE_BYTES
        while window < per_slot * 2:
            window <<= 1
        return window

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Have [addr, addr + fr.length_bytes) reach `fr`: by a new slot where there is none yet.

        A range that is not writable gets a READONLY slot, on which a write is an EPT violation.
        Execution cannot be withheld by a slot; the page tables do that.

        Raises:
            StateError: A slot that is there must change, and a vCPU is running.
            IoctlError: KVM refused.
        """
        delta = file.hva + fr.start - addr
        flags = 0 if perms & WRITE else abi.KVM_MEM_READONLY
        end = addr + fr.length_bytes
        start = addr
        for slot in self._with_room_for(addr, end):
            if slot.delta == delta and slot.flags == flags:
                if start < slot.gpa:
                    self._slots.add(start, slot.gpa - start, delta + start, flags)
                start = max(start, slot.end)
            else:
                self._cut(slot, addr, end)
        if start < end:
            self._slots.add(start, end - start, delta + start, flags)

    def _with_room_for(self, start: int, end: int) -> list[Memslot]:
        """Return the slots in a range, with a free one for every piece around and between them."""
        there = self._slots.overlapping(start, end)
        if self._n_free > _SLOTS_KEPT_FREE + len(there):
            return there
        self._merge_neighbours()
        there = self._slots.overlapping(start, end)
        if self._n_free > len(there):
            return there
        # Like any cache: what is wanted again faults again.
        for _, _, slot in list(self._slots.by_gpa.segments(0, self.max_addr)):
            self._cut(slot, slot.gpa, slot.end)
        self.n_evictions += 1
        return []

    @property
    def _n_free(self) -> int:
        return self._slots.limit - len(self._slots)

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Delete the slots in `ranges`; what sticks out gets slots of its own while some are free.

        Raises:
            StateError: A vCPU is running.
        """
        for ar in ranges:
            for slot in self._slots.overlapping(ar.start, ar.end):
                self._cut(slot, ar.start, ar.end)

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a CPU's `access` to this guest-physical address finds a slot that serves it."""
        slot = self._slots.find(addr)
        return slot is not None and not (access & WRITE and slot.flags & abi.KVM_MEM_READONLY)

    def complete(self, exit_: MmioExit) -> None:
        """Perform the access of an MMIO exit by hand, on the memory behind its slot.

        Preconditions:
            - `map_file` has installed what the access needs, on every page that it touches.

        Raises:
            GuestFaultError: It has not; `.addr` is the first such byte.
        """
        slot = self._slots.find(exit_.gpa)
        if slot is None or exit_.gpa + exit_.size_bytes > slot.end:
            # KVM cuts an access at page boundaries (x86.c, emulator_read_write), slots are whole
            # pages.
            raise GuestFaultError(exit_.gpa, WRITE if exit_.is_write else READ, mapped=False)
        exit_.complete(exit_.gpa + slot.delta)

    def _cut(self, slot: Memslot, start: int, end: int) -> None:
        # Deletion zaps every translation of the VM, and for a moment what sticks out has no slot.
        if any(vcpu.in_guest for vcpu in self.vm.vcpus):
            raise StateError(
                f"{slot} can only be changed while every vCPU of the VM is outside KVM_RUN"
            )
        self._slots.remove(slot)
        if slot.gpa < start:
            self._slots.add(slot.gpa, start - slot.gpa, slot.hva, slot.flags)
        if end < slot.end and self._n_free:
            self._slots.add(end, slot.end - end, slot.delta + end, slot.flags)

    def _merge_neighbours(self) -> None:
        """Merge runs of slots that one slot could be: adjacent, same host distance, same flags."""
        run: list[Memslot] = []
        for _, _, slot in list(self._slots.by_gpa.segments(0, self.max_addr)):
            if run and (
                slot.gpa != run[-1].end or slot.delta != run[0].delta or slot.flags != run[0].flags
            ):
                self._merge(run)
                run = []
            run.append(slot)
        self._merge(run)

    def _merge(self, run: list[Memslot]) -> None:
        if len(run) < 2:
            return
        for slot in run:
            self._cut(slot, slot.gpa, slot.end)
        first = run[0]
        self._slots.add(first.gpa, run[-1].end - first.gpa, first.hva, first.flags)
        self.n_merges += 1


def pages_of(start: int, length_bytes: int) -> range:
    """Return the page addresses that [start, start + length_bytes) touches."""
    return range(page_down(start), start + max(length_bytes, 1), PAGE_BYTES)


FETCH = READ | EXECUTE
"""What an instruction fetch needs."""
