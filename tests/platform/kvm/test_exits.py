"""Cold exits as typed values: by records made up here, and by guests that cause them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.platform.kvm import abi, exits
from kvmmm.safemem.ffi import MmioExit
from tests.platform.kvm.conftest import ABSENT, CODE, IDT
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

UNION = 32  # offsetof(struct kvm_run, hw), counted by hand from <linux/kvm.h>


class Recorded:
    """A vCPU whose kvm_run holds what a test says."""

    def __init__(self, record: bytes) -> None:
        self.content = (bytes(UNION) + record).ljust(2048, b"\0")

    def run_bytes(self, length_bytes: int = 2048) -> bytes:
        return self.content[:length_bytes]


def decoded(reason: int, record: bytes = b"") -> exits.ColdExit:
    return exits.decode(Recorded(record), reason)  # type: ignore[arg-type]


def test_without_a_record():
    assert isinstance(decoded(abi.KVM_EXIT_HLT), exits.HltExit)
    assert isinstance(decoded(abi.KVM_EXIT_SHUTDOWN), exits.ShutdownExit)


def test_fail_entry():
    exit_ = decoded(abi.KVM_EXIT_FAIL_ENTRY, struct.pack("<QI", 0x80000021, 3))
    assert isinstance(exit_, exits.FailEntryExit)
    assert (exit_.hardware_reason, exit_.cpu) == (0x80000021, 3)


def test_system_event():
    exit_ = decoded(abi.KVM_EXIT_SYSTEM_EVENT, struct.pack("<II", 2, 0))
    assert isinstance(exit_, exits.SystemEventExit)
    assert exit_.event == 2


@pytest.mark.parametrize(("reason", "name"), [(3, "hypercall"), (99, "reason 99"), (0, "unknown")])
def test_another_reason_has_a_name(reason: int, name: str):
    exit_ = decoded(reason)
    assert isinstance(exit_, exits.OtherExit)
    assert (exit_.reason, exit_.name) == (reason, name)


def internal_error(suberror: int, *words: int) -> exits.InternalErrorExit:
    data = list(words) + [0] * (16 - len(words))
    exit_ = decoded(abi.KVM_EXIT_INTERNAL_ERROR, struct.pack("<II16Q", suberror, len(words), *data))
    assert isinstance(exit_, exits.InternalErrorExit)
    return exit_


def test_emulation_failure_with_the_instructions_bytes():
    code = bytes(range(0xA0, 0xAF))
    words = struct.unpack("<2Q", bytes([15]) + code)
    exit_ = internal_error(1, 1, *words, 7)
    assert exit_.is_emulation_failure
    assert exit_.instruction == code
    assert exit_.data == [1, *words, 7]


@pytest.mark.parametrize(("size", "length"), [(0, 0), (3, 3), (15, 15), (200, 15)])
def test_only_bytes_that_there_can_be(size: int, length: int):
    words = struct.unpack("<2Q", bytes([size]) + bytes(range(15)))
    assert internal_error(1, 1, *words, 0).instruction == bytes(range(15))[:length]


@pytest.mark.parametrize(
    "words", [(), (1,), (0, 0xFF, 0xFF, 0), (1, 2, 3)], ids=["none", "short", "no flag", "ndata 3"]
)
def test_no_bytes_where_kvm_gives_none(words: tuple[int, ...]):
    exit_ = internal_error(1, *words)
    assert exit_.instruction == b""
    assert exit_.data == list(words)


def test_other_internal_errors_are_no_emulation_failures():
    exit_ = internal_error(3, 0x80000B0E, 5)
    assert not exit_.is_emulation_failure
    assert exit_.suberror == abi.KVM_INTERNAL_ERROR_DELIVERY_EV


@pytest.mark.kvm
@pytest.mark.npt
class TestOnKvm:
    @pytest.fixture
    def run(self, rig: Callable[..., Rig]) -> Callable[..., tuple[Rig, exits.ColdExit]]:
        def run(code: Code, ring: int = 0) -> tuple[Rig, exits.ColdExit]:
            one = rig(code.bytes, ring)
            reason = one.once()
            assert isinstance(reason, int), reason
            return one, exits.decode(one.vcpu, reason)

        return run

    def test_hlt(self, run: Callable[..., tuple[Rig, exits.ColdExit]]):
        assert isinstance(run(Code().raw("f4"))[1], exits.HltExit)

    def test_a_triple_fault(self, rig: Callable[..., Rig]):
        one = rig(Code().raw("0f 0b").bytes)  # ud2, with an IDT of zeros
        one.memory[IDT : IDT + 4096] = bytes(4096)
        assert isinstance(exits.decode(one.vcpu, one.once()), exits.ShutdownExit)

    @pytest.mark.parametrize("ring", [0, 3])
    def test_an_instruction_that_kvm_does_not_emulate(self, run: Any, ring: int):
        """Fld on memory without a slot: x87 is not what KVM's emulator is for."""
        code = Code().mov("rbx", ABSENT)
        at = CODE + code.here
        one, exit_ = run(code.raw("dd 03"), ring)
        assert isinstance(exit_, exits.InternalErrorExit)
        assert exit_.is_emulation_failure
        assert one.vcpu.regs.rip == at
        assert exit_.instruction[:4] in {b"", bytes.fromhex("dd030000")}

    def test_a_fetch_without_memory(self, rig: Callable[..., Rig]):
        one = rig(Code().mov("rbx", ABSENT).jump("rbx").bytes)
        for table in range(0x1_0000, 0x2_0000, 8):  # the range is NX: take that off
            entry = int.from_bytes(one.memory[table : table + 8], "little")
            if entry >> 63:
                one.memory[table + 7] &= 0x7F
        exit_ = one.once()
        if isinstance(exit_, MmioExit):
            pytest.fail("a fetch came as an MMIO exit")
        cold = exits.decode(one.vcpu, exit_)
        assert isinstance(cold, exits.InternalErrorExit)
        assert cold.is_emulation_failure
        assert one.vcpu.regs.rip == ABSENT
