"""The console: nothing lost, nothing twice, in order; and a guest that lies about its ring."""

from __future__ import annotations

import os
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm import errors
from kvmmm.errors import GuestConsoleError, IoctlError
from kvmmm.safemem.ffi import HostMapping, VcpuCore, ffi, lib
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.system_area import OUTPUT_BYTES
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

SHARED, RING, RING_BYTES = 0, 4096, 256
RUN_PAGES = 3
COALESCED_PAGE = 2


class FakeCpu:
    """A VcpuCore over a memfd in place of KVM's: the test plays guest and kernel.

    Attributes:
        core: The object under test.
    """

    def __init__(self) -> None:
        self.run_fd = os.memfd_create("kvm_run")
        os.truncate(self.run_fd, RUN_PAGES * 4096)
        self.run = memoryview(HostMapping(self.run_fd, RUN_PAGES * 4096, 4096))
        guest_fd = os.memfd_create("guest")
        os.truncate(guest_fd, 8192)
        mapping = HostMapping(guest_fd, 8192, 4096)
        os.close(guest_fd)
        self.guest = memoryview(mapping)
        self.core = VcpuCore(os.dup(self.run_fd), RUN_PAGES * 4096)
        self.core.set_console(mapping.hva + SHARED, mapping.hva + RING, RING_BYTES)
        self.shared = ffi.cast("struct kvmmm_console *", mapping.hva + SHARED)

    def print(self, text: bytes) -> bytes:
        """As much of `text` into the ring as it has room for; returns the rest."""
        head, tail = int(self.shared.out_head), int(self.shared.out_tail)
        room = RING_BYTES - (head - tail)
        for i, byte in enumerate(text[:room]):
            self.guest[RING + (head + i) % RING_BYTES] = byte
        self.shared.out_head = head + len(text[:room])
        return text[room:]

    def close(self) -> None:
        self.core.close()
        self.run.release()
        self.guest.release()
        os.close(self.run_fd)


@pytest.fixture
def cpu() -> Iterator[FakeCpu]:
    cpu = FakeCpu()
    yield cpu
    cpu.close()


class TestRing:
    @given(pieces=st.lists(st.tuples(st.binary(max_size=300), st.booleans()), max_size=40))
    def test_every_byte_comes_once_and_in_order(self, pieces: list[tuple[bytes, bool]]):
        cpu = FakeCpu()
        printed = taken = b""
        for text, takes in pieces:
            rest = cpu.print(text)
            printed += text[: len(text) - len(rest)]
            if takes:
                taken += cpu.core.console_take()
                assert taken == printed
                assert cpu.shared.out_tail == len(taken)
        taken += cpu.core.console_take()
        assert taken == printed
        assert cpu.core.console_take() == b""
        cpu.close()

    def test_around_the_ring_many_times(self, cpu: FakeCpu):
        for _ in range(600):
            assert cpu.print(b"0123456789") == b""
            assert cpu.core.console_take() == b"0123456789"

    def test_full_to_the_last_byte(self, cpu: FakeCpu):
        cpu.print(b"x" * 100)
        cpu.core.console_take()
        text = bytes(range(256))
        assert cpu.print(text) == b""
        assert cpu.print(b"more") == b"more"
        assert cpu.core.console_take() == text

    @pytest.mark.parametrize("head", [-1, RING_BYTES + 1, 1 << 63, -RING_BYTES])
    def test_a_head_that_cannot_be_is_an_error(self, cpu: FakeCpu, head: int):
        cpu.print(b"abc")
        cpu.core.console_take()
        cpu.shared.out_head = (3 + head) % (1 << 64)
        with pytest.raises(OSError, match="Protocol error"):
            cpu.core.console_take()

    def test_the_guests_tail_is_not_believed(self, cpu: FakeCpu):
        cpu.print(b"abc")
        cpu.shared.out_tail = 999
        assert cpu.core.console_take() == b"abc"
        assert cpu.shared.out_tail == 3


class TestCoalesced:
    """The ring that KVM keeps: struct kvm_coalesced_mmio_ring { u32 first, last; entries }."""

    @pytest.fixture
    def ring(self, cpu: FakeCpu) -> Callable[..., None]:
        cpu.core.set_coalesced(COALESCED_PAGE)
        n_entries = (4096 - 8) // 24

        def queue(port: int, data: bytes) -> None:
            at = COALESCED_PAGE * 4096
            last = struct.unpack_from("<I", cpu.run, at + 4)[0]
            entry = struct.pack("<QII8s", port, len(data), 1, data)
            cpu.run[at + 8 + 24 * last : at + 32 + 24 * last] = entry
            struct.pack_into("<I", cpu.run, at + 4, (last + 1) % n_entries)

        return queue

    def test_entries_are_taken_once_and_in_order(self, cpu: FakeCpu, ring: Callable[..., None]):
        expected = b""
        for n in range(1000):  # around the ring, and more
            piece = bytes([n & 0xFF] * (1 + n % 4))
            ring(lib.KVMMM_PORT_DEBUGCON, piece)
            expected += piece
            if n % 100 == 99:
                assert cpu.core.console_take() == expected
                expected = b""
        assert cpu.core.statistics()["coalesced_bytes"] == cpu.core.statistics()["legacy_bytes"]

    def test_they_come_before_the_shared_ring(self, cpu: FakeCpu, ring: Callable[..., None]):
        ring(lib.KVMMM_PORT_DEBUGCON, b"port ")
        cpu.print(b"ring")
        assert cpu.core.console_take() == b"port ring"

    def test_a_length_that_cannot_be_is_cut(self, cpu: FakeCpu, ring: Callable[..., None]):
        ring(lib.KVMMM_PORT_DEBUGCON, b"12345678")
        struct.pack_into("<I", cpu.run, COALESCED_PAGE * 4096 + 8 + 8, 5000)
        assert cpu.core.console_take() == b"12345678"

    def test_a_page_outside_the_mapping_is_refused(self, cpu: FakeCpu):
        with pytest.raises(OSError, match="Invalid argument"):
            cpu.core.set_coalesced(RUN_PAGES)


def test_a_vcpu_that_is_none_says_which_ioctl_failed(cpu: FakeCpu):
    assert lib.kvmmm_kick_init() > 0
    with pytest.raises(IoctlError) as caught:
        cpu.core.run(10**9)
    assert caught.value.ioctl == "KVM_RUN"
    assert not cpu.core.handler_failed


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
        [("bulk", 1 << 20, 64), ("bulk", OUTPUT_BYTES + 1, 97), ("lines", 20_000, 1), ("lines", 99_000, 99)],
    )
    def test_exact_bytes(
        self, mode: str, n_bytes: int, line: int, scaled: Callable[[int], int]
    ):
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
@pytest.mark.timeout(100)
class TestGuestInput:
    @pytest.fixture
    def pipe(self) -> Iterator[tuple[int, int]]:
        reader, writer = os.pipe()
        yield reader, writer
        for fd in (reader, writer):
            try:
                os.close(fd)
            except OSError:
                continue

    def test_a_conversation(self, pipe: tuple[int, int]):
        """Each answer of the guest brings the next line: nothing waits for more than a line."""
        lines = [b"first\n", b"second\n", b"x" * 3000 + b"\n", b"no newline at the end"]
        reader, writer = pipe
        heard = b""
        todo = list(lines)

        def sink(chunk: bytes) -> None:
            nonlocal heard
            heard += chunk
            if heard.endswith(b"\n"):
                os.write(writer, todo.pop(0))
                if not todo:
                    os.close(writer)

        with MicroVM("64M", console=sink, console_input=reader) as vm:
            os.write(writer, todo.pop(0))
            vm.load(bundled.find("echo").path)
            result = vm.run(timeout=TIMEOUT)
        assert result.ok, describe(result)
        assert heard == b"".join(lines)

    @pytest.mark.npt
    def test_more_than_the_ring_holds(self, pipe: tuple[int, int]):
        text = b"".join(b"%d %s\n" % (n, b"y" * (n % 4000)) for n in range(0, 60_000, 1111))
        reader, writer = pipe

        def feed() -> None:
            os.write(writer, text)
            os.close(writer)

        feeder = threading.Thread(target=feed)
        feeder.start()
        with MicroVM("64M", console_input=reader) as vm:
            vm.load(bundled.find("echo").path)
            result = vm.run(timeout=TIMEOUT)
        feeder.join()
        assert result.ok, describe(result)
        assert result.console == text

    def test_without_input_it_is_at_its_end(self):
        with MicroVM("64M") as vm:
            vm.load(bundled.find("echo").path)
            result = vm.run(timeout=TIMEOUT)
        assert result.ok, describe(result)
        assert result.console == b""

    def test_the_deadline_ends_a_wait_for_input(self, pipe: tuple[int, int]):
        with MicroVM("64M", console_input=pipe[0]) as vm:
            vm.load(bundled.find("echo").path)
            assert vm.run(timeout=0.2).outcome == "deadline"
            os.write(pipe[1], b"later\n")
            os.close(pipe[1])
            result = vm.run(timeout=TIMEOUT)
        assert result.ok, describe(result)
        assert result.console == b"later\n"

    def test_a_stop_ends_a_wait_for_input(self, pipe: tuple[int, int]):
        with MicroVM("64M", console_input=pipe[0]) as vm:
            vm.load(bundled.find("echo").path)
            for delay in (0.0, 0.1, 0.03):
                timer = threading.Timer(delay, vm.stop)
                timer.start()
                assert vm.run(timeout=TIMEOUT).outcome == "stopped"
                timer.join()
            os.write(pipe[1], b"all of it\n")
            os.close(pipe[1])
            result = vm.run(timeout=TIMEOUT)
        assert result.console == b"all of it\n"

    def test_a_descriptor_above_1023(self, pipe: tuple[int, int]):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2000
        if hard != resource.RLIM_INFINITY and hard <= wanted:
            pytest.skip(f"this user may open {hard} files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 1), hard))
        os.dup2(pipe[0], wanted)
        try:
            os.write(pipe[1], b"high\n")
            os.close(pipe[1])
            with MicroVM("64M", console_input=wanted) as vm:
                vm.load(bundled.find("echo").path)
                assert vm.run(timeout=TIMEOUT).console == b"high\n"
        finally:
            os.close(wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_a_descriptor_that_is_none_is_an_oserror(self):
        with MicroVM("64M", console_input=999_999) as vm:
            vm.load(bundled.find("echo").path)
            with pytest.raises(OSError, match="Bad file descriptor"):
                vm.run(timeout=TIMEOUT)

    def test_a_guest_that_lies_about_its_input_ring(self, pipe: tuple[int, int]):
        """in_tail lies at 72: beyond in_head there is no room, and nothing is put anywhere."""
        os.write(pipe[1], b"input")
        code = Code().ring3().mov("rbx", (64 << 20) + 72).mov("rcx", 1 << 40).store("rbx", "rcx")
        with load_code(code.out8(lib.KVMMM_PORT_INPUT, 0).exit(0), console_input=pipe[0]) as vm:
            result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", 0), describe(result)
        assert os.read(pipe[0], 100) == b"input"

    def test_indexes_at_their_end(self, pipe: tuple[int, int]):
        """Both ends of the input ring at 2**64 - 1: what follows wraps."""
        os.write(pipe[1], b"input")
        code = Code().ring3().mov("rcx", -1)
        for offset in (72, 136):
            code.mov("rbx", (64 << 20) + offset).store("rbx", "rcx")
        with load_code(code.out8(lib.KVMMM_PORT_INPUT, 0).exit(0), console_input=pipe[0]) as vm:
            result = vm.run(timeout=TIMEOUT)
            assert (result.outcome, result.status) == ("exited", 0), describe(result)
            assert struct.unpack("<Q", vm.area.read(vm.area.start + 136, 8)) == (4,)


@pytest.mark.kvm
def test_a_line_is_seen_soon(is_slow_machine: bool):
    """Within 20 ms of its flush, though the guest then spins; half a second where time is strange."""
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
