"""`KernelHalf`: what the CPUs of user guests need above the user's addresses, shared by all spaces.

    PML4[511]              what                                                  ring 3
    0xffffff8000000000     IDT: all 256 vectors lead to their stub               -
             ...1000       exception stubs, one `out` each                       -
             ...2000       SYSCALL stub, one `out`                               read, execute
             ...3000       by vCPU: GDT and TSS with I/O bitmap; then the        -
             ...           ring-0 and IST stack, one page, growing down

The entry of PML4[511] is put into every root, so that a fork or a switch of spaces leaves it alone.
(PML4[256], where a kernel begins elsewhere, is not usable on every KVM.) Whatever a CPU walks,
pushes to or marks must not fault: all of it is resident and writable in one slot, with accessed and
dirty bits set in tables and descriptors.

No code of ours runs there but the `out`s: the host answers by setting registers. The SYSCALL stub
minds no ring, because some KVMs enter it in ring 3: no stack, no swapgs, on a page that ring 3 may
execute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import RangeError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.pagetables import PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import boot
from kvmmm.safemem.ffi import lib

if TYPE_CHECKING:
    from kvmmm.platform.kvm.guest_physical import GuestPhysical
    from kvmmm.platform.kvm.vcpu import Vcpu

KERNEL_SLOT = 511
"""Which entry of every root is ours."""
KERNEL_START = 0xFFFF_FF80_0000_0000
"""The first address that it covers."""

_IDT, _STUBS, _SYSCALL, _VCPUS = 0x0000, 0x1000, 0x2000, 0x3000
_TSS = 0x100  # behind the GDT, in the same page
_STACK = 0x1000
_VCPU_BYTES = 0x2000
_READ_EXECUTE = flags_of(READ | EXECUTE, user=False)
_USER_READ_EXECUTE = flags_of(READ | EXECUTE, user=True)
_DATA = flags_of(READ_WRITE, user=False)


class KernelHalf:
    """The pages, their tables, and how a vCPU is set up for them. One a VM.

    Lifetime: `close` after the VM, before table frames and arena.

    Args:
        physical: Where the arena lies in the VM, and where tables come from.
        n_vcpus: How many vCPUs there can be: each has its own TSS and stack.

    Attributes:
        fixed: What goes into every root, by index.
        stubs_gva: First exception stub.
        syscall_gva: The SYSCALL stub.
    """

    stubs_gva = KERNEL_START + _STUBS
    syscall_gva = KERNEL_START + _SYSCALL

    def __init__(self, physical: GuestPhysical, n_vcpus: int = 1) -> None:
        self._physical = physical
        frames = physical.frames
        self._n_vcpus = n_vcpus
        arena = physical.arena
        length = _VCPUS + n_vcpus * _VCPU_BYTES
        self._range = arena.allocate(length)
        self._tables: PageTables | None = None
        try:
            gpa = physical.gpa_of(arena, self._range.start)
            physical.ensure_slots(gpa, length)
            self._write()
            # Only one entry of this root is wanted; the others would be user addresses.
            self._tables = PageTables(frames)
            for offset, flags in (
                (_IDT, _DATA), (_STUBS, _READ_EXECUTE), (_SYSCALL, _USER_READ_EXECUTE),
            ):  # fmt: skip
                self._tables.map(KERNEL_START + offset, PAGE_BYTES, gpa + offset, flags)
            self._tables.map(KERNEL_START + _VCPUS, length - _VCPUS, gpa + _VCPUS, _DATA)
            self.fixed = {KERNEL_SLOT: frames.entries(self._tables.root_gpa)[KERNEL_SLOT]}
        except BaseException:
            self.close()
            raise

    def _write(self) -> None:
        with self._physical.arena.view_of(self._range) as view:

            def put(offset: int, content: bytes) -> None:
                view[offset : offset + len(content)] = content

            put(_IDT, boot.idt(self.stubs_gva))
            put(_STUBS, boot.STUBS)
            put(_SYSCALL, boot.syscall_stub())
            for number in range(self._n_vcpus):
                at = _VCPUS + number * _VCPU_BYTES
                put(at, boot.gdt(KERNEL_START + at + _TSS))
                put(at + _TSS, boot.tss(self.stack_top_gva(number)))

    def stack_top_gva(self, number: int) -> int:
        """Return where the ring-0 stack of a vCPU ends, under which the CPU pushes."""
        return KERNEL_START + self._stack_top(number)

    def stack_top_hva(self, number: int) -> int:
        """Return the host address of the same place."""
        return self._physical.arena.hva + self._range.start + self._stack_top(number)

    def _stack_top(self, number: int) -> int:
        if not 0 <= number < self._n_vcpus:
            raise RangeError(number, number, f"this VM was made for {self._n_vcpus} vCPUs")
        return _VCPUS + number * _VCPU_BYTES + _STACK + PAGE_BYTES

    def layout(self, number: int, root_gpa: int) -> boot.BootLayout:
        """Return what the start state of a vCPU needs."""
        at = KERNEL_START + _VCPUS + number * _VCPU_BYTES
        return boot.BootLayout(
            root_gpa=root_gpa, gdt_gpa=at, idt_gpa=KERNEL_START + _IDT, tss_gpa=at + _TSS,
            stubs_gpa=self.stubs_gva, ist_top_gpa=self.stack_top_gva(number),
        )  # fmt: skip

    def load(self, vcpu: Vcpu, root_gpa: int, *, rip: int, rsp: int) -> None:
        """Have a vCPU start in ring 3; exceptions and SYSCALL go to its `on_fault` and so on.

        Preconditions:
            - It has not run, or has left its last run for good.

        Args:
            vcpu: The vCPU; its number chooses TSS and stack.
            root_gpa: The first address space's root; `PageTableAddressSpace.activate` comes next.
            rip: Guest-virtual address of the first instruction.
            rsp: Its stack pointer.
        """
        vcpu.load_boot_state(self.layout(vcpu.number, root_gpa))
        vcpu.return_to_frame(
            vcpu.get_sregs(), rip=rip, cs=lib.KVMMM_USER_CS, rflags=boot.RFLAGS_RESERVED, rsp=rsp,
            ss=lib.KVMMM_USER_DS,
        )  # fmt: skip
        vcpu.set_syscall_entry(self.syscall_gva)
        vcpu.set_trap_area(self.stubs_gva, self.stack_top_hva(vcpu.number))
        vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_TRAP, None)
        vcpu.set_port(lib.KVMMM_PORT_SYSCALL, lib.KVMMM_PORT_KIND_SYSCALL, None)

    def close(self) -> None:
        """Give tables and pages back. Idempotent.

        Preconditions:
            - No CPU uses a root with `fixed` in it any more.
        """
        if self._tables is not None:
            self._tables.release()
            self._tables = None
        if self._range:
            self._physical.arena.dec_ref(self._range)
            self._range = type(self._range)(0, 0)
