"""`MemslotAddressSpace`: an mm address is a guest-physical address, a translation is a memslot.

    EPT violation (MMIO exit) ──► mm.handle_user_fault ──► map_file: a slot ──► complete: the access

After an MMIO exit KVM finishes the pending access from kvm_run, whatever slots were added
meanwhile. So the order is: install the slot, then perform the access by hand. A fragment for memory
that has a slot by now is normal (an access is cut into at most 8 bytes, and at page boundaries).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, page_down
from kvmmm.platform.kvm import abi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.platform.base import AddressSpace
    from kvmmm.platform.kvm.memslot import Memslot
    from kvmmm.platform.kvm.vm import Vm
    from kvmmm.safemem.ffi import MmioExit

_SLOTS_KEPT_FREE = 4
"""Below this many free slots neighbours are merged before another is added; with none, all go."""


class MemslotAddressSpace:
    """The guest-physical address space of one VM.

    Slots that the mm did not ask for (the system area) are registered on the VM directly and are
    never touched here: `max_addr` ends below them.

    A slot is added under running vCPUs; whatever deletes one, to change or to remove it, pauses
    them all, once an operation: for a moment legal memory has no slot.

    Not locked: the mm calls it with its own lock held.

    Attributes:
        vm: Whose slots they are.
        max_addr: Exclusive end of what can be mapped.
        map_unit_bytes: 0: a fault maps all of its pma.
        walks_frames: True: a guest kernel keeps its page tables and stacks in these frames.
        n_pauses: How often the vCPUs were paused.
        n_slot_changes: How many slots were deleted, whether another came in their place or not.
        n_merges: How often neighbouring slots became one.
        n_evictions: How often all slots were dropped because none was free.
    """

    map_unit_bytes = 0
    walks_frames = True
    map_quickly = None
    walk = None

    def __init__(self, vm: Vm, max_addr: int) -> None:
        self.vm = vm
        self.max_addr = max_addr
        self._slots = vm.memslots
        self.n_pauses = 0
        self.n_slot_changes = 0
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
            IoctlError: KVM refused.
        """
        delta = file.hva + fr.start - addr
        flags = 0 if perms & WRITE else abi.KVM_MEM_READONLY
        end = addr + fr.length_bytes
        there = self._slots.overlapping(addr, end)
        has_room = self._n_free > _SLOTS_KEPT_FREE + len(there)
        if has_room and all(slot.delta == delta and slot.flags == flags for slot in there):
            self._install(there, addr, end, delta, flags)
            return
        with self._paused():
            if not has_room:
                there = self._make_room(addr, end)
            self._install(there, addr, end, delta, flags)

    def _install(self, there: list[Memslot], start: int, end: int, delta: int, flags: int) -> None:
        """Cover [start, end), given the slots in it: one that says the same stays."""
        addr = start
        for slot in there:
            if slot.delta == delta and slot.flags == flags:
                if addr < slot.gpa:
                    self._slots.add(addr, slot.gpa - addr, delta + addr, flags)
                addr = max(addr, slot.end)
            else:
                self._cut(slot, start, end)
        if addr < end:
            self._slots.add(addr, end - addr, delta + addr, flags)

    def _make_room(self, start: int, end: int) -> list[Memslot]:
        """Return the slots in a range, with a free one for every piece around and between them."""
        self._merge_neighbours()
        there = self._slots.overlapping(start, end)
        if self._n_free > len(there):
            return there
        # Like any cache: what is wanted again faults again.
        self._drop_all()
        self.n_evictions += 1
        return []

    @property
    def _n_free(self) -> int:
        return self._slots.limit - len(self._slots)

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Delete the slots in `ranges`; what sticks out gets slots of its own while some are free.

        Raises:
            IoctlError: KVM refused.
        """
        overlapping = self._slots.overlapping
        if any(overlapping(ar.start, ar.end) for ar in ranges):
            with self._paused():
                for ar in ranges:
                    for slot in overlapping(ar.start, ar.end):
                        self._cut(slot, ar.start, ar.end)

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a CPU's `access` to this guest-physical address finds a slot that serves it."""
        slot = self._slots.find(addr)
        return slot is not None and not (access & WRITE and slot.flags & abi.KVM_MEM_READONLY)

    def fork_into(self, child: AddressSpace) -> bool:  # noqa: ARG002 - the protocol's
        """Return False: slots belong to their VM, and a CPU may walk the frames behind them."""
        return False

    def release(self) -> None:
        """Delete all slots, unless they went with the VM. Idempotent."""
        if self.vm.fd >= 0 and self._slots.overlapping(0, self.max_addr):
            with self._paused():
                self._drop_all()

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

    def _paused(self) -> AbstractContextManager[None]:
        self.n_pauses += 1
        return self.vm.paused()

    # Called while the vCPUs are paused.

    def _cut(self, slot: Memslot, start: int, end: int) -> None:
        # Deletion zaps every translation of the VM.
        self._slots.remove(slot)
        self.n_slot_changes += 1
        if slot.gpa < start:
            self._slots.add(slot.gpa, start - slot.gpa, slot.hva, slot.flags)
        if end < slot.end and self._n_free:
            self._slots.add(end, slot.end - end, slot.delta + end, slot.flags)

    def _drop_all(self) -> None:
        for slot in self._slots.overlapping(0, self.max_addr):
            self._cut(slot, slot.gpa, slot.end)

    def _merge_neighbours(self) -> None:
        """Merge runs of slots that one slot could be: adjacent, same host distance, same flags."""
        run: list[Memslot] = []
        for slot in self._slots.overlapping(0, self.max_addr):
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
