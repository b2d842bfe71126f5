"""Scenarios of gVisor's kvm_test.go that have a counterpart here, named after them.

There, the application is host code that runs in ring 3 of a VM under page tables of its own, and
`SwitchToUser` returns at its system calls and faults. Here it is machine code under
PageTableAddressSpace, and `Vcpu.run` calls handlers. "Full restore" there means that all registers
are loaded on the way in: here, that the host has written them.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.safemem.ffi import ffi, lib
from tests.platform.kvm.conftest import Rig
from tests.platform.kvm.user_rig import CODE, DATA, PAGE, RESULT, SECOND, UserRig, ar, step_loop
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(100)]

SYSCALL, INT3 = "0f 05", "cc"
GENERAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
MASK = (1 << 64) - 1
NOWHERE = 0x1234_5000
"""In no table; where a jump in `test_registers_fault` leads."""


@pytest.fixture
def rig() -> Iterator[UserRig]:
    with UserRig() as rig:
        yield rig


def load(rig: UserRig, code: Code, **registers: int) -> Any:
    """A vCPU whose system calls, faults and exceptions end a run, and say so."""
    vcpu = rig.load(code.bytes, **registers)
    vcpu.on_syscall = lambda number: f"syscall {number}"
    vcpu.on_trap = lambda vector, _error_code: f"vector {vector}"
    return vcpu


def run(vcpu: Any) -> object:
    return vcpu.run(10 * SECOND)


def restore_all(vcpu: Any) -> None:
    """Write every register, with the value that it has."""
    for name in (*GENERAL, "rip", "rflags"):
        setattr(vcpu.regs, name, getattr(vcpu.regs, name))
    sregs = vcpu.get_sregs()
    regs = vcpu.regs
    vcpu.return_to_frame(
        sregs, rip=regs.rip, cs=sregs.cs.selector, rflags=regs.rflags, rsp=regs.rsp,
        ss=sregs.ss.selector,
    )  # fmt: skip


RESTORES = pytest.mark.parametrize("restores_all", [True, False], ids=["full", "partial"])


@RESTORES
def test_application_syscall(rig: UserRig, restores_all: bool):
    code = Code().mov("rax", 39)
    loop = code.here
    vcpu = load(rig, code.raw(SYSCALL).jump_back(loop))
    for _ in range(20):
        assert run(vcpu) == "syscall 39"
        if restores_all:
            restore_all(vcpu)


@RESTORES
def test_application_fault(rig: UserRig, restores_all: bool):
    vcpu = load(rig, Code().mov("rbx", 0).load("rax", "rbx"))
    for n in range(1, 11):
        assert run(vcpu) == "fault"
        assert rig.faults == [(0, READ)] * n
        if restores_all:
            restore_all(vcpu)


def invert_all() -> Code:
    code = Code()
    for number in range(16):
        code.raw(bytes([0x48 | number >> 3, 0xF7, 0xD0 | number & 7]))  # not
    return code


def fill_all(vcpu: Any, **some: int) -> dict[str, int]:
    """Different values in all registers; returns what they are inverted."""
    rng = random.Random(3)
    inverted = {}
    for name in GENERAL:
        value = some.get(name, rng.getrandbits(64))
        setattr(vcpu.regs, name, value)
        inverted[name] = ~value & MASK
    return inverted


def test_registers_syscall(rig: UserRig):
    vcpu = load(rig, invert_all().raw(SYSCALL))
    wanted = fill_all(vcpu)
    assert run(vcpu) == f"syscall {wanted['rax']}"
    # SYSCALL puts the return address into rcx, the flags into r11.
    wanted["rcx"] = vcpu.regs.rip
    wanted["r11"] = vcpu.regs.rflags
    assert {name: getattr(vcpu.regs, name) for name in GENERAL} == wanted
    assert vcpu.regs.rip == CODE + 16 * 3 + 2


@pytest.mark.parametrize("way", ["fault", "exception"])
def test_registers_fault(rig: UserRig, way: str):
    code = invert_all()
    vcpu = load(rig, code.jump("rax") if way == "fault" else code.raw("0f 0b"))
    wanted = fill_all(vcpu, rax=~NOWHERE & MASK)
    if way == "fault":
        assert run(vcpu) == "fault"
        assert rig.faults == [(NOWHERE, EXECUTE)]
        assert vcpu.regs.rip == NOWHERE
    else:
        assert run(vcpu) == "vector 6"
        assert vcpu.regs.rip == CODE + 16 * 3
    assert {name: getattr(vcpu.regs, name) for name in GENERAL} == wanted


def set_bases(vcpu: Any, fs: int, gs: int) -> None:
    vcpu.fetch_sregs()
    sregs = lib.kvmmm_sync_sregs(ffi.cast("struct kvm_run *", vcpu.run_hva))
    sregs.fs.base, sregs.gs.base = fs, gs
    vcpu.sregs_written(False)


def bases(vcpu: Any) -> tuple[int, int]:
    sregs = vcpu.get_sregs()
    return int(sregs.fs.base), int(sregs.gs.base)


READ_BOTH = "64 48 8b 04 25 00 00 00 00 65 48 8b 1c 25 00 00 00 00"  # rax = fs:[0], rbx = gs:[0]


def test_segments(rig: UserRig):
    fr = rig.frames(0)
    struct.pack_into("<2Q", rig.arena.view, fr.start, 0x1111, 0x2222)
    rig.space.map_file(DATA, rig.arena, fr, READ)
    code = Code().raw(READ_BOTH).raw(SYSCALL)
    # rdfsbase r8; rdgsbase r9; wrfsbase r9; wrgsbase r8
    code.raw("f3 49 0f ae c0 f3 49 0f ae c9 f3 49 0f ae d1 f3 49 0f ae d8")
    code.raw(READ_BOTH).raw(SYSCALL).mov("rsi", DATA + PAGE).load("rcx", "rsi")
    code.raw(READ_BOTH).raw(SYSCALL)
    vcpu = load(rig, code)
    set_bases(vcpu, DATA, DATA + 8)
    run(vcpu)
    assert (vcpu.regs.rax, vcpu.regs.rbx) == (0x1111, 0x2222)
    assert bases(vcpu) == (DATA, DATA + 8)
    if not vcpu.trial.has_fsgsbase:
        pytest.skip("a program cannot set its bases here: no FSGSBASE")
    run(vcpu)
    assert (vcpu.regs.rax, vcpu.regs.rbx) == (0x2222, 0x1111)
    assert bases(vcpu) == (DATA + 8, DATA)
    # Through a fault as well, and the host's look at them.
    assert run(vcpu) == "fault"
    rig.space.map_file(DATA + PAGE, rig.arena, fr, READ)
    vcpu.regs.rax = vcpu.regs.rbx = 0
    run(vcpu)
    assert (vcpu.regs.rax, vcpu.regs.rbx, vcpu.regs.rcx & 0xFFF) == (
        0x2222, 0x1111, len(code.bytes),
    )  # fmt: skip
    assert bases(vcpu) == (DATA + 8, DATA)


@RESTORES
def test_bounce(rig: UserRig, restores_all: bool):
    vcpu = load(rig, Code().spin())
    for _ in range(3):
        timer = threading.Timer(0.001, vcpu.stop)
        timer.start()
        assert run(vcpu) == -lib.KVMMM_STOP_REQUEST
        timer.join()
        assert vcpu.regs.rip == CODE
        if restores_all:
            restore_all(vcpu)


def test_bounce_stress(rig: UserRig, scaled: Callable[[int], int]):
    """Stops at random moments around the way into the guest: each ends one run, none is lost."""
    vcpu = load(rig, Code().spin())
    rng = random.Random(5)
    n_rounds = scaled(500)
    naps = [[rng.randrange(1000) / 1e6 for _ in range(3)] for _ in range(n_rounds)]
    rounds = threading.Semaphore(0)

    def nap(seconds: float) -> None:
        if seconds > 100e-6:
            time.sleep(seconds)

    def bounce() -> None:
        for first, _, _ in naps:
            rounds.acquire()
            nap(first)
            vcpu.stop()

    thread = threading.Thread(target=bounce, daemon=True)
    thread.start()
    for n, (_, second, third) in enumerate(naps):
        rounds.release()
        nap(second)
        assert run(vcpu) == -lib.KVMMM_STOP_REQUEST, n
        nap(third)
    thread.join(10)
    assert not thread.is_alive()
    assert vcpu.run(SECOND // 100) == -lib.KVMMM_STOP_DEADLINE


# What an interrupt forwarder's notifications are there, stops are here.


def check_stops_before_a_run(rig: UserRig, n_stops: int) -> None:
    vcpu = load(rig, Code().spin())
    for _ in range(n_stops):
        vcpu.stop()
    assert run(vcpu) == -lib.KVMMM_STOP_REQUEST
    assert vcpu.run(SECOND // 100) == -lib.KVMMM_STOP_DEADLINE


def check_stops_in_a_run(rig: UserRig, n_stops: int) -> None:
    code = Code()
    loop = code.here
    vcpu = load(rig, code.raw(SYSCALL).jump_back(loop))
    vcpu.on_syscall = lambda _number: [vcpu.stop() for _ in range(n_stops)] and None
    assert run(vcpu) == -lib.KVMMM_STOP_REQUEST
    vcpu.on_syscall = lambda number: f"syscall {number}"
    assert run(vcpu) == "syscall 0"


def test_single_interrupt_before_enable(rig: UserRig):
    check_stops_before_a_run(rig, 1)


def test_multiple_interrupts_before_enable(rig: UserRig):
    check_stops_before_a_run(rig, 2)


def test_single_interrupt_after_enable(rig: UserRig):
    check_stops_in_a_run(rig, 1)


def test_multiple_interrupts_after_enable(rig: UserRig):
    """They end one run, not two: nobody counts stops."""
    check_stops_in_a_run(rig, 2)


def test_invalidate(rig: UserRig):
    rig.space.map_file(DATA, rig.arena, rig.frames(7), READ)
    vcpu = load(rig, Code().raw(step_loop()), rsi=DATA)
    vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, lambda _exit: "step")
    for _ in range(2):
        assert run(vcpu) == "step"
    assert vcpu.regs.rbx == 7
    rig.space.unmap([ar(DATA)])
    assert run(vcpu) == "fault"
    assert rig.faults == [(DATA, READ)]


@RESTORES
def test_empty_address_space(rig: UserRig, restores_all: bool):
    vcpu = load(rig, Code().spin())
    empty = PageTableAddressSpace(rig.physical, rig.half.fixed)
    rig.spaces.append(empty)
    empty.activate(vcpu)
    for n in range(1, 4):
        if restores_all:
            restore_all(vcpu)
        assert run(vcpu) == "fault"
        assert rig.faults == [(CODE, EXECUTE)] * n
    rig.space.activate(vcpu)
    assert vcpu.run(SECOND // 100) == -lib.KVMMM_STOP_DEADLINE


def test_wrong_vcpu():
    """Two VMs by turns on one thread."""
    code = Code()
    loop = code.here
    code.raw("48 ff c3").out32(0xB0).jump_back(loop)  # inc rbx
    with UserRig() as one, UserRig() as other:
        vcpus = [load(one, code, rbx=0), load(other, code, rbx=1 << 32)]
        for _ in range(100):
            for vcpu in vcpus:
                vcpu.once(10 * SECOND)
        assert [vcpu.regs.rbx for vcpu in vcpus] == [100, 100 + (1 << 32)]
        assert all(vcpu.statistics()["exits"][abi.KVM_EXIT_IO] >= 90 for vcpu in vcpus)


def test_rdtsc(rig: UserRig):
    """It grows, and no faster than the host's clock says that it could have."""
    code = Code()
    loop = code.here
    # rdtsc; shl rdx, 32; or rax, rdx
    vcpu = load(rig, code.raw("0f 31 48 c1 e2 20 48 09 d0").out32(0xB0).jump_back(loop))
    hz = vcpu.trial.tsc_hz
    if not hz:
        pytest.skip("KVM does not say how fast the guest's TSC is")
    last, last_ns = 0, 0
    for _ in range(100):
        began_ns = time.monotonic_ns()
        vcpu.once(10 * SECOND)
        ended_ns = time.monotonic_ns()
        now = vcpu.regs.rax
        if last:
            assert 0 < now - last <= (ended_ns - last_ns) * hz / SECOND * 1.01 + hz / 1000
        last, last_ns = now, began_ns


def test_get_cs(rig: UserRig):
    vcpu = load(rig, Code().mov("rbx", 0).raw("8c cb").raw(SYSCALL))  # mov ebx, cs
    run(vcpu)
    assert vcpu.regs.rbx == 0x33 == lib.KVMMM_USER_CS


VMX, SVM = 1 << 5, 1 << 2


@pytest.mark.parametrize("ring", [0, 3])
def test_kernel_cpuid(ring: int):
    """A guest is not offered virtualisation."""
    # mov eax, 1; cpuid; mov esi, ecx; mov eax, 0x80000001; cpuid
    code = Code().raw("b8 01 00 00 00 0f a2 89 ce b8 01 00 00 80 0f a2").out32(0xB0)
    with closing(Rig(code.bytes, ring)) as one:
        table = one.vm.device.cpuid
        offered = table._register(0x1, 5) & VMX, table._register(0x80000001, 5) & SVM
        assert offered == (0, 0)
        one.once()
        seen = one.vcpu.regs.rsi & VMX, one.vcpu.regs.rcx & SVM
    if any(seen):
        pytest.skip("this KVM shows guests its own CPUID, whatever it was given")


def test_mxcsr(rig: UserRig):
    """A program without any mask leaves the host's floating point as it was, and keeps its own."""
    fr = rig.frames(0)
    rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
    # ldmxcsr [rsi]; then the same value back: stmxcsr [rdi]
    code = Code().raw("0f ae 16").raw(SYSCALL).raw("0f ae 1f").raw(SYSCALL)
    vcpu = load(rig, code, rsi=DATA, rdi=RESULT)
    struct.pack_into("<I", rig.arena.view, rig.result.start, 0xDEAD)
    for _ in range(2):
        run(vcpu)
        # Inexact, by zero, invalid: each would end this process by a signal under MXCSR 0.
        assert str(float(1) / float(3)).startswith("0.333")
        assert struct.unpack("<f", struct.pack("<f", 0.1))[0] != 0.1
        assert str(float("inf") - float("inf")) == "nan"
    assert struct.unpack_from("<I", rig.arena.view, rig.result.start) == (0,)


def test_kernel_floating_point(rig: UserRig):
    """The guest's own: 3.5 * 2 + 0.25, in SSE and x87, over a system call in between."""
    fr = rig.frames(0)
    struct.pack_into("<3d", rig.arena.view, fr.start, 3.5, 2.0, 0.25)
    rig.space.map_file(DATA, rig.arena, fr, READ)
    code = Code().raw("f2 0f 10 06")  # movsd xmm0, [rsi]
    code.raw("dd 06 dc 4e 08").raw(SYSCALL)  # fld [rsi]; fmul [rsi + 8]
    code.raw("f2 0f 59 46 08 f2 0f 58 46 10 f2 0f 11 07")  # mulsd, addsd; movsd [rdi], xmm0
    code.raw("dc 46 10 dd 5f 08").raw(SYSCALL)  # fadd [rsi + 16]; fstp [rdi + 8]
    vcpu = load(rig, code, rsi=DATA, rdi=RESULT)
    for _ in range(2):
        assert str(run(vcpu)).startswith("syscall")
    assert struct.unpack_from("<2d", rig.arena.view, rig.result.start) == (7.25, 7.25)
