"""Programs in ring 3: their faults and system calls, their processes, and how a run ends."""

from __future__ import annotations

import errno
import gc
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

import kvmmm
from kvmmm.errors import ImageError, MmError, RangeError, StateError, SyscallError
from kvmmm.memmap.host_file import HostFile
from kvmmm.vmm import user_vm
from kvmmm.vmm.result import RunResult
from kvmmm.vmm.user_vm import UserVM
from tests.conftest import Footprint, wait_for_no_leak
from tests.vmm.guest_run import TIMEOUT, describe
from tests.vmm.user_program import (
    DATA,
    GETPID,
    MADVISE,
    MMAP,
    MUNMAP,
    PROGRAM,
    WRITE,
    YIELD,
    Program,
    load_program,
    run_program,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

RW, ANON = 3, 0x22


class TestEnds:
    @pytest.mark.npt
    def test_exit(self):
        assert run_program(Program().exit(42)).status == 42

    def test_the_old_exit_and_only_eight_bits(self):
        assert run_program(Program().syscall(60, 0x1234)).status == 0x34

    @pytest.mark.npt
    def test_a_deadline_leaves_it_able_to_run_on(self):
        program = Program().mov("rbx", DATA)
        loop = program.here
        program.inc_at("rbx").jump_back(loop)
        with load_program(program) as vm:
            counts = []
            for _ in range(2):
                result = vm.run(timeout=0.1)
                assert result.outcome == "deadline", describe(result)
                assert "inc qword ptr" in result.report or "jmp" in result.report
                counts.append(struct.unpack("<Q", vm.mm.read(DATA, 8))[0])
            assert 0 < counts[0] < counts[1]

    def test_a_stop(self):
        with load_program(Program().spin()) as vm:
            threading.Timer(0.1, vm.stop).start()
            result = vm.run(timeout=TIMEOUT)
        assert result.outcome == "stopped"
        assert "by stop()" in result.report

    def test_an_exception_of_a_handler_ends_it(self):
        with load_program(Program().syscall(777).exit()) as vm:

            def fail(_process: object, _args: object) -> int:
                raise ZeroDivisionError

            vm.on_syscall(777, fail)
            with pytest.raises(ZeroDivisionError):
                vm.run(timeout=TIMEOUT)
            with pytest.raises(StateError, match="has ended"):
                vm.run(timeout=TIMEOUT)


class TestFaults:
    @pytest.mark.npt
    def test_null(self):
        result = run_program(Program().mov("rax", 0).store("rax", "rcx"))
        assert (result.outcome, result.addr) == ("fault", 0)
        assert "guest fault: write to 0x0, where nothing is mapped" in result.report
        assert "ring 3" in result.report
        assert "page 0 is never mapped" in result.report
        assert "mov qword ptr [rax], rcx" in result.report

    def test_text_is_not_writable(self):
        result = run_program(Program().mov("rax", PROGRAM).store("rax", "rcx"))
        assert result.addr == PROGRAM
        assert "which is read-only" in result.report
        assert "SIGSEGV" in result.report

    @pytest.mark.npt
    def test_data_is_not_executable(self):
        result = run_program(Program().mov("rax", DATA).jump("rax"))
        assert result.addr == DATA
        assert f"jump to {DATA:#x}, which is not executable" in result.report

    def test_our_own_pages_are_out_of_reach(self):
        for addr in (0xFFFF_FF80_0000_0000, 0xFFFF_FF80_0000_3000, 0xFFFF_8000_0000_0000):
            result = run_program(Program().mov("rax", addr).load("rcx", "rax"))
            assert (result.outcome, result.addr) == ("fault", addr), describe(result)

    def test_a_jump_to_the_system_call_stub_is_a_system_call_of_its_own(self):
        """The page of the stub is the program's to execute; what happens then harms nobody."""
        program = Program().mov("rcx", PROGRAM).mov("rax", GETPID)
        program.mov("rbx", 0xFFFF_FF80_0000_2000).jump("rbx")
        with load_program(program) as vm:
            assert vm.run(timeout=0.2).outcome in {"deadline", "fault"}

    @pytest.mark.parametrize(
        ("code", "name"),
        [("0f 0b", "#UD"), ("31 c9 f7 f1", "#DE"), ("f4", "#GP"), ("cc", "#BP"), ("e6 80", "#GP")],
    )
    def test_exceptions(self, code: str, name: str):
        result = run_program(Program().raw(code))
        assert result.outcome == "exception", describe(result)
        assert f"guest exception {name}" in result.report
        assert "a process would get SIG" in result.report

    def test_memory_runs_out(self):
        program = Program().syscall(MMAP, 0, 256 << 20, RW, ANON, -1, 0)
        program.raw("48 89 c3")  # mov rbx, rax
        loop = program.here
        program.inc_at("rbx").add("rbx", 4096).jump_back(loop)
        result = run_program(program, memory="8M")
        assert result.outcome == "memory", describe(result)
        assert "guest memory is exhausted" in result.report


class TestSystemCalls:
    @pytest.mark.npt
    def test_write(self):
        result = run_program(Program().print("hello\n").print("and again\n").exit())
        assert result.console == b"hello\nand again\n"
        assert result.stats is not None
        assert result.stats.console_bytes == 16
        assert result.stats.syscalls == 3
        assert result.stats.adds_up

    def test_a_sink(self):
        chunks: list[bytes] = []
        result = run_program(Program().print("a").print("b").exit(), console=chunks.append)
        assert chunks == [b"a", b"b"]
        assert result.console == b""

    def test_an_unknown_call_is_enosys(self):
        result = run_program(Program().syscall(4242).exit_with("rax"))
        assert result.status == -errno.ENOSYS & 0xFF

    def test_only_the_low_half_of_rax_counts(self):
        program = Program().syscall(GETPID | 0xABCD << 32).exit_with("rax")
        assert run_program(program).status == 1

    def test_a_call_of_ones_own(self):
        seen: list[tuple[Any, ...]] = []
        program = Program().syscall(1000, 1, 2, 3, 4, 5, (1 << 64) - 6).exit_with("rax")
        with load_program(program) as vm:

            def call(process: object, args: tuple[int, ...]) -> int:
                seen.append((process, args))
                return 7

            vm.on_syscall(1000, call)
            process = vm.process
            assert vm.run(timeout=TIMEOUT).status == 7
        assert seen == [(process, (1, 2, 3, 4, 5, (1 << 64) - 6))]

    @pytest.mark.parametrize(
        "error", [MmError(errno.EPERM, "mine", 0, "no"), SyscallError(errno.EPERM, "its file")]
    )
    def test_its_errors_are_errnos_and_it_may_end_the_run(self, error: OSError):
        # mov rdi, rax
        program = Program().syscall(1000).raw("48 89 c7").syscall(1001, None)
        with load_program(program) as vm:

            def refuse(*_: object) -> int:
                raise error

            def end(*_: object) -> Any:
                return RunResult("exited", status=-vm.vcpu.regs.rdi & 0xFF)

            vm.on_syscall(1000, refuse)
            vm.on_syscall(1001, end)
            assert vm.run(timeout=TIMEOUT).status == errno.EPERM

    def test_a_call_can_be_taken_away(self):
        with load_program(Program().syscall(GETPID).exit_with("rax")) as vm:
            vm.on_syscall(GETPID, None)
            assert vm.run(timeout=TIMEOUT).status == -errno.ENOSYS & 0xFF


class TestMemory:
    @pytest.mark.npt
    def test_what_the_host_sees_and_writes(self):
        program = Program().mov("rbx", DATA).mov("rcx", 0x1234).store("rbx", "rcx")
        program.syscall(1000).load("rdi", "rbx").exit(None)
        with load_program(program) as vm:

            def call(process: Any, _args: object) -> int:
                assert process.mm.read(DATA, 8) == struct.pack("<Q", 0x1234)
                process.mm.write(DATA, struct.pack("<Q", 99))
                return 0

            vm.on_syscall(1000, call)
            assert vm.run(timeout=TIMEOUT).status == 99
            vm.mm.check_invariants()

    def test_the_map(self):
        with load_program(Program().exit()) as vm:
            maps = vm.mm.maps()
        assert "00400000-00401000 r-xp" in maps
        assert "00500000-00502000 rw-p" in maps
        assert "[stack]" in maps

    def test_an_executable_stack_where_the_file_asks_for_one(self):
        # mov word [rsp - 64], ret; lea rax, [rsp - 64]; call rax
        program = Program().raw("66 c7 44 24 c0 c3 00 48 8d 44 24 c0 ff d0").exit(3)
        assert run_program(program).outcome == "fault"
        from tests.vmm.elf_builder import PT_GNU_STACK, Phdr, R, W, X

        text = Phdr(flags=R | X, vaddr=PROGRAM, filesz=len(program.bytes))
        for flags, outcome in ((R | W | X, "exited"), (R | W, "fault")):
            stack = Phdr(PT_GNU_STACK, flags, 0, 0, filesz=0)
            with UserVM() as vm:
                vm.load(program.elf(phdrs=[text, stack]))
                assert vm.run(timeout=TIMEOUT).outcome == outcome

    @pytest.mark.parametrize("private", [True, False])
    def test_a_file(self, tmp_path: Path, *, private: bool):
        path = tmp_path / "file"
        path.write_bytes(b"12345678".ljust(4096, b"."))
        program = Program().syscall(MMAP, 0, 4096, RW, 2 if private else 1, 3, 0)
        program.raw("48 89 c3").load("rcx", "rbx")  # mov rbx, rax; then its first 8 bytes
        program.mov("rsi", DATA).store("rsi", "rcx").mov("rdx", 0x21).store("rbx", "rdx").exit(0)
        with HostFile.open(path, writable=True) as file, UserVM() as vm:
            vm.load(program.elf(), files={3: file})
            result = vm.run(timeout=TIMEOUT)
            assert result.status == 0, describe(result)
            assert vm.mm.read(DATA, 8) == b"12345678"
            vm.mm.check_invariants()
        assert path.read_bytes()[:8] == (b"12345678" if private else b"!\0\0\0\0\0\0\0")

    def test_behind_the_end_of_a_file(self, tmp_path: Path):
        (tmp_path / "file").write_bytes(b"x" * 4096)
        program = Program().syscall(MMAP, 0, 8192, RW, 2, 3, 0).raw("48 89 c3")
        program.inc_at("rbx").add("rbx", 4096).load("rcx", "rbx")
        with HostFile.open(tmp_path / "file") as file, UserVM() as vm:
            vm.load(program.elf(), files={3: file})
            result = vm.run(timeout=TIMEOUT)
        assert result.outcome == "fault", describe(result)
        assert "SIGBUS" in result.report

    def test_the_same_fault_again_and_again_is_no_fault_of_ours(self):
        """madvise(DONTNEED) in a loop: rip and address are the same every time."""
        program = Program().mov("r12", 300)
        loop = program.here
        program.mov("rbx", DATA).inc_at("rbx").syscall(MADVISE, DATA, 4096, 4)
        program.dec("r12").jump_back_unless_zero(loop).load("rdi", "rbx").exit(None)
        result = run_program(program)
        assert (result.outcome, result.status) == ("exited", 0), describe(result)
        assert result.stats is not None
        assert result.stats.page_faults > 300

    def test_lazy_slots(self):
        program = Program().mov("rbx", DATA).inc_at("rbx").load("rdi", "rbx").exit(None)
        result = run_program(program, lazy_slots=True)
        assert result.status == 1, describe(result)
        assert result.stats is not None
        assert result.stats.n_slots > 1


class TestCalls:
    def test_run_before_load(self):
        with UserVM() as vm:
            with pytest.raises(StateError, match="call load"):
                vm.run(timeout=1)
            with pytest.raises(StateError, match="call load"):
                _ = vm.mm

    def test_load_twice(self):
        with (
            load_program(Program().exit()) as vm,
            pytest.raises(StateError, match="another UserVM"),
        ):
            vm.load(Program().exit().elf())

    def test_more_vcpus(self):
        with pytest.raises(RangeError, match="one vCPU"):
            UserVM(vcpus=2)

    def test_a_command_line_that_is_too_long_leaves_it_unloaded(self):
        with UserVM() as vm:
            with pytest.raises(ImageError, match="fit"):
                vm.load(Program().exit().elf(), argv=["x" * 200_000])
            vm.load(Program().exit(2).elf(), argv=["x" * 100_000])
            assert vm.run(timeout=TIMEOUT).status == 2

    def test_after_close(self):
        vm = load_program(Program().exit())
        vm.close()
        vm.close()
        with pytest.raises(StateError, match="closed"):
            vm.run(timeout=1)

    def test_by_its_public_name(self):
        with kvmmm.UserVM(memory="16M") as vm:
            vm.load(Program().exit(5).elf())
            assert vm.run(timeout="60s").exit_code == 5


@pytest.mark.npt
def test_vms_leave_nothing_behind(scaled: Callable[[int], int]):
    child = Program().exit(1)
    program = Program().fork(child).syscall(YIELD).syscall(MUNMAP, DATA, 4096)
    program.syscall(WRITE, 1, DATA, 1).exit(0)
    assert run_program(program).status == 0
    before = Footprint()
    for n in range(scaled(40)):
        vm = load_program(program)
        if n % 3:
            assert vm.run(timeout=TIMEOUT).status == 0
        if n % 2:
            vm.close()
    del vm
    gc.collect()
    leaks = wait_for_no_leak(before)
    assert not leaks, leaks


@pytest.mark.parametrize("step", ["GuestPhysical", "KernelHalf", "Scheduler", "Syscalls"])
@pytest.mark.usefixtures("no_leak")
def test_a_step_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, step: str):
    def fail(*_: object, **__: object) -> None:
        raise MmError(errno.ENOMEM, "test", 0, "no")

    monkeypatch.setattr(user_vm, step, fail)
    with pytest.raises(MmError):
        UserVM()
