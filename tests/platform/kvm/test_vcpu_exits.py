"""The two hot exits as objects: what they say, what they take, and when they are over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.platform.kvm import abi
from kvmmm.safemem.ffi import IoExit, MmioExit, lib
from tests.platform.kvm.conftest import ABSENT, DATA
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60)]

DEADLINE = -lib.KVMMM_STOP_DEADLINE


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
        code = (
            Code().mov("rsi", DATA).mov("rcx", len(text)).mov("rdx", 0xB0).raw("f3 6e").out32(0xB1)
        )
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
            with pytest.raises(ValueError, match=r"over|closed"):
                get()
        with pytest.raises(ValueError, match="closed"):
            regs.rax = 1
        assert "port 0xb0" in repr(kept)
