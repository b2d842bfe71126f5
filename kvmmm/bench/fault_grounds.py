"""The ways in which memory comes on first touch, and the same memory there beforehand.

    slot    a MicroVM, no memslot         MMIO exit, emulated     a memslot of one window
    lazy    a UserVM's entry, no memslot  MMIO exit, emulated     the same, below page tables
    pf      a UserVM, no entry            #PF through the stub    entries for one window

All touch from ring 3, one byte a page. The frames are allocated, and in the host's page tables.
The last two are in `fault_table_grounds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench import toucher
from kvmmm.bench.guest import MARK_END, TIMEOUT_S, BenchmarkError, guest_at_start
from kvmmm.hostarch.access import EXECUTE, READ_EXECUTE, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange

if TYPE_CHECKING:
    from contextlib import ExitStack

    from kvmmm.vmm.microvm import MicroVM

_TIMEOUT_NS = int(TIMEOUT_S * 1e9)
MEMORY = "64M"
_FAR = 1 << 35
"""Where slots lie that only count: behind all guest memory."""


class Ground(ABC):
    """Memory that can be made to come in windows of any size.

    Attributes:
        start: Its first address, a multiple of 2 MiB.
        length_bytes: Its length, likewise.
    """

    start: int
    length_bytes: int

    @abstractmethod
    def set_window(self, window_bytes: int) -> None:
        """Have each fault map the aligned window around it."""

    @abstractmethod
    def forget(self) -> None:
        """Have nothing of it mapped, and no translation anywhere."""

    @abstractmethod
    def serve(self, addr: int) -> None:
        """Map the window around `addr`, as a fault does, without one."""

    @abstractmethod
    def n_faults(self) -> int:
        """Return how many faults were served so far."""

    @abstractmethod
    def run(self, start: int, n: int, stride_bytes: int, *, write: bool) -> int:
        """Have the guest touch `n` places; returns ns."""

    def touch(self, start: int, n: int, stride_bytes: int, *, write: bool, n_faults: int) -> int:
        """Do so, and see that it came to so many faults: else the time is of something else."""
        self.settle(start, n, stride_bytes)
        before = self.n_faults()
        taken_ns = self.run(start, n, stride_bytes, write=write)
        seen = self.n_faults() - before
        if seen != n_faults:
            raise BenchmarkError(f"{type(self).__name__}: {seen} faults, expected {n_faults}")
        return taken_ns

    @abstractmethod
    def settle(self, start: int, n: int, stride_bytes: int) -> None:
        """Have the host's tables lead to what will be touched, where `forget` took that away."""

    def make_resident(self) -> None:
        """Have every page backed, then forget all."""
        self.set_window(HUGE_PAGE_BYTES)
        self.run(self.start, self.length_bytes // PAGE_BYTES, PAGE_BYTES, write=True)
        self.forget()


class SlotGround(Ground):
    """EPT violations of a guest kernel: a memslot a window.

    Args:
        stack: Closes the VM.
        length_bytes: How much memory.
        n_slots: How many slots there are at least, all the time.
    """

    start = 8 << 20
    _CODE = 4 << 20

    def __init__(self, stack: ExitStack, length_bytes: int, *, n_slots: int = 0) -> None:
        self.length_bytes = length_bytes
        self.vm: MicroVM = stack.enter_context(
            guest_at_start("bench_touch", "mark=1", "bytes=4096", memory=MEMORY)
        )
        vm = self.vm
        vm.mm.mmap(PAGE_BYTES, READ_EXECUTE, addr=self._CODE, fixed=True, replace=True)
        vm.mm.copy_out(self._CODE, toucher.PIECES, ignore_permissions=True)
        vm.mm.handle_user_fault(self._CODE, EXECUTE)
        vm.refresh_tables()
        vm.on_out(MARK_END, lambda _port, _value: True, value_only=True)
        self.make_resident()
        slots = vm.vm.memslots
        for number in range(n_slots - len(slots)):
            slots.add(_FAR + 2 * number * PAGE_BYTES, PAGE_BYTES, vm.arena.hva)
        self.n_slots = len(slots)

    def set_window(self, window_bytes: int) -> None:
        """See `Ground`."""
        self.vm.address_space.map_unit_bytes = window_bytes

    def forget(self) -> None:
        """See `Ground`."""
        self.vm.address_space.unmap([AddrRange(self.start, self.start + self.length_bytes)])
        self.run(self._CODE, 1, 1, write=False)

    def settle(self, _start: int, _n: int, _stride_bytes: int) -> None:
        """See `Ground`."""

    def serve(self, addr: int) -> None:
        """See `Ground`."""
        self.vm.mm.handle_user_fault(addr, WRITE)

    def n_faults(self) -> int:
        """See `Ground`."""
        return self.vm.mm.counters.faults

    def run(self, start: int, n: int, stride_bytes: int, *, write: bool) -> int:
        """See `Ground`."""
        vcpu = self.vm.vcpu
        regs = vcpu.regs
        regs.rip = self._CODE + toucher.piece_of(write=write)
        regs.rsi, regs.rdx, regs.r8 = start, n, stride_bytes
        start_ns = perf_counter_ns()
        answer = vcpu.run(_TIMEOUT_NS)
        taken_ns = perf_counter_ns() - start_ns
        if answer is not True:
            raise BenchmarkError(f"the guest did not come to its mark: {answer!r}")
        return taken_ns
