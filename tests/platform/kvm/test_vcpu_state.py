"""A vCPU's state, saved and loaded, and what must be completed first."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import IoctlError, VcpuError
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.vcpu_state import VcpuState, set_msrs
from kvmmm.safemem.ffi import IoExit, MmioExit, lib
from tests.platform.kvm.conftest import ABSENT, CODE, DATA, MEMORY, SECOND, STACK_TOP
from tests.platform.kvm.test_pause import COUNT, Runner
from tests.platform.kvm.test_trap import INT3, SYSCALL, SYSCALL_STUB, trapping
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(60)]

DEADLINE = -lib.KVMMM_STOP_DEADLINE


def clone(make: MakeRig, one: Rig, state: VcpuState) -> Rig:
    """Another VM with the same memory, its vCPU in that state."""
    other = make(b"")
    other.memory[:] = one.memory[:]
    other.vcpu.load_state(state)
    return other


# ymm0 += ymm1 and ymm2 *= 3, xmm way; rcx times. CF stays set, since dec leaves it alone.
_SSE_STEP = "66 0f d4 c1"  # paddq xmm0, xmm1
_AVX_STEP = "c5 fd d4 c1"  # vpaddq ymm0, ymm0, ymm1
_SSE_LOADS, _AVX_LOADS = "f3 0f 6f 03 f3 0f 6f 4b 20", "c5 fe 6f 03 c5 fe 6f 4b 20"
_SSE_STORE, _AVX_STORE = "f3 0f 7f 43 40", "c5 fe 7f 43 40"
_LOAD_FS_0 = "64 48 8b 04 25 00 00 00 00"


def vector_loop(n: int, *, avx: bool) -> bytes:
    """Add up DATA + 32 n times, store at DATA + 64; then rax = fs:0, flags to DATA + 96."""
    code = Code().mov("rbx", DATA).mov("rcx", n).raw(_AVX_LOADS if avx else _SSE_LOADS).raw("f9")
    loop = code.here
    code.raw(_AVX_STEP if avx else _SSE_STEP).dec("rcx").jump_back_unless_zero(loop)
    code.raw("9c 8f 43 60")  # pushf; pop [rbx + 96]
    return code.raw(_AVX_STORE if avx else _SSE_STORE).raw(_LOAD_FS_0).out32(0xB0).bytes


class TestSaveAndLoad:
    def test_mid_loop_into_another_vm(self, rig: MakeRig, is_slow_machine: bool):
        n = 3_000_000 if is_slow_machine else 60_000_000
        one = rig(b"")
        avx = one.vcpu.trial.has_avx
        code = vector_loop(n, avx=avx)
        one.memory[CODE : CODE + len(code)] = code
        words = [3, 1 << 40, 5, 7, 1, 2, 1 << 33, 4]
        for at, word in enumerate(words):
            one.memory[DATA + 8 * at : DATA + 8 * at + 8] = word.to_bytes(8, "little")
        one.start(CODE, 3)
        sregs = one.vcpu.get_sregs()
        sregs.fs.base = DATA + 8
        one.vcpu.set_sregs(sregs)
        assert one.once(0.01) == DEADLINE
        assert CODE < one.vcpu.regs.rip < CODE + len(code)
        assert 0 < one.vcpu.regs.rcx < n
        state = one.vcpu.save_state()
        other = clone(rig, one, state)
        assert other.vcpu.regs.rcx == one.vcpu.regs.rcx
        assert other.vcpu.get_sregs().fs.base == DATA + 8
        assert state.differences(other.vcpu.save_state()) == []
        for each in (other, one):  # saving did no harm either
            assert isinstance(each.once(30), IoExit)
            got = [
                each.memory[DATA + 64 + 8 * i : DATA + 72 + 8 * i] for i in range(4 if avx else 2)
            ]
            assert [int.from_bytes(word, "little") for word in got] == [
                (a + n * b) % (1 << 64) for a, b in zip(words, words[4:], strict=False)
            ][: len(got)]
            assert each.vcpu.regs.rax == 1 << 40
            assert each.memory[DATA + 96] & 1  # CF

    def test_rewinding_one_vcpu(self, rig: MakeRig, scaled: Callable[[int], int]):
        code = Code().mov("rbx", DATA).inc_at("rbx").load("rax", "rbx").out32(0xB0).jump_back(10)
        one = rig(code.bytes, 3)
        one.once()
        state = one.vcpu.save_state()
        for n in range(scaled(50)):
            one.vcpu.load_state(state)
            assert one.vcpu.regs.rip == CODE + 20
            exit_ = one.once()
            assert isinstance(exit_, IoExit)
            assert exit_.value == n + 2

    def test_a_vcpu_that_never_ran(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).bytes, 3)
        one.vcpu.regs.rax = 99
        other = clone(rig, one, one.vcpu.save_state())
        exit_ = other.once()
        assert isinstance(exit_, IoExit)
        assert exit_.value == 99

    def test_msrs_come_along(self, rig: MakeRig):
        one = trapping(rig, Code().raw(SYSCALL).out32(0xB0))
        state = one.vcpu.save_state()
        assert dict(state.msrs)[abi.MSR_LSTAR] == SYSCALL_STUB
        assert dict(state.msrs)[abi.MSR_STAR] == 0x10 << 32 | 0x23 << 48
        other = clone(rig, one, state)
        other.vcpu.set_port(lib.KVMMM_PORT_SYSCALL, lib.KVMMM_PORT_KIND_SYSCALL, None)
        other.vcpu.on_syscall = lambda _: 42
        assert isinstance(other.vcpu.run(10 * SECOND), IoExit)
        assert other.vcpu.regs.rax == 42

    @pytest.mark.parametrize("code", [SYSCALL, INT3], ids=["syscall", "trap"])
    def test_in_a_handler(self, rig: MakeRig, code: str):
        """As fork does: the child returns from the same system call."""
        one = trapping(rig, Code().mov("rbx", DATA).raw(code).inc_at("rbx").out32(0xB0))
        states: list[VcpuState] = []

        def handler(*_: int) -> None:
            states.append(one.vcpu.save_state())
            one.vcpu.regs.rax = 1

        one.vcpu.on_syscall = one.vcpu.on_trap = handler
        exit_ = one.vcpu.run(10 * SECOND)
        assert isinstance(exit_, IoExit)
        assert exit_.value == 1
        assert len(states) == 1
        other = clone(rig, one, states[0])
        other.memory[DATA : DATA + 8] = bytes(8)
        other.vcpu.regs.rax = 0
        exit_ = other.once()
        assert isinstance(exit_, IoExit)
        assert exit_.value == 0
        assert other.memory[DATA] == 1  # once, in the child
        assert other.vcpu.get_sregs().cs.selector == 0x33

    def test_within_ones_own_pause(self, rig: MakeRig):
        one = rig(COUNT, 3)
        assert one.once(0.01) == DEADLINE
        with one.vm.paused():
            state = one.vcpu.save_state()
            other = clone(rig, one, state)
        assert other.once(0.01) == DEADLINE
        assert other.memory[DATA : DATA + 8] != one.memory[DATA : DATA + 8]

    def test_a_root_that_waits_is_part_of_it(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).bytes, 3)
        one.memory[0x8000:0x9000] = one.memory[one.layout.root_gpa : one.layout.root_gpa + 4096]
        one.vcpu.set_root(0x8000)
        other = clone(rig, one, one.vcpu.save_state())
        assert other.vcpu.get_sregs().cr3 == 0x8000
        assert isinstance(other.once(), IoExit)

    def test_a_vcpu_that_runs_elsewhere_is_refused(self, rig: MakeRig):
        one = rig(COUNT, 3)
        state = one.vcpu.save_state()
        runner = Runner(one.vcpu)
        runner.wait_until_in_guest()
        for call in (
            one.vcpu.save_state,
            lambda: one.vcpu.load_state(state),
            one.vcpu.get_sregs,
            lambda: one.vcpu.set_trap_area(0, 0),
            lambda: one.vcpu.load_boot_state(one.layout),
        ):
            with pytest.raises(RuntimeError, match="running"):
                call()
        runner.stop()

    def test_kvms_refusal_names_the_ioctl(self, rig: MakeRig):
        one = rig(b"")
        state = one.vcpu.save_state()
        state.xcrs = state.xcrs[:8] + bytes(4) + bytes(4) + bytes(8) + state.xcrs[24:]  # XCR0 = 0
        with pytest.raises(IoctlError, match="KVM_SET_XCRS"):
            one.vcpu.load_state(state)
        with pytest.raises(IoctlError, match="KVM_SET_MSRS"):
            set_msrs(one.vcpu, [(0x12345678, 1)])


class TestCompletePending:
    def test_nothing_is_pending(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).bytes)
        assert one.vcpu.complete_pending() is None
        one.once()
        assert one.vcpu.complete_pending() is None
        assert one.vcpu.complete_pending() is None
        assert one.vcpu.regs.rip == CODE + 2
        assert one.vcpu.thread_id == 0

    @pytest.mark.parametrize("ring", [0, 3])
    def test_an_in(self, rig: MakeRig, ring: int):
        one = rig(Code().mov("rax", 0).in8(0xB0).out32(0xB1).bytes, ring)
        exit_ = one.once()
        assert isinstance(exit_, IoExit)
        exit_.value = 0x55
        assert one.vcpu.complete_pending() is None
        assert one.vcpu.regs.rax == 0x55
        assert one.vcpu.regs.rip == CODE + 12
        with pytest.raises(ValueError, match="over"):
            _ = exit_.data

    def test_a_second_fragment_is_handed_out(self, rig: MakeRig):
        """A load across a page is two accesses, the second one made by the completion."""
        one = rig(Code().mov("rbx", ABSENT + 0xFFC).load("rax", "rbx").out32(0xB1).bytes, 3)
        seen = []
        exit_ = one.once()
        while isinstance(exit_, MmioExit):
            seen.append((exit_.gpa, exit_.size_bytes))
            exit_.value = 0x11223344 * len(seen)
            exit_ = one.vcpu.complete_pending()
        assert exit_ is None
        assert seen == [(ABSENT + 0xFFC, 4), (ABSENT + 0x1000, 4)]
        assert one.vcpu.regs.rax == 0x22446688_11223344
        exit_ = one.once()
        assert isinstance(exit_, IoExit)

    def test_a_second_fragment_is_served_by_the_handler(self, rig: MakeRig):
        one = rig(Code().mov("rbx", ABSENT + 0xFFC).load("rax", "rbx").out32(0xB1).bytes, 3)
        exit_ = one.once()
        assert isinstance(exit_, MmioExit)
        exit_.value = 1
        one.vcpu.on_mmio = lambda second: setattr(second, "value", 2)
        state = one.vcpu.save_state()
        assert one.vcpu.regs.rax == 2 << 32 | 1
        other = clone(rig, one, state)
        assert isinstance(other.once(), IoExit)
        assert other.vcpu.regs.rax == 2 << 32 | 1

    def test_what_nobody_serves_is_an_error_of_save(self, rig: MakeRig):
        one = rig(Code().mov("rbx", ABSENT + 0xFFC).load("rax", "rbx").out32(0xB1).bytes, 3)
        one.once()
        with pytest.raises(VcpuError, match=r"MmioExit\(read of 4 byte\(s\).* nobody serves it"):
            one.vcpu.save_state()

    @pytest.mark.parametrize("kind", ["mmio", "in"])
    def test_not_in_the_handler_that_has_not_answered(self, rig: MakeRig, kind: str):
        code = Code().mov("rbx", ABSENT)
        one = rig((code.load("rax", "rbx") if kind == "mmio" else code.in8(0xB0)).out32(0xB1).bytes)
        found: list[str] = []

        def handler(_exit: object) -> None:
            with pytest.raises(RuntimeError, match="not answered yet") as caught:
                one.vcpu.complete_pending()
            found.append(str(caught.value))

        one.vcpu.on_mmio = handler
        one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, handler)
        assert isinstance(one.vcpu.run(10 * SECOND), IoExit)
        assert len(found) == 1

    def test_a_stop_request_is_not_lost_to_it(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).spin().bytes)
        one.once()
        one.vcpu.stop()
        assert one.vcpu.complete_pending() is None
        assert one.once() == -lib.KVMMM_STOP_REQUEST

    def test_it_waits_for_the_pause_of_another_thread(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).spin().bytes)
        one.once()
        held, over = threading.Event(), threading.Event()

        def pause() -> None:
            with one.vm.paused():
                held.set()
                over.wait(20)

        thread = threading.Thread(target=pause)
        thread.start()
        assert held.wait(20)
        timer = threading.Timer(0.05, over.set)
        timer.start()
        assert one.vcpu.complete_pending() is None
        assert over.is_set()
        thread.join()
        timer.join()


def test_memory_is_not_part_of_a_state(rig: MakeRig):
    one = rig(COUNT, 3)
    state = one.vcpu.save_state()
    assert sum(len(getattr(state, name)) for name in VcpuState.__slots__ if name != "msrs") < MEMORY
    assert one.vcpu.regs.rsp == STACK_TOP
