"""Exceptions and SYSCALL decoded in C: what the handlers are told, and where the guest goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import VcpuError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import IoExit, lib
from tests.platform.kvm.conftest import (
    ABSENT,
    CODE,
    DATA,
    IST_TOP,
    MEMORY,
    SECOND,
    STACK_TOP,
    STUBS,
    TABLES,
)
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(60)]

SYSCALL_STUB = 0x6000
FLAGS = 0x202
"""Bit 1 is always set; interrupts are on in ring 3, on some KVMs whatever one says."""
TF, DF = 1 << 8, 1 << 10
UNMAPPED = 0x8000_0000
"""In no table: an access is a #PF."""


def trapping(rig: MakeRig, code: Code | bytes, ring: int = 3) -> Rig:
    """A rig whose exceptions and system calls are decoded."""
    one = rig(code if isinstance(code, bytes) else code.bytes, ring)
    vcpu = one.vcpu
    vcpu.set_trap_area(STUBS, one.arena.hva + one.frames.start + IST_TOP)
    vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_TRAP, None)
    one.memory[SYSCALL_STUB : SYSCALL_STUB + 4] = bytes((0xE6, lib.KVMMM_PORT_SYSCALL, 0xEB, 0xFE))
    vcpu.set_syscall_entry(SYSCALL_STUB)
    vcpu.set_port(lib.KVMMM_PORT_SYSCALL, lib.KVMMM_PORT_KIND_SYSCALL, None)
    return one


def run(one: Rig) -> object:
    """Run until a handler answers, or to port 0xb0."""
    return one.vcpu.run(10 * SECOND)


SYSCALL, UD2, INT3 = "0f 05", "0f 0b", "cc"


class TestFault:
    @pytest.mark.parametrize("ring", [0, 3])
    @pytest.mark.parametrize(
        ("code", "access", "addr"),
        [
            (Code().mov("rbx", UNMAPPED + 8).load("rax", "rbx"), READ, UNMAPPED + 8),
            (Code().mov("rbx", UNMAPPED + 8).store("rbx", "rax"), WRITE, UNMAPPED + 8),
            (Code().mov("rbx", UNMAPPED + 8).inc_at("rbx"), WRITE, UNMAPPED + 8),
            (Code().mov("rbx", UNMAPPED).jump("rbx"), EXECUTE, UNMAPPED),
            (Code().mov("rbx", ABSENT).jump("rbx"), EXECUTE, ABSENT),
        ],
        ids=["load", "store", "modify", "jump", "jump to no-execute"],
    )
    def test_what_the_handler_is_told(
        self, rig: MakeRig, code: Code, access: int, addr: int, ring: int
    ):
        one = trapping(rig, code, ring)
        told: list[tuple[int, int]] = []
        one.vcpu.on_fault = lambda *args: told.append(args) or "seen"
        assert run(one) == "seen"
        if access == WRITE and told[0][1] == READ:  # an emulated CPU loads before it stores
            assert code.bytes.endswith(Code().inc_at("rbx").bytes)
            access = READ
        assert told == [(addr, access)]
        assert type(told[0][0]) is type(told[0][1]) is int
        regs, sregs = one.vcpu.regs, one.vcpu.get_sregs()
        assert regs.rip == (addr if access == EXECUTE else CODE + 10)
        assert regs.rsp == STACK_TOP
        assert regs.rbx in (addr, addr & ~0xFFF)
        assert regs.rflags & 0x202 in (0x202, 2)
        selectors = (0x33, 0x2B) if ring else (0x10, 0x18)
        assert (sregs.cs.selector, sregs.ss.selector) == selectors
        assert sregs.cs.dpl == sregs.ss.dpl == ring

    def test_none_goes_on_with_the_instruction(self, rig: MakeRig, scaled: Callable[[int], int]):
        n = scaled(300)
        step = Code().load("rcx", "rbx").store("rbx", "rcx").inc_at("rbx").add("rbx", 4096)
        code = Code().mov("rdx", n).mov("rbx", UNMAPPED)
        loop = code.here
        code.raw(step.bytes).dec("rdx").jump_back_unless_zero(loop).out32(0xB0)
        one = trapping(rig, code)
        # The rig's own tables once more, to add to: one frame under all of it.
        tables = PageTables(
            MemoryTableAllocator(16, TABLES, one.memory[TABLES : TABLES + 0x1_0000])
        )
        tables.map(0, MEMORY, 0, flags_of(ANY_ACCESS, user=True))
        one.memory[DATA : DATA + 8] = bytes(8)
        told: list[int] = []

        def on_fault(addr: int, access: int) -> None:
            assert access == READ
            told.append(addr)
            tables.map(addr & ~0xFFF, 4096, DATA, flags_of(READ_WRITE, user=True))

        one.vcpu.on_fault = on_fault
        assert isinstance(run(one), IoExit)
        assert told == [UNMAPPED + 4096 * i for i in range(n)]
        assert int.from_bytes(one.memory[DATA : DATA + 8], "little") == n

    def test_a_handlers_registers_count(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rbx", UNMAPPED).load("rax", "rbx").out32(0xB0))

        def on_fault(_addr: int, _access: int) -> None:
            one.vcpu.regs.rbx = DATA

        one.memory[DATA : DATA + 8] = (77).to_bytes(8, "little")
        one.vcpu.on_fault = on_fault
        exit_ = run(one)
        assert isinstance(exit_, IoExit)
        assert exit_.value == 77

    def test_an_exception_of_a_handler_comes_out(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rbx", UNMAPPED).load("rax", "rbx").out32(0xB0))

        def on_fault(_addr: int, _access: int) -> None:
            raise LookupError("mine")

        one.vcpu.on_fault = on_fault
        with pytest.raises(LookupError, match="mine"):
            run(one)
        assert one.vcpu.handler_failed
        assert one.vcpu.regs.rip == CODE + 10

    def test_without_a_handler_the_exit_is_the_answer(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rbx", UNMAPPED).load("rax", "rbx"))
        exit_ = run(one)
        assert isinstance(exit_, IoExit)
        assert exit_.port == lib.KVMMM_PORT_TRAP

    def test_once_gives_the_exit(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rbx", UNMAPPED).load("rax", "rbx"))
        one.vcpu.on_fault = lambda *_: pytest.fail("called")
        exit_ = one.once()
        assert isinstance(exit_, IoExit)
        assert exit_.port == lib.KVMMM_PORT_TRAP


class TestTrap:
    @pytest.mark.parametrize(
        ("code", "vector", "error_code", "skipped"),
        [
            (UD2, 6, 0, 0),
            (INT3, 3, 0, 1),
            ("f4", 13, 0, 0),  # hlt
            ("31 c9 f7 f1", 0, 0, 2),  # xor ecx, ecx; div ecx
            ("b9 00 00 00 00 8e d1", 13, 0, 5),  # mov ss, 0
            ("b8 78 56 00 00 8e d8", 13, 0x5678, 5),  # mov ds, beyond the GDT
            ("e6 bf", 13, 0, 0),  # out to the port that ring 3 may not use
        ],
        ids=["ud2", "int3", "hlt", "div", "null ss", "selector", "trap port"],
    )
    def test_what_the_handler_is_told(
        self, rig: MakeRig, code: str, vector: int, error_code: int, skipped: int
    ):
        one = trapping(rig, Code().raw(code).spin())
        told: list[tuple[int, int]] = []
        one.vcpu.on_trap = lambda *args: told.append(args) or "seen"
        assert run(one) == "seen"
        assert told == [(vector, error_code)]
        assert one.vcpu.regs.rip == CODE + skipped
        assert one.vcpu.regs.rsp == STACK_TOP

    def test_a_reserved_bit_is_no_missing_page(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rbx", UNMAPPED).load("rax", "rbx"))
        pdpt = int.from_bytes(one.memory[TABLES : TABLES + 8], "little") & 0xF_F000
        entry = pdpt + 8 * (UNMAPPED >> 30)
        one.memory[entry : entry + 8] = (1 << 51 | 7).to_bytes(8, "little")
        told: list[tuple[int, int]] = []
        one.vcpu.on_trap = lambda *args: told.append(args) or "seen"
        one.vcpu.on_fault = lambda *_: pytest.fail("called")
        assert run(one) == "seen"
        assert [(vector, code & 8) for vector, code in told] == [(14, 8)]

    def test_single_step(self, rig: MakeRig):
        one = trapping(rig, Code().mov("rax", 1).mov("rcx", 2).mov("rdx", 3).out32(0xB0))
        one.vcpu.regs.rflags = FLAGS | TF
        told: list[tuple[int, int]] = []

        def on_trap(vector: int, _code: int) -> None:
            told.append((vector, one.vcpu.regs.rip - CODE))
            assert one.vcpu.regs.rflags & TF
            if len(told) == 3:
                one.vcpu.regs.rflags &= ~TF

        one.vcpu.on_trap = on_trap
        assert isinstance(run(one), IoExit)
        assert told == [(1, 10), (1, 20), (1, 30)]

    def test_none_goes_on_behind_an_int3(self, rig: MakeRig):
        one = trapping(rig, Code().raw(INT3).out32(0xB0))
        one.vcpu.on_trap = lambda *_: None
        assert isinstance(run(one), IoExit)
        assert one.vcpu.get_sregs().cs.selector == 0x33

    def test_a_frame_that_is_none_is_an_error_that_says_so(self, rig: MakeRig):
        one = trapping(rig, Code().raw(UD2), ring=0)
        one.vcpu.set_trap_area(STUBS, one.arena.hva + one.frames.start + DATA)  # not the stack
        one.vcpu.on_trap = lambda *_: pytest.fail("called")
        with pytest.raises(VcpuError, match=r"vector 6, .* set_trap_area"):
            run(one)

    def test_an_out_of_ring_0_is_the_ports_handlers_business(self, rig: MakeRig):
        code = Code().out8(lib.KVMMM_PORT_TRAP, 5).out32(0xB0).bytes
        one = trapping(rig, code, ring=0)
        with pytest.raises(VcpuError, match="none can be served"):
            run(one)
        one = trapping(rig, code, ring=0)
        seen: list[int] = []

        def handler(exit_: IoExit) -> None:
            seen.append(exit_.value)

        one.vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_TRAP, handler)
        assert isinstance(run(one), IoExit)
        assert seen == [5]

    def test_an_exception_in_a_stub_ends_the_run(self, rig: MakeRig):
        """Going on would find the first frame overwritten."""
        one = trapping(rig, Code().raw(INT3))
        one.memory[STUBS + 3 * 4 : STUBS + 3 * 4 + 2] = bytes.fromhex(UD2)
        one.vcpu.on_trap = lambda *_: pytest.fail("called")
        with pytest.raises(VcpuError, match=f"vector 6, .* rip {STUBS + 12:#x}"):
            run(one)

    def test_the_stack_must_be_aligned_as_the_cpu_aligns_it(self, rig: MakeRig):
        with pytest.raises(ValueError, match="16-byte aligned"):
            rig(b"").vcpu.set_trap_area(STUBS, 0x1008)


class TestSyscall:
    @pytest.mark.parametrize(
        ("answer", "rax"),
        [
            (0, 0), (7, 7), (-38, (1 << 64) - 38), ((1 << 64) - 1, (1 << 64) - 1),
            (-(1 << 63), 1 << 63), (None, 1234), (True, 1),
        ],
    )  # fmt: skip
    def test_an_int_goes_to_rax(self, rig: MakeRig, answer: int | None, rax: int):
        one = trapping(rig, Code().mov("rax", 1234).raw(SYSCALL).out32(0xB0))
        numbers: list[int] = []

        def on_syscall(number: int) -> int | None:
            numbers.append(number)
            return answer

        one.vcpu.on_syscall = on_syscall
        assert isinstance(run(one), IoExit)
        assert numbers == [1234]
        assert one.vcpu.regs.rax == rax

    @pytest.mark.parametrize("answer", [1 << 64, -(1 << 63) - 1])
    def test_an_int_that_does_not_fit_is_an_error(self, rig: MakeRig, answer: int):
        one = trapping(rig, Code().raw(SYSCALL))
        one.vcpu.on_syscall = lambda _: answer
        with pytest.raises(OverflowError):
            run(one)

    def test_the_handler_sees_the_program_and_its_arguments(self, rig: MakeRig):
        code = Code()
        for n, name in enumerate(("rdi", "rsi", "rdx", "r10", "r8", "r9"), 1):
            code.mov(name, n << 40)
        one = trapping(rig, code.mov("rax", 60).raw("fd").raw(SYSCALL))  # std
        one.vcpu.on_syscall = lambda number: f"syscall {number}"
        assert run(one) == "syscall 60"
        regs, sregs = one.vcpu.regs, one.vcpu.get_sregs()
        assert [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] == [
            n << 40 for n in range(1, 7)
        ]
        assert regs.rip == CODE + code.here
        assert regs.rcx == regs.rip
        assert regs.rsp == STACK_TOP
        assert regs.rflags & (DF | TF | 2) == DF | 2
        assert (sregs.cs.selector, sregs.ss.selector) == (0x33, 0x2B)
        assert (sregs.cs.dpl, sregs.ss.dpl, sregs.cs.l) == (3, 3, 1)

    def test_many_with_registers_changed(self, rig: MakeRig, scaled: Callable[[int], int]):
        n = scaled(2000)
        code = Code().mov("rbx", n)
        loop = code.here
        code.raw(SYSCALL).dec("rbx").jump_back_unless_zero(loop).out32(0xB0)
        one = trapping(rig, code)
        calls = [0]

        def on_syscall(number: int) -> int:
            assert number == calls[0]
            calls[0] += 1
            return calls[0]

        one.vcpu.regs.rax = 0
        one.vcpu.on_syscall = on_syscall
        assert isinstance(run(one), IoExit)
        assert calls == [n]

    def test_a_handler_may_send_the_program_elsewhere(self, rig: MakeRig):
        one = trapping(rig, Code().raw(SYSCALL).spin())
        elsewhere = CODE + 0x100
        one.memory[elsewhere : elsewhere + 2] = Code().out32(0xB0).bytes

        def on_syscall(_number: int) -> int:
            one.vcpu.regs.rip = elsewhere
            one.vcpu.regs.rsp = 0x1234
            return 5

        one.vcpu.on_syscall = on_syscall
        assert isinstance(run(one), IoExit)
        assert (one.vcpu.regs.rax, one.vcpu.regs.rsp) == (5, 0x1234)

    def test_the_port_alone_is_no_syscall(self, rig: MakeRig):
        """It is open to ring 3, for the stub; anybody else writes to nobody."""
        one = trapping(
            rig, Code().out8(lib.KVMMM_PORT_SYSCALL, 1).in8(lib.KVMMM_PORT_SYSCALL).out32(0xB0)
        )
        one.vcpu.on_syscall = lambda _: pytest.fail("called")
        exit_ = run(one)
        assert isinstance(exit_, IoExit)
        assert one.vcpu.statistics()["ignored_ports"] == 2

    def test_flags_that_ring_3_may_not_have(self, rig: MakeRig):
        """Whoever jumps to the stub sets rcx and r11 as he likes."""
        code = Code().mov("rcx", 0xFFFF_8000_0000_0000 ^ (1 << 62)).mov("r11", (1 << 64) - 1)
        one = trapping(rig, code.mov("rbx", SYSCALL_STUB).jump("rbx"))
        told: list[tuple[int, int]] = []
        flags: list[int] = []

        def on_syscall(_number: int) -> None:
            flags.append(one.vcpu.regs.rflags)
            assert one.vcpu.regs.rip == 0xFFFF_8000_0000_0000  # canonical, as VMX wants it
            one.vcpu.regs.rflags = 2  # no single step

        one.vcpu.on_syscall = on_syscall
        one.vcpu.on_fault = lambda *args: told.append(args) or "faulted"
        assert run(one) == "faulted"
        assert flags == [0x24_4FD7]
        assert told == [(0xFFFF_8000_0000_0000, EXECUTE)]

    def test_without_a_handler_the_exit_is_the_answer(self, rig: MakeRig):
        one = trapping(rig, Code().raw(SYSCALL))
        exit_ = run(one)
        assert isinstance(exit_, IoExit)
        assert exit_.port == lib.KVMMM_PORT_SYSCALL


def test_traps_of_two_vcpus_at_once(rig: MakeRig, scaled: Callable[[int], int]):
    n = scaled(500)
    rigs = []
    for _ in range(2):
        code = Code().mov("rbx", n)
        loop = code.here
        code.raw(SYSCALL).raw(INT3).dec("rbx").jump_back_unless_zero(loop).out32(0xB0)
        rigs.append(trapping(rig, code))
    results: list[object] = []
    counts = [[0, 0], [0, 0]]

    def attach(one: Rig, count: list[int]) -> None:
        def on_syscall(_number: int) -> int:
            count[0] += 1
            return 0

        def on_trap(vector: int, _code: int) -> None:
            assert vector == 3
            count[1] += 1

        one.vcpu.on_syscall, one.vcpu.on_trap = on_syscall, on_trap

    for one, count in zip(rigs, counts, strict=True):
        attach(one, count)
    threads = [threading.Thread(target=lambda one=one: results.append(run(one))) for one in rigs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(result, IoExit) for result in results)
    assert counts == [[n, n], [n, n]]
    assert rigs[0].vcpu.statistics()["exits"] == {abi.KVM_EXIT_IO: 2 * n + 1}
