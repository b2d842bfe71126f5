"""One vCPU: registers, typed exits, ends from inside and outside, and what is left after its end."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import IoExit, MmioExit, lib
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
        for n, name in enumerate(GENERAL):
            code.store("rsp", name) if False else code.raw(_push(name))
        one = rig(code.out32(0xB1).bytes)
        assert isinstance(one.once(), IoExit)
        values = {name: 0x1111_2222_3333_4444 * (n + 1) % (1 << 64) for n, name in enumerate(GENERAL)}
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
    number = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"].index(name) if name[1:].isalpha() else int(name[1:])
    return bytes([0x41, 0x50 | number - 8] if number > 7 else [0x50 | number])


class TestExits:
    @pytest.mark.npt
    @pytest.mark.parametrize("ring", [0, 3])
    def test_out(self, rig: MakeRig, ring: int):
        exit_ = rig(Code().mov("rax", 0x1122_3344).out32(0xB0).bytes, ring).once()
        assert isinstance(exit_, IoExit)
        assert (exit_.port, exit_.size_bytes, exit_.count, exit_.is_write) == (0xB0, 4, 1, True)
        assert exit_.data == bytes.fromhex("44332211")
        assert exit_.value == 0x11223344
        assert repr(exit_) == "IoExit(out to port 0xb0, 4 byte(s) x 1)"
        with pytest.raises(AttributeError, match="only an IN"):
            exit_.value = 1

    def test_in(self, rig: MakeRig):
        one = rig(Code().mov("rax", 0).in8(0xB0).out32(0xB1).bytes)
        exit_ = one.once()
        assert isinstance(exit_, IoExit)
        assert not exit_.is_write
        assert repr(exit_).startswith("IoExit(in from port 0xb0")
        exit_.value = 0x1AB  # taken modulo the access
        assert exit_.value == 0xAB
        assert one.once().value == 0xAB

    def test_an_in_that_nobody_answers_reads_as_ones(self, rig: MakeRig):
        one = rig(Code().mov("rax", 5).out32(0xB1).in8(0xB0).out32(0xB1).bytes)
        assert one.once().value == 5
        assert one.once().port == 0xB0
        assert one.once().value == 0xFF

    @pytest.mark.npt
    @pytest.mark.parametrize("ring", [0, 3])
    def test_mmio_read_and_write(self, rig: MakeRig, ring: int):
        code = Code().mov("rbx", ABSENT + 0x10).load("rax", "rbx").mov("rcx", 0x0807060504030201)
        one = rig(code.store("rbx", "rcx").out32(0xB0).bytes, ring)
        read = one.once()
        assert isinstance(read, MmioExit)
        assert (read.gpa, read.size_bytes, read.is_write) == (ABSENT + 0x10, 8, False)
        read.value = 0xFEED
        write = one.once()
        assert isinstance(write, MmioExit)
        assert (write.gpa, write.size_bytes, write.is_write) == (ABSENT + 0x10, 8, True)
        assert write.data == bytes(range(1, 9))
        with pytest.raises(AttributeError):
            write.value = 1
        assert isinstance(one.once(), IoExit)
        assert one.vcpu.regs.rax == 0xFEED

    def test_rep_outs(self, rig: MakeRig):
        text = b"twelve bytes"
        code = Code().mov("rsi", DATA).mov("rcx", len(text)).mov("rdx", 0xB0).raw("f3 6e").out32(0xB1)
        one = rig(code.bytes)
        one.memory[DATA : DATA + len(text)] = text
        found = b""
        while (exit_ := one.once()).port == 0xB0:
            assert len(exit_.data) == exit_.size_bytes * exit_.count
            found += exit_.data
        assert found == text

    def test_hlt_is_cold(self, rig: MakeRig):
        assert rig(Code().raw("f4").bytes).once() == abi.KVM_EXIT_HLT

    def test_once_ignores_what_c_serves(self, rig: MakeRig):
        """Console ports and ports that nobody listens to are no exits to Python."""
        one = rig(Code().out8(0xE9, 65).out8(0x99, 1).in8(0x99).out32(0xB0).bytes)
        one.vcpu.set_port(0xE9, lib.KVMMM_PORT_KIND_CONSOLE, None)
        one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, None)
        exit_ = one.once()
        assert isinstance(exit_, IoExit)
        assert exit_.port == 0xB0
        assert one.vcpu.console_take() == b"A"
        assert one.vcpu.statistics()["ignored_ports"] == 2
        assert one.vcpu.regs.rax & 0xFF == 0xFF


@pytest.fixture(autouse=True)
def _ports_are_exits(monkeypatch: pytest.MonkeyPatch):
    """In this file every rig listens to ports 0xb0 and 0xb1."""
    create = Vm.create_vcpu

    def create_vcpu(vm: Vm):
        vcpu = create(vm)
        for port in (0xB0, 0xB1):
            vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)
        return vcpu

    monkeypatch.setattr(Vm, "create_vcpu", create_vcpu)


class TestExitObjects:
    def test_one_object_serves_all_while_nobody_keeps_it(self, rig: MakeRig):
        code = Code()
        one = rig(code.out32(0xB0).jump_back(0).bytes)
        first = id(one.once())
        assert [id(one.once()) for _ in range(5)] == [first] * 5

    def test_a_kept_exit_is_over_when_the_next_of_its_kind_comes(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).jump_back(0).bytes)
        kept = one.once()
        assert kept.data
        assert one.once() is not kept
        for name in ("data", "value"):
            with pytest.raises(ValueError, match="this exit is over"):
                getattr(kept, name)
        assert kept.port == 0xB0  # what it was stays

    def test_a_kept_exit_is_over_when_one_of_another_kind_comes(self, rig: MakeRig):
        """kvm_run's records overlap: the guest's MMIO data would be the I/O data's address."""
        code = Code().out32(0xB0).mov("rbx", ABSENT).mov("rcx", 0x7FFF_0000_0000_0000)
        one = rig(code.store("rbx", "rcx").out32(0xB0).bytes)
        kept = one.once()
        assert isinstance(kept, IoExit)
        mmio = one.once()
        assert isinstance(mmio, MmioExit)
        with pytest.raises(ValueError, match="this exit is over"):
            _ = kept.data
        assert isinstance(one.once(), IoExit)
        with pytest.raises(ValueError, match="this exit is over"):
            mmio.complete(one.arena.hva)

    def test_a_kept_exit_is_over_when_a_stop_comes(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).spin().bytes)
        kept = one.once()
        assert one.once(0.05) == DEADLINE
        with pytest.raises(ValueError, match="this exit is over"):
            _ = kept.value

    def test_a_kept_exit_outlives_its_vcpu(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).bytes)
        kept, regs = one.once(), one.vcpu.regs
        one.vm.close()
        for get in (lambda: kept.data, lambda: kept.value, lambda: regs.rax):
            with pytest.raises(ValueError, match="over|closed"):
                get()
        with pytest.raises(ValueError, match="closed"):
            regs.rax = 1
        assert "port 0xb0" in repr(kept)


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
        lambda port, value: seen.append(value) or ("done" if value == 100 else None),
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


def test_a_vm_that_nobody_closes_is_closed_by_the_collector(rig: MakeRig, footprint):
    from tests.conftest import Footprint

    one = rig(Code().out32(0xB0).bytes)
    arena_hva = one.arena.hva
    before = Footprint()
    vm = Vm()
    vm.memslots.add(0, 1 << 20, arena_hva)
    vcpu = vm.create_vcpu()
    # A cycle through C: the vCPU's handler holds the VM that holds the vCPU.
    vcpu.on_mmio = lambda exit_: (vm, exit_)
    vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, lambda exit_: (vcpu, exit_))
    assert len(Footprint().fds) == len(before.fds) + 2
    del vm, vcpu
    gc.collect()
    after = Footprint()
    assert after.fds == before.fds
    assert after.mappings == before.mappings
    assert isinstance(one.once(), IoExit)  # the other VM is as it was


def test_a_vm_must_not_be_closed_while_it_runs(rig: MakeRig):
    from kvmmm.errors import StateError

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
    one = vcpu.once  # registers must be loaded once for KVM to know CR3
    del one
    vcpu.stop()
    vcpu.once(SECOND)
    assert vcpu.translate(CODE + 5) == CODE + 5
    assert vcpu.translate(ABSENT + 0x1FF_FFF) == ABSENT + 0x1FF_FFF
    assert vcpu.translate(ABSENT - 1) is None
