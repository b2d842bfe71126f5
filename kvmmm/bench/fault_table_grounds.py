"""First touches under page tables of ours: without an entry, and without a memslot below one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.bench import toucher
from kvmmm.bench.fault_grounds import MEMORY, Ground
from kvmmm.hostarch.access import READ_WRITE, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange

if TYPE_CHECKING:
    from contextlib import ExitStack


class PageFaultGround(Ground):
    """Page faults of a program: entries for a window, in page tables of ours."""

    start = toucher.START

    def __init__(self, stack: ExitStack, length_bytes: int, *, lazy_slots: bool = False) -> None:
        self.length_bytes = length_bytes
        self.vm = stack.enter_context(toucher.Toucher(MEMORY, lazy_slots=lazy_slots))
        self.vm.mm.mmap(length_bytes, READ_WRITE, addr=self.start, fixed=True)
        self.make_resident()

    def set_window(self, window_bytes: int) -> None:
        """See `Ground`."""
        self.vm.space.map_unit_bytes = window_bytes

    def forget(self) -> None:
        """See `Ground`."""
        vm = self.vm
        vm.space.unmap([AddrRange(self.start, self.start + self.length_bytes)])
        vm.physical.zap()
        vm.touch_code()

    def settle(self, start: int, n: int, stride_bytes: int) -> None:
        """See `Ground`."""
        if stride_bytes == PAGE_BYTES:
            self.vm.mm.read(start, n * PAGE_BYTES)
            return
        for addr in range(start, start + n * stride_bytes, stride_bytes):
            self.vm.mm.read(addr, 1)

    def serve(self, addr: int) -> None:
        """See `Ground`."""
        self.vm.mm.handle_user_fault(addr, WRITE)

    def n_faults(self) -> int:
        """See `Ground`."""
        return self.vm.mm.counters.faults

    def run(self, start: int, n: int, stride_bytes: int, *, write: bool) -> int:
        """See `Ground`."""
        return self.vm.touch(start, n, stride_bytes, write=write)


class LazySlotGround(PageFaultGround):
    """EPT violations below page tables: every entry is there, the slots are not."""

    def __init__(self, stack: ExitStack, length_bytes: int) -> None:
        super().__init__(stack, length_bytes, lazy_slots=True)

    def make_resident(self) -> None:
        """See `Ground`."""
        self.set_window(HUGE_PAGE_BYTES)
        self.run(self.start, self.length_bytes // PAGE_BYTES, PAGE_BYTES, write=True)
        space = self.vm.space
        self._gpas = [
            space.gpa_at(self.start + at) or 0
            for at in range(0, self.length_bytes, HUGE_PAGE_BYTES)
        ]
        self.forget()

    def set_window(self, window_bytes: int) -> None:
        """See `Ground`."""
        self.vm.physical.chunk_bytes = window_bytes

    def forget(self) -> None:
        """See `Ground`."""
        slots = self.vm.vm.memslots
        with self.vm.vm.paused():
            for gpa in self._gpas:
                for slot in slots.overlapping(gpa, gpa + HUGE_PAGE_BYTES):
                    slots.remove(slot)
        self.vm.touch_code()

    def settle(self, _start: int, _n: int, _stride_bytes: int) -> None:
        """See `Ground`."""

    def serve(self, addr: int) -> None:
        """See `Ground`."""
        number, offset = divmod(addr - self.start, HUGE_PAGE_BYTES)
        self.vm.physical.serve_violation(self._gpas[number] + offset, WRITE)

    def n_faults(self) -> int:
        """See `Ground`."""
        return self.vm.physical.n_violations
