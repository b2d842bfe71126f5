"""What exits mean: trap frames, KVM's dead ends, and guests that use ports of ours wrongly."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import VcpuError
from kvmmm.hostarch.access import READ
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import abi, exits
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.exit_handler import TrapFrame
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from kvmmm.platform.kvm.exits import ColdExit

WORDS = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66]
HAVE_ERROR_CODES = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}  # SDM Vol. 3A table 6-1, APM Vol. 2 8-1


@pytest.mark.parametrize("vector", range(32))
def test_trap_frame(vector: int):
    frame = TrapFrame(vector, struct.pack("<6Q", *WORDS))
    has_code = vector in HAVE_ERROR_CODES
    assert frame.error_code == (0x11 if has_code else None)
    found = [frame.rip, frame.cs, frame.rflags, frame.rsp, frame.ss]
    assert found == (WORDS[1:] if has_code else WORDS[:5])


@pytest.mark.kvm
@pytest.mark.timeout(60)
class TestDeadEnds:
    @pytest.mark.parametrize(
        ("exit_", "message"),
        [
            (exits.FailEntryExit(0x80000021, 1), "refused the vCPU's state .reason 0x80000021"),
            (exits.InternalErrorExit(3, [0x80000B0E, 5], b""), "internal error 3 .0x80000b0e 0x5"),
            (exits.OtherExit(abi.KVM_EXIT_HYPERCALL), "unexpected exit: hypercall"),
            (exits.SystemEventExit(1), "unexpected exit: system_event"),
        ],
    )
    def test_what_says_nothing_about_the_guest(
        self, exit_: ColdExit, message: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(exits, "decode", lambda _vcpu, _reason: exit_)
        with load_code(Code().raw("f4")) as vm, pytest.raises(VcpuError, match=message) as caught:
            vm._handler.on_cold(exit_.reason)
        assert caught.value.exit_code == 71

    @pytest.mark.npt
    def test_hlt_is_the_end(self):
        result = run_code(Code().raw("f4"))
        assert result.outcome == "halted", describe(result)
        assert "no interrupt can wake it" in result.report

    def test_a_triple_fault(self):
        # lidt [BASE + 0x100], ten zeros; ud2.
        code = Code().mov("rbx", BASE + 0x100).raw("0f 01 1b 0f 0b").bytes.ljust(0x200, b"\0")
        result = run_code(code)
        assert result.outcome == "shutdown", describe(result)
        assert result.exit_code == 78
        assert "rax" not in result.report  # SVM has reset them

    def test_ring_0_may_write_to_the_trap_port_by_itself(self):
        result = run_code(Code().out8(lib.KVMMM_PORT_TRAP, 0).exit(3))
        assert (result.outcome, result.status) == ("exited", 3), describe(result)

    def test_statuses_are_8_bits(self):
        code = Code().mov("rax", 0x1FF).out32(lib.KVMMM_PORT_EXIT)
        assert run_code(code).status == 0xFF
        code = Code().mov("rax", 16).out32(lib.KVMMM_PORT_DEBUG_EXIT)
        assert run_code(code).status == 33

    def test_a_guest_whose_tables_forbid_what_its_map_allows(self):
        """Boot tables edited to read-only where the map says writable: said, not repeated."""
        at = 0x80_0000
        code = Code().ring3().mov("rbx", at).store("rbx", "rbx").spin()
        with load_code(code) as vm:
            vm.stop()
            vm.run(timeout=TIMEOUT)
            assert vm.area.tables is not None
            vm.area.tables.map(at, 0x1000, at, flags_of(READ, user=True))
            result = vm.run(timeout=TIMEOUT)
            assert result.outcome == "exception", describe(result)
            assert "#PF" in result.report.splitlines()[0]
            assert result.addr == at
            assert result.stats is not None
            assert result.stats.adds_up
