"""`UserMachine`: a VM whose vCPUs stamp a region in ring 3, through page tables.

CODE     the guest's code
OWN      one page a vCPU, shared anonymous memory
REGION   what is hammered: N_CELLS cells, a stride apart
PARK     as much, where cells are moved to, and where no vCPU looks
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from kvmmm.arena import Arena
from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.kernel_half import KernelHalf
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import lib
from tests.hammer.guest import (
    BAD_PORT,
    CODE,
    FORGETFUL_CODE,
    LEAVE_ALONE,
    N_CELLS,
    NEXT,
    ONLY_READ,
    PAGE,
    registers,
)  # fmt: skip
from tests.hammer.stamper import Stamper

if TYPE_CHECKING:
    from collections.abc import Callable

CODE_ADDR, OWN = 0x40_0000, 0x60_0000
REGION, PARK, KEPT = 1 << 40, 2 << 40, 3 << 40
_ARENA_BYTES = 1 << 30
_MAX_ADDR = 1 << 46


class Backing:
    """Where the region's cells of other kinds than anonymous memory come from."""

    def __init__(self, arena: Arena, n_cells: int, stride_bytes: int) -> None:
        self.length_bytes = n_cells * stride_bytes
        self.shared = SharedMemory(arena, self.length_bytes, "hammered")
        fd = os.memfd_create("hammered", os.MFD_CLOEXEC)
        os.ftruncate(fd, self.length_bytes)
        self.file = HostFile(fd, name="hammered file")
        os.close(fd)


class UserMachine:
    """The VM, its memory manager, and the vCPUs' threads.

    Args:
        n_vcpus: How many stamp.
        stride_bytes: From one cell to the next.
        fills: Whether freed frames are filled with junk, and punched only when they are allocated
            again (`Arena.debug`): then a use after free shows where it happens, and nothing but
            shootdowns has a CPU forget a frame.
        hops: Whether vCPUs may be moved to forks.
        nap: Called before and after a fault is served: so a host's operation may come in between.
        options: For `PageTableAddressSpace`.

    Attributes:
        n_faults: #PFs.
        n_refused: Those of them that the memory manager refused; the guest went on behind.
    """

    region, park = REGION, PARK

    def __init__(
        self, n_vcpus: int, stride_bytes: int = PAGE, *, fills: bool = False, hops: bool = False,
        nap: Callable[[], object] = int, **options: Any,
    ) -> None:  # fmt: skip
        self.stride_bytes = stride_bytes
        self.fills = fills
        self.hops = hops
        self.n_faults = self.n_refused = 0
        self._nap = nap
        self._options = options
        self.arena = Arena(_ARENA_BYTES, debug=fills)
        self.vm = Vm()
        self.physical = GuestPhysical(self.vm, self.arena)
        self.half = KernelHalf(self.physical, n_vcpus)
        self.space = self.new_space()
        self.mm = MemoryManager(self.arena, self.space, layout=Layout(1 << 16, _MAX_ADDR))
        self.mm.mmap(PAGE, READ_EXECUTE, addr=CODE_ADDR, fixed=True)
        code = FORGETFUL_CODE if hops else CODE
        self.mm.copy_out(CODE_ADDR, code, ignore_permissions=True)
        self.backing = Backing(self.arena, N_CELLS, stride_bytes)
        # Its frames go with its last mapping: so there is one that stays.
        self.mm.mmap(
            self.backing.length_bytes, 0, addr=KEPT, fixed=True, private=False,
            mappable=self.backing.shared,
        )  # fmt: skip
        self.mm.mmap(n_vcpus * PAGE, READ_WRITE, addr=OWN, fixed=True, private=False)
        # By vCPU: whose faults it has, and where it is to go.
        self._inside = [self.mm] * n_vcpus
        self._wanted: list[tuple[MemoryManager, PageTableAddressSpace] | None] = [None] * n_vcpus
        self.stampers = [self._new_stamper(number) for number in range(n_vcpus)]

    def new_space(self) -> PageTableAddressSpace:
        return PageTableAddressSpace(self.physical, self.half.fixed, **self._options)

    def _new_stamper(self, number: int) -> Stamper:
        own = OWN + number * PAGE
        self.mm.zero_out(own, PAGE)
        found = self.mm.pmas.find(own)
        assert found is not None
        own_page = self.arena.view_of(found[2].file_range(own, own + PAGE))
        vcpu = self.vm.create_vcpu()
        self.half.load(vcpu, self.space.root_gpa, rip=CODE_ADDR, rsp=OWN)
        self.space.activate(vcpu)
        vcpu.set_port(BAD_PORT, lib.KVMMM_PORT_KIND_EXIT, None)
        for name, value in registers(number, REGION, self.stride_bytes, N_CELLS, own).items():
            setattr(vcpu.regs, name, value)

        def on_fault(addr: int, access: int) -> object:
            return self._serve(number, vcpu, addr, access)

        vcpu.on_fault = on_fault
        return Stamper(vcpu, own_page, self.backing.file.revalidate)

    def _serve(self, number: int, vcpu: Any, addr: int, access: int) -> object:
        self.n_faults += 1
        self._nap()
        wanted = self._wanted[number]
        if wanted is not None:
            self._move(number, *wanted)
            self._wanted[number] = None
            vcpu.regs.rip = CODE_ADDR
            return None
        try:
            self._inside[number].handle_user_fault(addr, access)
        except GuestFaultError:
            if not REGION <= addr < REGION + N_CELLS * self.stride_bytes:
                raise
            self.n_refused += 1
            cell = (addr - REGION) // self.stride_bytes
            self.stampers[number].give_up(cell, ONLY_READ if access == WRITE else LEAVE_ALONE)
            vcpu.regs.rip = CODE_ADDR + NEXT
        self._nap()
        return None

    def _move(self, number: int, mm: MemoryManager, space: PageTableAddressSpace) -> None:
        self._inside[number] = mm
        space.activate(self.stampers[number].vcpu)

    def hop(
        self, number: int, mm: MemoryManager, space: PageTableAddressSpace, *, in_handler: bool
    ) -> None:
        """Have a vCPU go on in another address space: we move it, or it does, in its next fault."""
        if not in_handler:
            self._move(number, mm, space)
            return
        self._wanted[number] = mm, space
        stamper = self.stampers[number]
        while self._wanted[number] is not None and not stamper.has_ended:
            # There is a fault sooner or later; sooner, if the cache that a space is is emptied.
            stamper.encourage()
            inside = self._inside[number]
            with inside.active_lock:
                inside.address_space.unmap(
                    [AddrRange(REGION, REGION + N_CELLS * self.stride_bytes)]
                )
            time.sleep(0.0001)

    def stop(self) -> None:
        for stamper in self.stampers:
            stamper.end()

    def close(self) -> None:
        """Close; no frame must be left."""
        for stamper in self.stampers:
            stamper.close()
        self.mm.close()
        self.vm.close()
        self.space.release()
        self.half.close()
        self.physical.close()
        self.backing.file.close()
        used_bytes = self.arena.statistics().used_bytes
        self.arena.close()
        assert not used_bytes, f"{used_bytes >> 10} KiB are left"
