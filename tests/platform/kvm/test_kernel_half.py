"""KernelHalf: what a CPU needs above the user's addresses, read back and used by a guest."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import RangeError
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.pagetables import PageTables
from kvmmm.pagetables.pte import PTE_A, PTE_D, PTE_U, PTE_W, access_of
from kvmmm.platform.kvm import boot
from kvmmm.platform.kvm.kernel_half import KERNEL_SLOT, KERNEL_START, KernelHalf
from kvmmm.safemem.ffi import lib
from tests.platform.kvm.user_rig import CODE, DATA, PAGE, RESULT, SECOND, UserRig
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.guest_physical import GuestPhysical

N_VCPUS = 3


def make_half(make: Callable[..., GuestPhysical]) -> tuple[KernelHalf, PageTables]:
    physical = make()
    half = KernelHalf(physical, N_VCPUS)
    return half, PageTables(physical.frames, fixed=half.fixed)


class TestLayout:
    def test_every_root_leads_there(self, make_physical: Callable[..., GuestPhysical]):
        half, tables = make_half(make_physical)
        assert half.fixed.keys() == {KERNEL_SLOT}
        runs = list(tables.mappings(KERNEL_START, include_fixed=True))
        assert runs[0].gva == KERNEL_START
        assert runs[-1].gva + runs[-1].length_bytes == KERNEL_START + (3 + 2 * N_VCPUS) * PAGE
        for run in runs:
            assert run.flags & PTE_A
            assert run.flags & PTE_D
            is_stub = half.stubs_gva <= run.gva <= half.syscall_gva
            assert access_of(run.flags) == READ | (EXECUTE if is_stub else WRITE)
            # Ring 3 may use the SYSCALL stub alone.
            assert bool(run.flags & PTE_U) == (run.gva == half.syscall_gva)
            assert not (run.flags & PTE_U and run.flags & PTE_W)
        tables.release()
        half.close()

    @pytest.mark.parametrize("number", range(N_VCPUS))
    def test_each_vcpu_has_its_own(self, make_physical: Callable[..., GuestPhysical], number: int):
        half, tables = make_half(make_physical)
        physical = half._physical
        runs = list(tables.mappings(KERNEL_START, include_fixed=True))

        def read(gva: int, length: int) -> bytes:
            run = next(r for r in runs if r.gva <= gva < r.gva + r.length_bytes)
            fo = run.gpa + gva - run.gva - physical.gpa_of(physical.arena, 0)
            return physical.arena.view[fo : fo + length].tobytes()

        layout = half.layout(number, 0x1234000)
        assert layout.root_gpa == 0x1234000
        assert read(layout.idt_gpa, 4096) == boot.idt(half.stubs_gva)
        assert read(half.stubs_gva, 1024) == boot.STUBS
        assert read(half.syscall_gva, 4) == bytes((0xE6, lib.KVMMM_PORT_SYSCALL, 0xEB, 0xFE))
        assert read(layout.gdt_gpa, boot.GDT_BYTES) == boot.gdt(layout.tss_gpa)
        tss = read(layout.tss_gpa, boot.TSS_BYTES)
        assert tss == boot.tss(layout.ist_top_gpa)
        # TR's limit must not reach into another page: the I/O bitmap is read from here.
        assert layout.tss_gpa % PAGE + boot.TSS_BYTES <= PAGE
        physical.arena.view[half.stack_top_hva(number) - physical.arena.hva - 8 :][:8] = b"top word"
        assert read(layout.ist_top_gpa - 8, 8) == b"top word"
        others = {half.stack_top_gva(n) for n in range(N_VCPUS)} - {layout.ist_top_gpa}
        assert all(abs(other - layout.ist_top_gpa) >= 2 * PAGE for other in others)
        tables.release()
        half.close()

    def test_no_more_vcpus_than_it_was_made_for(self, make_physical: Callable[..., GuestPhysical]):
        half, tables = make_half(make_physical)
        with pytest.raises(RangeError, match="3 vCPUs"):
            half.stack_top_gva(N_VCPUS)
        tables.release()
        half.close()
        half.close()
        # All but tables, which go with their frames.
        assert half._physical.arena.statistics().used_bytes == 16 * PAGE


@pytest.mark.kvm
@pytest.mark.npt
class TestOnKvm:
    @pytest.mark.parametrize(
        ("code", "vector", "error_code"),
        [
            ("0f 0b", 6, 0),
            ("cc", 3, 0),
            ("31 d2 31 c9 f7 f1", 0, 0),
            ("e4 99", 13, 0),
            ("e6 bf", 13, 0),
        ],
        ids=["ud2", "int3", "div by zero", "in on a closed port", "the stubs' own port"],
    )
    def test_exceptions(self, code: str, vector: int, error_code: int):
        with UserRig() as rig:
            vcpu = rig.load(bytes.fromhex(code))
            seen: list[Any] = []
            vcpu.on_trap = lambda v, e: seen.append((v, e)) or "trap"
            assert vcpu.run(10 * SECOND) == "trap"
            assert seen == [(vector, error_code)]
            assert vcpu.regs.rip - CODE < 8

    def test_a_page_fault_in_the_kernel_half(self):
        """Ring 3 may neither read nor write what is ours; the SYSCALL stub it may read."""
        with UserRig() as rig:
            code = Code()
            for gva in (KERNEL_START, rig.half.stubs_gva, rig.half.stack_top_gva(0) - 8):
                code.mov("rsi", gva).load("rax", "rsi")
            code.mov("rsi", rig.half.syscall_gva).load("rax", "rsi").store("rsi", "rax")
            vcpu = rig.load(code.bytes)
            seen = []

            def on_fault(addr: int, access: int) -> str | None:
                seen.append((addr, access))
                vcpu.regs.rip += 4
                return "end" if access == WRITE else None

            vcpu.on_fault = on_fault
            assert vcpu.run(10 * SECOND) == "end"
            assert seen == [
                (KERNEL_START, READ),
                (rig.half.stubs_gva, READ),
                (rig.half.stack_top_gva(0) - 8, READ),
                (rig.half.syscall_gva, WRITE),
            ]
            assert vcpu.regs.rax & 0xFFFF == 0xE6 | lib.KVMMM_PORT_SYSCALL << 8

    def test_system_calls_from_two_vcpus(self):
        with UserRig() as rig:
            code = Code().raw("0f 05").store("rsi", "rax").out32(0xB0).bytes  # syscall
            fr = rig.frames(0, n_pages=2)
            rig.space.map_file(DATA, rig.arena, fr, READ | WRITE)
            for number in range(2):
                vcpu = rig.load(code, rax=40 + number, rdi=7, rsi=DATA + number * PAGE)
                vcpu.on_syscall = lambda nr, regs=vcpu.regs: nr * 100 + regs.rdi
                vcpu.run(10 * SECOND)
                assert vcpu.regs.rax == (40 + number) * 100 + 7
                word = struct.unpack_from("<Q", rig.arena.view, fr.start + number * PAGE)
                assert word == (vcpu.regs.rax,)
                assert vcpu.regs.rsp == RESULT + PAGE
