"""A VM that forks at an awkward moment: an access half done, an exception on its way."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import StateError
from kvmmm.hostarch.access import ANY_ACCESS
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.vmm import fork
from kvmmm.vmm.result import PAUSED, RunResult
from tests.vmm.guest_run import FLAG, TIMEOUT, counting, describe, finish, load_code
from tests.vmm.machine_code import Code
from tests.vmm.probe_guest import PORT, Probe, pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.safemem.ffi import MmioExit
    from kvmmm.vmm.microvm import MicroVM

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

AT = 0x80_0000


class TestPendingAccess:
    """Forked between an exit and its completion."""

    EDGE = AT + HUGE_PAGE_BYTES - 3
    """Three bytes here, five in a window that nobody has touched."""

    @pytest.mark.npt
    @pytest.mark.parametrize("ring", [0, 3])
    @pytest.mark.parametrize("op", ["load", "store", "add"])
    @pytest.mark.parametrize("keeps_pausing", [False, True])
    def test_mmio(self, ring: int, op: str, keeps_pausing: bool):
        with Probe(ring, memory="32M") as parent:
            serve = parent.vm.vcpu.on_mmio
            assert serve is not None
            n_served = 0

            def serve_and_pause(exit_: MmioExit) -> object:
                nonlocal n_served
                n_served += 1
                return serve(exit_) or RunResult(PAUSED)

            parent.vm.vcpu.on_mmio = serve_and_pause
            result = parent.do(op, self.EDGE, 0x1122_3344_5566_7788)
            assert result.outcome == PAUSED, describe(result)
            assert n_served == 1
            if not keeps_pausing:
                parent.vm.vcpu.on_mmio = serve
            with parent.fork() as child:
                parent.vm.vcpu.on_mmio = serve
                assert keeps_pausing == (n_served > 1)
                for side in (parent, child):
                    result = side.vm.run(timeout=TIMEOUT)  # on to where it asks for the next op
                    assert result.outcome == PAUSED, describe(result)
                    stored = struct.unpack("<Q", side.vm.mm.read(self.EDGE, 8))[0]
                    assert stored == (0 if op == "load" else 0x1122_3344_5566_7788)
                child.store(self.EDGE, 5)
                assert parent.load(self.EDGE) == stored

    def test_a_port(self):
        """rip is on the `out`, or past it, as KVM likes: it is made once."""
        with load_code(Code().ring3().mov("rbx", 0).out32(PORT).add("rbx", 1).exit(0)) as parent:
            seen: list[int] = []
            parent.on_out(PORT, lambda _p, _v: seen.append(1) or RunResult(PAUSED), value_only=True)
            assert parent.run(timeout=TIMEOUT).outcome == PAUSED
            with parent.fork() as child:
                child.on_out(PORT, lambda _p, _v: seen.append(2), value_only=True)
                assert child.run(timeout=TIMEOUT).ok
                assert child.vcpu.regs.rbx == 1
            assert parent.run(timeout=TIMEOUT).ok
            assert seen == [1]

    def test_a_port_that_is_read(self):
        with load_code(Code().ring3().in8(PORT).raw("88 c3").out8(PORT + 1, 0).exit(0)) as parent:

            def answer(exit_: object) -> RunResult:
                exit_.value = 0x5A  # type: ignore[attr-defined]
                return RunResult(PAUSED)

            parent.on_out(PORT, answer)
            assert parent.run(timeout=TIMEOUT).outcome == PAUSED
            with parent.fork() as child:
                for side in (parent, child):
                    assert side.run(timeout=TIMEOUT).ok
                    assert side.vcpu.regs.rbx & 0xFF == 0x5A

    def test_an_access_whose_rest_is_refused_ends_the_guest(self):
        with Probe(memory="32M") as parent:
            serve = parent.vm.vcpu.on_mmio
            assert serve is not None
            parent.vm.vcpu.on_mmio = lambda exit_: serve(exit_) or RunResult(PAUSED)
            parent.vm.mm.munmap(AT + HUGE_PAGE_BYTES, PAGE_BYTES)
            assert parent.do("load", self.EDGE).outcome == PAUSED
            with pytest.raises(StateError, match="ends this guest:\nguest fault: read from"):
                parent.vm.fork()
            with pytest.raises(StateError, match="has ended"):
                parent.vm.run(timeout=TIMEOUT)


class TestExceptionOnItsWay:
    """The deadline comes while KVM is about to deliver one: each comes once, in both."""

    IDT, HANDLER, DESCRIPTOR = 0x90_0000, 0x91_0000, 0x92_0000

    def guest(self, op: str, length: int) -> bytes:
        code = Code().mov("rbx", self.DESCRIPTOR).raw("0f 01 1b").ring3()
        return counting(code, Code().raw(op).raw("90" * (2 - length)))

    def prepare(self, vm: MicroVM, skipped: int) -> None:
        gate = struct.pack(
            "<HHHHII", self.HANDLER & 0xFFFF, 0x10, 0xEE00, self.HANDLER >> 16, 0, 0
        )  # fmt: skip
        vm.mm.copy_out(self.IDT, gate * 256)
        vm.mm.copy_out(self.DESCRIPTOR, struct.pack("<HQ", 4095, self.IDT))
        # incq AT; addq $skipped, (%rsp); iretq
        handler = b"\x48\xff\x04\x25" + struct.pack("<I", AT) + b"\x48\x83\x04\x24"
        vm.mm.copy_out(self.HANDLER, handler + bytes([skipped]) + b"\x48\xcf")
        vm.mm.mprotect(self.HANDLER, PAGE_BYTES, ANY_ACCESS)

    def assert_none_is_lost(self, vm: MicroVM) -> None:
        came = struct.unpack("<Q", vm.mm.read(AT, 8))[0]
        # One may just have come, or be about to.
        assert came - vm.vcpu.regs.r9 in {-1, 0}

    @pytest.mark.parametrize(("op", "length", "skipped"), [("cc", 1, 0), ("0f 0b", 2, 2)])
    def test_none_is_lost(self, op: str, length: int, skipped: int, scaled: Callable[[int], int]):
        with load_code(self.guest(op, length)) as parent:
            self.prepare(parent, skipped)
            for n in range(scaled(80)):
                assert parent.run(timeout=0.0007 + n % 37 * 1e-5).outcome == "deadline"
                with parent.fork() as child:
                    self.assert_none_is_lost(child)
                    parent.vcpu.regs.r10 = n  # which forgets what KVM holds back
                    child.vcpu.regs.r10 = n
                    assert child.run(timeout=0.001).outcome == "deadline"
                    self.assert_none_is_lost(child)
                self.assert_none_is_lost(parent)
            finish(parent)

    def test_the_guest_ends_meanwhile(self, monkeypatch: pytest.MonkeyPatch):
        """Then the next run says so, as if fork had come too late."""
        monkeypatch.setattr(fork, "may_hide_breakpoint", lambda *_args: True)
        with load_code(counting(Code().ring3())) as parent:
            parent.run(timeout=0.02)
            parent.mm.copy_out(FLAG, struct.pack("<Q", 1))
            with pytest.raises(StateError, match="has ended, just now"):
                parent.fork()
            result = parent.run(timeout=TIMEOUT)
            assert (result.outcome, result.status) == ("exited", 0), describe(result)
            with pytest.raises(StateError, match="has ended"):
                parent.run(timeout=TIMEOUT)

    def test_a_handler_pauses_it_meanwhile(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(fork, "may_hide_breakpoint", lambda *_args: True)
        with load_code(Code().ring3().out8(0xE9, ord("x")).out32(PORT).exit(0)) as parent:
            parent.on_out(PORT, pause, value_only=True)
            with parent.fork() as child, parent.fork() as second:
                for vm in (child, second):
                    assert vm.run(timeout=TIMEOUT).ok
                result = parent.run(timeout=TIMEOUT)
                assert (result.outcome, result.console) == (PAUSED, b"x")
                assert parent.run(timeout=TIMEOUT).ok

    def test_a_stop_meanwhile_is_kept(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(fork, "may_hide_breakpoint", lambda *_args: True)
        with load_code(counting(Code().ring3())) as parent:
            parent.run(timeout=0.02)
            parent.stop()
            with parent.fork() as child:
                assert parent.run(timeout=TIMEOUT).outcome == "stopped"
                assert child.run(timeout=0.02).outcome == "deadline"
                finish(parent)
