"""The console: nothing lost, nothing twice, in order; and a guest that lies about its ring."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kvmmm import errors
from kvmmm.errors import GuestConsoleError
from kvmmm.safemem.ffi import lib
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.system_area import OUTPUT_BYTES
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable


def text_of(n_bytes: int, line: int) -> bytes:
    """What bench_console prints."""
    return bytes(
        0x0A if i % line == line - 1 else 0x61 + (i // line + i % line) % 26 for i in range(n_bytes)
    )


@pytest.mark.kvm
@pytest.mark.timeout(100)
class TestGuestOutput:
    @pytest.mark.parametrize(
        ("mode", "n_bytes", "line"),
        [
            ("bulk", 1 << 20, 64),
            ("bulk", OUTPUT_BYTES + 1, 97),
            ("lines", 20_000, 1),
            ("lines", 99_000, 99),
        ],
    )
    def test_exact_bytes(self, mode: str, n_bytes: int, line: int, scaled: Callable[[int], int]):
        n_bytes = scaled(n_bytes) // line * line
        with MicroVM("64M") as vm:
            arguments = [f"mode={mode}", f"bytes={n_bytes}", f"line={line}"]
            vm.load(bundled.find("bench_console").path, args=arguments)
            result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", 0), result.report
        assert result.console == text_of(n_bytes, line)
        assert result.stats is not None
        assert result.stats.console_bytes == n_bytes

    @pytest.mark.npt
    def test_a_sink_gets_the_chunks_and_the_result_none(self):
        chunks: list[bytes] = []
        with MicroVM("64M", console=chunks.append) as vm:
            vm.load(bundled.find("hello").path)
            result = vm.run(timeout=TIMEOUT)
        assert b"".join(chunks).startswith(b"hello from ring 0")
        assert result.console == b""

    @pytest.mark.npt
    @pytest.mark.parametrize("ring", ["3", "0"])
    def test_a_line_is_seen_while_the_guest_spins(self, ring: str):
        seen: list[bytes] = []

        def sink(chunk: bytes) -> None:
            seen.append(chunk)
            vm.stop()

        with MicroVM("64M", console=sink) as vm:
            vm.load(bundled.find("spin").path, args=[f"ring={ring}"])
            result = vm.run(timeout=TIMEOUT)
        assert result.outcome == "stopped", describe(result)
        assert b"".join(seen) == f"spin: jumps in place for ever, in ring {ring}\n".encode()

    @pytest.mark.parametrize("port", [0xE9, 0x3F8])
    def test_a_line_by_port_is_seen_while_the_guest_spins(self, port: int):
        code = Code().ring3().mov("rdx", port)
        for byte in b"line 1\nline 2":  # the second without an end: seen since ports are queued
            code.raw(bytes([0xB0, byte, 0xEE]))
        seen: list[bytes] = []

        def sink(chunk: bytes) -> None:
            seen.append(chunk)
            if b"".join(seen).endswith(b"2"):
                vm.stop()

        with load_code(code.spin(), console=sink) as vm:
            result = vm.run(timeout=TIMEOUT)
        assert result.outcome == "stopped", describe(result)
        assert b"".join(seen) == b"line 1\nline 2"

    @pytest.mark.parametrize("ring", [0, 3])
    def test_two_ports_in_turn_keep_their_order(self, ring: int, scaled: Callable[[int], int]):
        """COM1 and 0xe9 by exit at first, then queued by KVM: each value comes twice, in order."""
        n_rounds = scaled(20_000 if ring else 4_000)
        code = Code().ring(ring).mov("rdx", 0x3F8).mov("rcx", n_rounds).mov("rax", 0)
        loop = code.here
        code.raw("e6 e9 ee").add("rax", 1).dec("rcx").jump_back_unless_zero(loop).exit(0)
        result = run_code(code)
        assert result.outcome == "exited", describe(result)
        assert result.console == bytes(n // 2 & 0xFF for n in range(2 * n_rounds))
        assert result.stats is not None
        assert result.stats.adds_up

    def test_rep_outs_prints_a_string(self):
        text = b"a whole string at once\n" * 100
        code = Code().ring3().mov("rdx", 0xE9).mov("rcx", len(text)).mov("rsi", BASE + 0x100)
        code.raw("f3 6e").exit(0)
        result = run_code(code.bytes.ljust(0x100, b"\0") + text)
        assert result.console == text

    def test_com1_is_a_16550(self):
        """Line status says empty; what goes to the divisor latch is no text."""
        code = Code().ring3()
        for port, value in ((0x3FB, 0x80), (0x3F8, 0x01), (0x3F9, 0x00), (0x3FB, 0x03)):
            code.mov("rdx", port).raw(bytes([0xB0, value, 0xEE]))
        for byte in b"text\n":
            code.mov("rdx", 0x3FD).raw("ec a8 20 74 fb")  # in; test $0x20; jz back to the in
            code.mov("rdx", 0x3F8).raw(bytes([0xB0, byte, 0xEE]))
        # Again, with the ports queued by KVM now.
        for port, value in ((0x3FB, 0x80), (0x3F8, 0x02), (0x3FB, 0x03), (0x3F8, 0x21)):
            code.mov("rdx", port).raw(bytes([0xB0, value, 0xEE]))
        result = run_code(code.exit(0))
        assert result.console == b"text\n!"

    def test_what_ports_read_as(self):
        code = Code().mov("rax", 0)
        for port in (0xE9, 0x99, 0xB8, 0xB9, 0xBA, 0xBF, 0xF4):
            code.in8(port).out32(0xB0)
        found: list[int] = []
        with load_code(code.exit(0)) as vm:
            vm.on_out(0xB0, lambda _port, value: found.append(value), value_only=True)
            result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", 0), describe(result)
        assert found == [0xE9, *[0xFF] * 6]

    @pytest.mark.parametrize("how", ["doorbell", "exit", "deadline"])
    def test_a_broken_ring_is_an_error(self, how: str):
        """out_head lies at 64 in struct kvmmm_console, which is the system area's first thing."""
        code = Code().ring3().mov("rbx", (64 << 20) + 64).mov("rcx", 1 << 40).store("rbx", "rcx")
        if how == "doorbell":
            code.out8(lib.KVMMM_PORT_DOORBELL, 0)
        code = code.exit(0) if how == "exit" else code.spin()
        with load_code(code) as vm:
            with pytest.raises(GuestConsoleError, match="out_head") as caught:
                vm.run(timeout=0.2 if how == "deadline" else TIMEOUT)
            assert caught.value.exit_code == errors.EXIT_CONSOLE

    def test_a_sinks_error_ends_the_run_and_comes_through(self):
        class MineError(Exception):
            pass

        def sink(_chunk: bytes) -> None:
            raise MineError("full")

        with MicroVM("64M", console=sink) as vm:
            vm.load(bundled.find("spin").path)
            with pytest.raises(MineError, match="full"):
                vm.run(timeout=TIMEOUT)
            assert vm.vcpu.thread_id == 0

    def test_output_is_collected_run_by_run(self):
        code = Code()
        for byte in b"one\n":
            code.out8(0xE9, byte)
        code.out32(0xB0)
        for byte in b"two\n":
            code.out8(0xE9, byte)
        with load_code(code.exit(0)) as vm:
            vm.on_out(0xB0, lambda _port, _value: vm.stop(), value_only=True)
            first, second = vm.run(timeout=TIMEOUT), vm.run(timeout=TIMEOUT)
        assert (first.outcome, first.console) == ("stopped", b"one\n")
        assert (second.outcome, second.console) == ("exited", b"two\n")


@pytest.mark.kvm
def test_a_line_is_seen_soon(is_slow_machine: bool):
    """Within 20 ms of its flush, though the guest then spins."""
    if is_slow_machine:
        pytest.skip("nothing is timed in an emulated machine")
    seen: list[float] = []
    started: list[float] = []

    def sink(chunk: bytes) -> None:
        if chunk.strip():
            seen.append(time.monotonic())
            vm.stop()

    code = Code().ring3().out32(0xB0)
    for byte in b"line\n":
        code.out8(0xE9, byte)
    delays = []
    for _ in range(20):
        with load_code(code.spin(), console=sink) as vm:
            vm.on_out(0xB0, lambda _p, _v: started.append(time.monotonic()), value_only=True)
            assert vm.run(timeout=TIMEOUT).outcome == "stopped"
        delays.append(seen[-1] - started[-1])
    assert sorted(delays)[len(delays) // 2] < 0.02
