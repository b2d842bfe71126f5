"""A VM without kvmmm's upper floors: two MiB of memory, boot tables over it, one vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import abi, boot, memslot
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.platform.kvm.guest_physical import GuestPhysical

MEMORY = 2 << 20
TABLES, GDT, IDT, TSS, STUBS = 0x1_0000, 0x2000, 0x3000, 0x4000, 0x5000
IST_TOP = 0x9000
CODE, STACK_TOP, DATA = 0x10_0000, 0x18_0000, 0x19_0000
ABSENT = 0x4000_0000
"""Mapped by the tables, in no slot: an access is an EPT violation."""

SECOND = 1_000_000_000


class Rig:
    """Memory, tables and a vCPU that starts at CODE in ring 0 (or 3); ports 0xb0, 0xb1 are exits.

    Attributes:
        memory: Guest-physical [0, MEMORY), as a memoryview.
    """

    def __init__(self, code: bytes, ring: int = 0) -> None:
        self.arena = Arena(MEMORY)
        self.frames = self.arena.allocate(MEMORY)
        self.memory = self.arena.view_of(self.frames)
        self.vm = Vm()
        self.vm.memslots.add(0, MEMORY, self.arena.hva + self.frames.start)
        self._build_tables()
        self.memory[CODE : CODE + len(code)] = code
        self.vcpu = self.vm.create_vcpu()
        for port in (0xB0, 0xB1):
            self.vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)
        self.layout = boot.BootLayout(
            root_gpa=TABLES, gdt_gpa=GDT, idt_gpa=IDT, tss_gpa=TSS, stubs_gpa=STUBS,
            ist_top_gpa=IST_TOP,
        )  # fmt: skip
        self.start(CODE, ring)

    def _build_tables(self) -> None:
        allocator = MemoryTableAllocator(16, TABLES, self.memory[TABLES : TABLES + 16 * 4096])
        tables = PageTables(allocator)
        tables.map(0, MEMORY, 0, flags_of(ANY_ACCESS, user=True))
        tables.map(ABSENT, MEMORY, ABSENT, flags_of(READ_WRITE, user=True))
        for gpa, content in (
            (GDT, boot.gdt(TSS)),
            (IDT, boot.idt(STUBS)),
            (TSS, boot.tss(IST_TOP)),
            (STUBS, boot.STUBS),
        ):
            self.memory[gpa : gpa + len(content)] = content

    def start(self, rip: int, ring: int = 0) -> None:
        """Have the next run begin at `rip`."""
        vcpu = self.vcpu
        vcpu.load_boot_state(self.layout)
        regs = vcpu.regs
        regs.rip, regs.rsp, regs.rflags = rip, STACK_TOP, boot.RFLAGS_RESERVED
        if ring:
            sregs = ffi.new("struct kvm_sregs *")
            ffi.memmove(sregs, vcpu.trial.sregs, len(vcpu.trial.sregs))
            sregs.cr3, sregs.gdt.base, sregs.idt.base, sregs.tr.base = TABLES, GDT, IDT, TSS
            vcpu.return_to_frame(sregs, rip=rip, cs=0x33, rflags=2, rsp=STACK_TOP, ss=0x2B)

    def once(self, seconds: float = 10.0) -> object:
        """Run to the next exit."""
        return self.vcpu.once(int(seconds * SECOND))

    def close(self) -> None:
        """Release everything, in order."""
        self.vm.close()
        self.memory.release()
        self.arena.close()


class Kernel:
    """What KVM keeps of memslots: by number. Without KVM, and with errors on demand.

    Attributes:
        slots: (gpa, length in bytes, hva, flags) by number.
        error: Errno that the next calls fail with; 0 for none.
        on_delete: Called before a slot goes.
    """

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int, int, int]] = {}
        self.error = 0
        self.on_delete: Callable[[], None] = lambda: None

    def ioctl(self, _fd: int, request: int, hva: int) -> int:
        """KVM_SET_USER_MEMORY_REGION, as strict as KVM."""
        assert request == abi.KVM_SET_USER_MEMORY_REGION
        if self.error:
            return -self.error
        region = ffi.cast("struct kvm_userspace_memory_region *", hva)
        gpa, size = int(region.guest_phys_addr), int(region.memory_size)
        if not size:
            self.on_delete()
            assert region.slot in self.slots
            del self.slots[region.slot]
            return 0
        assert region.slot not in self.slots
        assert not any(gpa < g + n and g < gpa + size for g, n, _, _ in self.slots.values())
        self.slots[region.slot] = (gpa, size, int(region.userspace_addr), int(region.flags))
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Have memslots go to a `Kernel`."""
    kernel = Kernel()
    monkeypatch.setattr(memslot, "ioctl", kernel.ioctl)
    return kernel


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    """Make rigs, closed at the end."""
    made: list[Rig] = []

    def make(code: bytes, ring: int = 0) -> Rig:
        made.append(Rig(code, ring))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def make_physical(kernel: Kernel) -> Iterator[Callable[..., GuestPhysical]]:  # noqa: ARG001
    """Make a GuestPhysical over an arena of 64 MiB."""
    made: list[GuestPhysical] = []

    def make(
        *, limit: int = 32, physical_bits: int = 40, lazy_slots: bool = False
    ) -> GuestPhysical:
        from kvmmm.platform.kvm.guest_physical import GuestPhysical
        from tests.platform.kvm.user_rig import FakeVm

        vm = FakeVm(limit, physical_bits)
        arena = Arena(64 << 20)
        made.append(GuestPhysical(vm, arena, lazy_slots=lazy_slots))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for physical in made:
        physical.close()
        physical.arena.close()
