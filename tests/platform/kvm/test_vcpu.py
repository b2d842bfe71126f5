"""One vCPU: registers, ends from inside and outside, and what is left after its end."""

from __future__ import annotations

import gc
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import StateError
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import IoExit, lib
from tests.conftest import Footprint
from tests.platform.kvm.conftest import ABSENT, CODE, DATA, SECOND, STACK_TOP
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60)]

STOPPED, DEADLINE = -lib.KVMMM_STOP_REQUEST, -lib.KVMMM_STOP_DEADLINE
GENERAL = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"] + [f"r{n}" for n in range(8, 16)]


class TestRegisters:
    def test_what_is_written_is_what_the_guest_has(self, rig: MakeRig):
        # out; then each register into memory, in order.
        code = Code().out32(0xB0)
        for name in GENERAL:
            code.raw(_push(name))
        one = rig(code.out32(0xB1).bytes)
        assert isinstance(one.once(), IoExit)
        values = {
            name: 0x1111_2222_3333_4444 * (n + 1) % (1 << 64) for n, name in enumerate(GENERAL)
        }
        for name, value in values.items():
            setattr(one.vcpu.regs, name, value)
        exit_ = one.once()
        assert isinstance(exit_, IoExit)
        assert exit_.port == 0xB1
        for n, name in enumerate(GENERAL, 1):
            pushed = one.memory[STACK_TOP - 8 * n : STACK_TOP - 8 * n + 8]
            assert int.from_bytes(pushed, "little") == values[name], name
            assert getattr(one.vcpu.regs, name) == values[name]
        assert one.vcpu.regs.rsp == STACK_TOP - 8 * len(GENERAL)

    def test_what_the_guest_writes_is_what_is_read(self, rig: MakeRig):
        one = rig(Code().mov("rbx", 1 << 63).mov("r15", 77).out32(0xB0).bytes)
        one.once()
        assert one.vcpu.regs.rbx == 1 << 63
        assert one.vcpu.regs.r15 == 77
        assert one.vcpu.regs.rflags & 2

    def test_only_numbers_of_64_bits(self, rig: MakeRig):
        regs = rig(b"").vcpu.regs
        for value, error in ((1 << 64, OverflowError), (-1, OverflowError), ("7", TypeError)):
            with pytest.raises(error):
                regs.rax = value
        with pytest.raises(TypeError, match="cannot be deleted"):
            del regs.rax

    def test_a_new_place_to_go_on(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).spin().bytes)
        elsewhere = CODE + 0x100
        one.memory[elsewhere : elsewhere + 2] = Code().out32(0xB1).bytes
        one.once()
        one.vcpu.regs.rip = elsewhere
        assert one.once().port == 0xB1


def _push(name: str) -> bytes:
    number = (
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"].index(name)
        if name[1:].isalpha()
        else int(name[1:])
    )
    return bytes([0x41, 0x50 | number - 8] if number > 7 else [0x50 | number])


SPINS = {
    "ring 0": (Code().spin(), 0),
    "ring 3": (Code().spin(), 3),
    "ring 0, exits": (Code().out8(0x99, 1).jump_back(0), 0),
    "ring 3, string": (Code().mov("rsi", DATA).mov("rcx", 1 << 12).raw("f3 ac").jump_back(0), 3),
}


@pytest.mark.parametrize("name", SPINS)
class TestEnds:
    def test_deadline(self, rig: MakeRig, name: str):
        code, ring = SPINS[name]
        one = rig(code.bytes, ring)
        for _ in range(3):  # and it can go on
            assert one.once(0.02) == DEADLINE
        assert one.vcpu.thread_id == 0
        assert not one.vcpu.in_guest

    def test_stop_from_another_thread(self, rig: MakeRig, name: str):
        code, ring = SPINS[name]
        one = rig(code.bytes, ring)
        for _ in range(3):
            timer = threading.Timer(0.02, one.vcpu.stop)
            timer.start()
            assert one.once(30) == STOPPED
            timer.join()

    def test_stop_before_a_run_ends_the_next_one_only(self, rig: MakeRig, name: str):
        code, ring = SPINS[name]
        one = rig(code.bytes, ring)
        rip = one.vcpu.regs.rip
        one.vcpu.stop()
        one.vcpu.stop()  # twice is once
        assert one.once(30) == STOPPED
        assert one.vcpu.regs.rip == rip  # not one instruction
        assert one.once(0.02) == DEADLINE


def test_stop_during_a_handler_ends_the_run_after_it(rig: MakeRig):
    one = rig(Code().out32(0xB0).jump_back(0).bytes)
    calls = []

    def handler(_exit: IoExit) -> None:
        calls.append(1)
        if len(calls) == 3:
            one.vcpu.stop()

    one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, handler)
    assert one.vcpu.run(30 * SECOND) == STOPPED
    assert len(calls) == 3


def test_run_calls_handlers_until_one_answers(rig: MakeRig):
    one = rig(Code().mov("rax", 0).add("rax", 1).out32(0xB0).jump_back(10).bytes)
    seen: list[int] = []
    one.vcpu.set_port(
        0xB0,
        lib.KVMMM_PORT_KIND_VALUE,
        lambda _port, value: seen.append(value) or ("done" if value == 100 else None),
    )
    assert one.vcpu.run(30 * SECOND) == "done"
    assert seen == list(range(1, 101))


def test_an_exception_of_a_handler_comes_out_of_run(rig: MakeRig):
    one = rig(Code().out32(0xB0).jump_back(0).bytes)

    def handler(_exit: IoExit) -> None:
        raise LookupError("mine")

    one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, handler)
    with pytest.raises(LookupError, match="mine"):
        one.vcpu.run(30 * SECOND)
    assert one.vcpu.handler_failed
    assert one.vcpu.thread_id == 0
    assert isinstance(one.once(), IoExit)


def test_running_twice_at_a_time_is_refused(rig: MakeRig):
    one = rig(Code().out32(0xB0).spin().bytes)
    found: list[BaseException] = []

    def handler(_exit: IoExit) -> object:
        for call in (lambda: one.vcpu.run(SECOND), lambda: one.vcpu.once(SECOND), one.vcpu.close):
            with pytest.raises(RuntimeError, match="is running") as caught:
                call()
            found.append(caught.value)
        return "ended"

    one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, handler)
    assert one.vcpu.run(30 * SECOND) == "ended"
    assert len(found) == 3


def test_no_more_than_32_ports(rig: MakeRig):
    vcpu = rig(b"").vcpu
    for port in range(30):
        vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)
    vcpu.set_port(29, lib.KVMMM_PORT_KIND_VALUE, None)  # a port that is known takes no place
    with pytest.raises(ValueError, match="no more than 32 ports"):
        vcpu.set_port(99, lib.KVMMM_PORT_KIND_EXIT, None)


@pytest.mark.parametrize("port", [-1, 0x10000])
def test_a_port_has_16_bits(rig: MakeRig, port: int):
    with pytest.raises((ValueError, OverflowError)):
        rig(b"").vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)


def test_after_close_every_call_says_so(rig: MakeRig):
    vcpu = rig(Code().out32(0xB0).bytes).vcpu
    vcpu.close()
    vcpu.close()
    calls: list[Callable[[], object]] = [
        lambda: vcpu.run(1),
        lambda: vcpu.once(1),
        lambda: vcpu.fd,
        lambda: vcpu.run_hva,
        lambda: vcpu.regs.rax,
        lambda: vcpu.timed,
        lambda: vcpu.set_port(1, 1, None),
        lambda: vcpu.set_console(0, 0, 0),
        lambda: vcpu.set_coalesced(1),
        vcpu.stop,
        vcpu.statistics,
        vcpu.console_take,
        vcpu.get_sregs,
        vcpu.get_xsave,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()
    assert vcpu.thread_id == 0
    assert vcpu.in_guest is False


def test_a_vm_that_nobody_closes_is_closed_by_the_collector(rig: MakeRig):
    one = rig(Code().out32(0xB0).bytes)
    arena_hva = one.arena.hva
    before = Footprint()
    vm = Vm()
    vm.memslots.add(0, 1 << 20, arena_hva)
    vcpu = vm.create_vcpu()
    # Cycles through C: the vCPU's handlers hold the VM that holds the vCPU, and itself.
    vcpu.on_mmio = partial(print, vm)
    vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, partial(print, vcpu))
    assert len(Footprint().fds) == len(before.fds) + 2
    del vm, vcpu
    gc.collect()
    after = Footprint()
    assert after.fds == before.fds
    assert after.mappings == before.mappings
    assert isinstance(one.once(), IoExit)  # the other VM is as it was


def test_a_vm_must_not_be_closed_while_it_runs(rig: MakeRig):
    one = rig(Code().out32(0xB0).spin().bytes)
    runner = threading.Thread(target=lambda: one.vcpu.run(30 * SECOND))
    one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_VALUE, lambda _port, _value: None)
    runner.start()
    try:
        while not one.vcpu.in_guest:
            time.sleep(0.001)
        with pytest.raises(StateError, match="running"):
            one.vm.close()
        assert one.vm.fd >= 0
    finally:
        one.vcpu.stop()
        runner.join()


def test_time_is_measured_when_asked_for(rig: MakeRig):
    one = rig(Code().out32(0xB0).jump_back(0).bytes)
    one.once()
    assert one.vcpu.statistics()["guest_ns"] == 0
    one.vcpu.timed = True
    assert one.vcpu.timed is True
    one.vcpu.set_port(
        0xB0, lib.KVMMM_PORT_KIND_VALUE, lambda _p, _v: time.sleep(0.002) or _count(one)
    )
    one.vcpu.run(30 * SECOND)
    facts = one.vcpu.statistics()
    assert facts["guest_ns"] > 0
    assert facts["handler_ns"] >= 9 * 2_000_000
    assert facts["exits"] == {abi.KVM_EXIT_IO: 11}


def _count(one: Rig) -> object:
    return "ten" if one.vcpu.statistics()["exits"][abi.KVM_EXIT_IO] > 10 else None


def test_translate(rig: MakeRig):
    vcpu = rig(b"").vcpu
    vcpu.stop()
    assert vcpu.once(SECOND) == STOPPED  # a run loads the registers: now KVM knows CR3
    assert vcpu.translate(CODE + 5) == CODE + 5
    assert vcpu.translate(ABSENT + 0x1FF_FFF) == ABSENT + 0x1FF_FFF
    assert vcpu.translate(ABSENT - 1) is None
