"""Console input: whole, in order, waited for no longer than the run lasts."""

from __future__ import annotations

import os
import resource
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.safemem.ffi import lib
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from tests.vmm.guest_run import TIMEOUT, describe, load_code
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Iterator


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
