"""Real address spaces, real CPUs: page tables under a guest in ring 3, memslots under one as well.

The guest is a handful of instructions that touch memory and end with an `out`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import EXECUTE, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import boot, exits
from kvmmm.platform.kvm.address_space import MemslotAddressSpace
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.kernel_half import KernelHalf
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.user_slots import LazySlots
from tests.model.backends import ARENA_BYTES, CODE, Backend

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.safemem.ffi import MmioExit

TIMEOUT_NS = 20_000_000_000
N_SCRATCH = 4
# Each piece begins at a multiple of 16.
LOADS = {1: "8a06", 2: "668b06", 4: "8b06", 8: "488b06"}  # mov al/ax/eax/rax, [rsi]
STORES = {1: "8807", 2: "668907", 4: "8907", 8: "488907"}  # mov [rdi], al/ax/eax/rax
_MOVE = "f3a4"  # rep movsb
_PIECES = [*LOADS.values(), *STORES.values(), _MOVE, ""]
_OFFSETS = {piece: 16 * n for n, piece in enumerate(_PIECES)}
GUEST = b"".join((bytes.fromhex(piece) + CODE).ljust(16, b"\x90") for piece in _PIECES)


class Guest:
    """What one vCPU runs: pieces at `code`, and bytes in `scratch`, at `frames` of the arena."""

    def __init__(self, vcpu: Vcpu, arena: Arena, frames: FileRange, code: int) -> None:
        self.vcpu = vcpu
        self._view = arena.view_of(frames)
        self._view[: len(GUEST)] = GUEST
        self._code = code
        self._scratch = code + PAGE_BYTES
        vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_VALUE, lambda _port, _value: True)

    def close(self) -> None:
        self._view.release()

    def load(self, addr: int, n_bytes: int) -> bytes:
        regs = self.vcpu.regs
        if n_bytes in LOADS:
            regs.rsi, regs.rax = addr, 0x5A5A_5A5A_5A5A_5A5A
            self._run(_OFFSETS[LOADS[n_bytes]])
            return int(regs.rax).to_bytes(8, "little")[:n_bytes]
        regs.rsi, regs.rdi, regs.rcx = addr, self._scratch, n_bytes
        self._run(_OFFSETS[_MOVE])
        return bytes(self._view[PAGE_BYTES : PAGE_BYTES + n_bytes])

    def store(self, addr: int, data: bytes) -> None:
        regs = self.vcpu.regs
        if len(data) in STORES:
            regs.rdi, regs.rax = addr, int.from_bytes(data, "little")
            self._run(_OFFSETS[STORES[len(data)]])
            return
        self._view[PAGE_BYTES : PAGE_BYTES + len(data)] = data
        regs.rsi, regs.rdi, regs.rcx = self._scratch, addr, len(data)
        self._run(_OFFSETS[_MOVE])

    def jump(self, addr: int) -> None:
        self._run(addr - self._code)

    def _run(self, offset: int) -> None:
        self.vcpu.regs.rip = self._code + offset
        answer = self.vcpu.run(TIMEOUT_NS)
        if isinstance(answer, Exception):
            raise answer
        assert answer is True, f"{answer!r} at {self.vcpu.regs.rip:#x}"


class PageTableBackend(Backend):
    """One VM, one vCPU that goes from space to space."""

    max_addr = 1 << 40
    # As the fake's, and over an edge of 512 GiB: another entry of the root.
    hoods = (0, 16, 506, 1020, (1 << 18) - 6, (1 << 27) - 6)
    is_atomic = True
    has_exact_faults = False
    CODE_SLOT = 255
    CODE_GVA = CODE_SLOT << 39

    def __init__(
        self, *, lazy_slots: bool = False, map_unit_pages: int = 512, max_leaf_pages: int = 0
    ) -> None:
        self._map_unit_bytes = map_unit_pages * PAGE_BYTES
        self._max_leaf_bytes = max_leaf_pages * PAGE_BYTES or None
        self.arena = Arena(ARENA_BYTES)
        self.vm = Vm()
        self.physical = GuestPhysical(self.vm, self.arena, lazy_slots=lazy_slots)
        self._half = KernelHalf(self.physical)
        self._frames = self.arena.allocate((1 + N_SCRATCH) * PAGE_BYTES)
        gpa = self.physical.gpa_of(self.arena, self._frames.start)
        self.physical.ensure_slots(gpa, self._frames.length_bytes)
        self._tables = PageTables(self.physical.frames)
        code, data = flags_of(READ_EXECUTE, user=True), flags_of(READ_WRITE, user=True)
        self._tables.map(self.CODE_GVA, PAGE_BYTES, gpa, code)
        self._tables.map(self.CODE_GVA + PAGE_BYTES, N_SCRATCH * PAGE_BYTES, gpa + PAGE_BYTES, data)
        entry = self.physical.frames.entries(self._tables.root_gpa)[self.CODE_SLOT]
        self._fixed = {**self._half.fixed, self.CODE_SLOT: entry}
        self._mms: dict[int, MemoryManager] = {}
        self._running: MemoryManager | None = None
        vcpu = self.vm.create_vcpu()
        self._guest = Guest(vcpu, self.arena, self._frames, self.CODE_GVA)
        self._slots = LazySlots(self.physical, vcpu)
        vcpu.on_fault = self._on_fault
        vcpu.on_mmio = self._on_mmio
        vcpu.on_trap = lambda vector, code: f"trap {vector}, {code:#x}"
        vcpu.on_cold = self._on_cold
        self._is_loaded = False

    def new_space(self) -> PageTableAddressSpace:
        return PageTableAddressSpace(
            self.physical, self._fixed, max_addr=self.max_addr,
            map_unit_bytes=self._map_unit_bytes, max_leaf_bytes=self._max_leaf_bytes,
        )  # fmt: skip

    def attach(self, mm: MemoryManager) -> None:
        if not self._is_loaded:
            self._is_loaded = True
            space = _tables(mm)
            self._half.load(self._guest.vcpu, space.root_gpa, rip=self.CODE_GVA, rsp=0)

    def detach(self, mm: MemoryManager) -> None:
        _tables(mm).deactivate(self._guest.vcpu)

    def load(self, mm: MemoryManager, addr: int, n_bytes: int) -> bytes:
        return self._enter(mm).load(addr, n_bytes)

    def store(self, mm: MemoryManager, addr: int, data: bytes) -> None:
        self._enter(mm).store(addr, data)

    def fetch(self, mm: MemoryManager, addr: int) -> None:
        self._enter(mm).jump(addr)

    def _enter(self, mm: MemoryManager) -> Guest:
        self._running = mm
        _tables(mm).activate(self._guest.vcpu)
        return self._guest

    def _on_fault(self, addr: int, access: int) -> Exception | None:
        assert self._running is not None
        return _served(self._running, addr, access)

    def _on_mmio(self, exit_: MmioExit) -> object:
        return None if self._slots.on_mmio(exit_) else "a file that is cut"

    def _on_cold(self, reason: int) -> object:
        exit_ = exits.decode(self._guest.vcpu, reason)
        if isinstance(exit_, exits.InternalErrorExit) and exit_.is_emulation_failure:
            self._slots.restart(exit_.instruction)
            return None
        return f"exit {reason}"

    def own_bytes(self) -> int:
        frames = self.physical.frames._ranges
        half = self._half._range.length_bytes
        return sum(fr.length_bytes for fr in frames) + half + self._frames.length_bytes

    def close(self) -> None:
        self._guest.close()
        self.vm.close()
        self._half.close()
        self._tables.release()
        self.physical.close()
        self.arena.dec_ref(self._frames)
        self.arena.close()


def _served(mm: MemoryManager, addr: int, access: int) -> Exception | None:
    try:
        mm.handle_user_fault(addr, access)
    except (GuestFaultError, ArenaExhaustedError) as e:
        return e
    return None


def _tables(mm: MemoryManager) -> PageTableAddressSpace:
    space = mm.address_space
    assert isinstance(space, PageTableAddressSpace)
    return space


# Where the pages of a memslot guest lie: not too close behind all that an mm may have.
_MAX = 2 << 30
_AREA = _MAX + (16 << 20)
_TABLES, _N_TABLES = _AREA, 8
_GDT, _IDT, _TSS, _STUBS, _IST, _CODE = (
    _AREA + n * PAGE_BYTES for n in range(_N_TABLES, _N_TABLES + 6)
)
_AREA_BYTES = _CODE + (1 + N_SCRATCH) * PAGE_BYTES - _AREA


class Machine:
    """A VM with one vCPU in ring 3, under tables that map all addresses to themselves, rwx."""

    def __init__(self, arena: Arena, max_memslots: int | None) -> None:
        self.arena = arena
        self.frames = arena.allocate(_AREA_BYTES)
        self.vm = Vm(max_memslots=max_memslots)
        self.vm.memslots.add(_AREA, _AREA_BYTES, arena.hva + self.frames.start)
        self.space = MemslotAddressSpace(self.vm, _MAX)
        self.mm: MemoryManager | None = None
        self.n_served = 0
        self._is_dropping = False
        self._write_area()
        vcpu = self.vm.create_vcpu()
        code = self.frames.start + _CODE - _AREA
        self.guest = Guest(vcpu, arena, type(self.frames)(code, self.frames.end), _CODE)
        vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_EXIT, lambda _exit: "trap")
        vcpu.on_mmio = self._on_mmio
        vcpu.on_cold = lambda reason: f"exit {reason}: {exits.decode(vcpu, reason)!r}"
        layout = boot.BootLayout(
            root_gpa=_TABLES, gdt_gpa=_GDT, idt_gpa=_IDT, tss_gpa=_TSS, stubs_gpa=_STUBS,
            ist_top_gpa=_IST + PAGE_BYTES,
        )  # fmt: skip
        vcpu.load_boot_state(layout)
        vcpu.return_to_frame(
            vcpu.get_sregs(), rip=_CODE, cs=lib.KVMMM_USER_CS, rflags=boot.RFLAGS_RESERVED,
            rsp=0, ss=lib.KVMMM_USER_DS,
        )  # fmt: skip

    def _write_area(self) -> None:
        with self.arena.view_of(self.frames) as view:
            with view[: _N_TABLES * PAGE_BYTES] as words:
                tables = PageTables(MemoryTableAllocator(_N_TABLES, _TABLES, words))
                tables.map(0, _AREA + (2 << 20), 0, flags_of(7, user=True))
                del tables
            for gpa, content in (
                (_GDT, boot.gdt(_TSS)), (_IDT, boot.idt(_STUBS)),
                (_TSS, boot.tss(_IST + PAGE_BYTES)), (_STUBS, boot.STUBS),
            ):  # fmt: skip
                view[gpa - _AREA : gpa - _AREA + len(content)] = content

    def _on_mmio(self, exit_: MmioExit) -> Exception | None:
        if self._is_dropping:
            return None
        assert self.mm is not None
        access = WRITE if exit_.is_write else READ
        refusal = _served(self.mm, exit_.gpa, access)
        if refusal is None:
            self.n_served += 1
            found = self.mm.pmas.find(exit_.gpa)
            assert found is not None
            if found[2].file is self.arena:
                self.space.complete(exit_)
            elif exit_.is_write:
                self.mm.copy_out(exit_.gpa, exit_.data)
            else:
                exit_.value = int.from_bytes(self.mm.read(exit_.gpa, exit_.size_bytes), "little")
        return refusal

    def settle(self) -> None:
        """End an access that was refused, without doing it."""
        self._is_dropping = True
        while self.guest.vcpu.complete_pending() is not None:
            pass
        self._is_dropping = False

    def close(self) -> None:
        self.guest.close()
        self.vm.close()
        self.arena.dec_ref(self.frames)


class MemslotBackend(Backend):
    """A VM for each space, since that is what a guest's physical memory is."""

    max_addr = _MAX
    hoods = (0, 16, 506, 1020, (1 << 18) - 6, (1 << 19) - 12)
    is_torn = True
    has_exact_faults = False

    def __init__(self, *, max_memslots: int = 0) -> None:
        self._max_memslots = max_memslots or None
        self.may_evict = bool(max_memslots)
        self.arena = Arena(ARENA_BYTES)
        self._free: list[Machine] = []
        self._made: list[Machine] = []

    def new_space(self) -> MemslotAddressSpace:
        if not self._free:
            self._made.append(Machine(self.arena, self._max_memslots))
            self._free.append(self._made[-1])
        return self._free[-1].space

    def attach(self, mm: MemoryManager) -> None:
        machine = self._free.pop()
        assert machine.space is mm.address_space
        machine.mm = mm

    def detach(self, mm: MemoryManager) -> None:
        machine = self._of(mm)
        self._free.append(machine)

    def _of(self, mm: MemoryManager) -> Machine:
        return next(m for m in self._made if m.space is mm.address_space)

    def load(self, mm: MemoryManager, addr: int, n_bytes: int) -> bytes:
        machine = self._of(mm)
        try:
            return machine.guest.load(addr, n_bytes)
        except (GuestFaultError, ArenaExhaustedError):
            machine.settle()
            raise

    def store(self, mm: MemoryManager, addr: int, data: bytes) -> None:
        machine = self._of(mm)
        try:
            machine.guest.store(addr, data)
        except (GuestFaultError, ArenaExhaustedError):
            machine.settle()
            raise

    def fetch(self, mm: MemoryManager, addr: int) -> None:
        # Slots cannot withhold execution, and KVM cannot fetch where there is none: it is the mm
        # that says whether it may be.
        mm.handle_user_fault(addr, EXECUTE)
        self._of(mm).guest.jump(addr)

    def own_bytes(self) -> int:
        return sum(machine.frames.length_bytes for machine in self._made)

    def close(self) -> None:
        for machine in self._made:
            machine.close()
        self.arena.close()
