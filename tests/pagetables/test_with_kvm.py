"""Forked and edited tables under CPUs that walk them: what one space removed stays removed.

Each test has two spaces on one VM, and the other one touches the page again after the edit: a KVM
that shadows page tables then fills shadow pages that both may still reach, if links were edited
where they stood. Shootdowns are by data frames only, the weakest kind, and a new root is loaded
only where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.safemem.ffi import IoExit, ffi, lib
from tests.platform.kvm.conftest import CODE, GDT, IDT, SECOND, STACK_TOP, TABLES, TSS, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.platform.kvm.vcpu import Vcpu

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60)]

PAGE, HUGE = 1 << 12, 1 << 21
V = 1 << 39
"""In slot 1 of the PML4; slot 0 has the rig's own pages, and is fixed."""
FRAMES = 0x19_0000
ALLOCATOR = 0x2_0000
READ_CODE, WRITE_CODE = CODE, CODE + 0x40
R, RW = flags_of(READ, user=True), flags_of(READ_WRITE, user=True)
FAULT = "page fault"


class Cpu:
    """A vCPU in ring 3, on some page tables, that reads or writes a word at a time."""

    def __init__(self, vcpu: Vcpu, tables: PageTables) -> None:
        self.vcpu = vcpu
        self.tables = tables
        self._root_gpa = -1
        for port in (0xB0, lib.KVMMM_PORT_TRAP):
            vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)

    def _go(self, rip: int, gva: int, word: int = 0) -> int | str:
        vcpu = self.vcpu
        if self._root_gpa != self.tables.root_gpa:
            self._root_gpa = self.tables.root_gpa
            sregs = ffi.new("struct kvm_sregs *")
            ffi.memmove(sregs, vcpu.trial.sregs, len(vcpu.trial.sregs))
            sregs.gdt.base, sregs.idt.base, sregs.tr.base = GDT, IDT, TSS
            sregs.cr3 = self._root_gpa
            vcpu.return_to_frame(sregs, rip=rip, cs=0x33, rflags=2, rsp=STACK_TOP, ss=0x2B)
        regs = vcpu.regs
        regs.rip, regs.rdi, regs.rsi = rip, gva, word
        exit_ = vcpu.once(10 * SECOND)
        assert isinstance(exit_, IoExit)
        if exit_.port == lib.KVMMM_PORT_TRAP:
            self._root_gpa = -1  # back to ring 3 next time
            return FAULT
        return regs.rax

    def read(self, gva: int) -> int | str:
        return self._go(READ_CODE, gva)

    def write(self, gva: int, word: int) -> int | str:
        result = self._go(WRITE_CODE, gva, word)
        return FAULT if result == FAULT else word


class Machine:
    """Two CPUs on tables of their own."""

    def __init__(self) -> None:
        code = bytearray(0x60)
        code[:7] = bytes.fromhex("488b07e7b0ebfe")  # mov (%rdi),%rax; out %eax,$0xb0; jmp .
        code[0x40:0x47] = bytes.fromhex("488937e7b0ebfe")  # mov %rsi,(%rdi); ...
        self.rig = rig = Rig(bytes(code), 3)
        n_tables = 64
        self.room = rig.memory[ALLOCATOR : ALLOCATOR + n_tables * PAGE]
        boot_link = int.from_bytes(rig.memory[TABLES : TABLES + 8], "little")
        self.allocator = MemoryTableAllocator(n_tables, ALLOCATOR, self.room)
        self.first, self.second = (
            Cpu(vcpu, PageTables(self.allocator, fixed={0: boot_link}))
            for vcpu in (rig.vcpu, rig.vm.create_vcpu())
        )
        for i in range(8):
            self.put(i, 0x1000 + i)

    def put(self, frame: int, word: int) -> None:
        at = FRAMES + frame * PAGE
        self.rig.memory[at : at + 8] = word.to_bytes(8, "little")

    def shoot_down(self, frame: int, n_frames: int = 1) -> None:
        hva = self.rig.arena.hva + self.rig.frames.start + FRAMES + frame * PAGE
        assert lib.kvmmm_drop_pages(hva, n_frames * PAGE) == 0

    def close(self) -> None:
        del self.allocator, self.first, self.second
        self.room.release()
        self.rig.close()


@pytest.fixture
def m() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def _fork(m: Machine, n_pages: int = 3) -> None:
    m.first.tables.map(V, n_pages * PAGE, FRAMES, RW)
    assert m.first.write(V, 0x1111) == 0x1111
    m.first.tables.fork_into(m.second.tables)
    for cpu in (m.first, m.second):
        assert [cpu.read(V), cpu.read(V + PAGE)] == [0x1111, 0x1001]


def test_after_a_fork_neither_can_write(m: Machine):
    _fork(m)
    assert m.first.write(V, 5) == FAULT
    assert m.second.write(V, 5) == FAULT
    assert m.second.read(V) == 0x1111


def test_a_page_of_ones_own_after_a_fork(m: Machine):
    _fork(m)
    m.put(7, 0x7777)
    for cpu, other in ((m.first, m.second), (m.second, m.first)):
        before = other.read(V)
        assert cpu.tables.map(V, PAGE, FRAMES + 7 * PAGE, RW)
        m.shoot_down(0)
        # The host wrote the new frame: no fault of this CPU comes before its next read.
        assert other.read(V) == before
        assert cpu.read(V) == 0x7777
        assert cpu.write(V + PAGE, 1) == FAULT
        assert cpu.read(V + PAGE) == 0x1001
    assert m.first.write(V, 0x8888) == 0x8888
    assert m.second.read(V) == 0x8888, "here they share a page on purpose"


@pytest.mark.parametrize("whole", [False, True])
def test_what_one_unmaps_after_a_fork_stays_unmapped(m: Machine, whole: bool):
    _fork(m)
    assert m.first.tables.unmap(V, V if whole else PAGE)
    m.shoot_down(0, 3)
    assert m.second.read(V) == 0x1111
    assert m.first.read(V) == FAULT
    assert m.first.read(V + PAGE) == (FAULT if whole else 0x1001)


@pytest.mark.parametrize("length", [PAGE, HUGE])
@pytest.mark.parametrize("flags", [0, R])
def test_a_superpage_that_another_space_maps(m: Machine, length: int, flags: int):
    for cpu in (m.first, m.second):
        cpu.tables.map(V, HUGE, 0, RW)
    at = V + FRAMES
    assert m.first.write(at, 0x2222) == m.second.read(at) == 0x2222
    start = at if length == PAGE else V
    assert m.first.tables.protect(start, length, flags)
    m.shoot_down(0)
    assert m.second.write(at, 0x3333) == 0x3333
    assert m.first.read(at) == (0x3333 if flags else FAULT)
    assert m.first.write(at, 0x4444) == FAULT
    assert m.first.read(at + PAGE) == (FAULT if length == HUGE and not flags else 0x1001)


@pytest.mark.parametrize("zapped", [False, True])
def test_an_emptied_table_is_no_way_to_its_next_user(m: Machine, zapped: bool):
    tables = m.first.tables
    tables.map(V, PAGE, FRAMES, RW)
    assert m.first.read(V) == 0x1000
    tables.unmap(V, PAGE)
    m.shoot_down(0)
    if zapped:
        # KVM drops all shadow pages when a slot goes.
        slots = m.rig.vm.memslots
        slots.remove(slots.add(1 << 36, PAGE, m.rig.arena.hva))
    tables.recycle(zapped=zapped)
    m.second.tables.map(V + 5 * HUGE, 2 * PAGE, FRAMES + PAGE, RW)
    assert m.second.read(V + 5 * HUGE) == 0x1001
    assert m.first.read(V) == FAULT
    # And back in its place.
    assert not tables.map(V + PAGE, PAGE, FRAMES + 3 * PAGE, RW)
    assert m.first.read(V + PAGE) == 0x1003
    assert m.first.read(V) == FAULT
