"""Processes of a `UserVM`: fork, turns, memory of their own, and what is left when they end."""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, StateError
from tests.vmm.guest_run import TIMEOUT, describe
from tests.vmm.user_program import (
    DATA,
    FORK,
    MMAP,
    YIELD,
    Program,
    load_program,
    run_program,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

RW, ANON, SHARED = 3, 0x22, 0x21


@pytest.mark.npt
def test_the_childs_bytes_are_its_own():
    child = Program().mov("rbx", DATA).mov("rcx", 5).store("rbx", "rcx").print("child\n").exit(9)
    program = Program().mov("rbx", DATA).mov("rcx", 3).store("rbx", "rcx").fork(child)
    program.syscall(YIELD).print("parent\n").mov("rbx", DATA).load("rdi", "rbx").exit(None)
    result = run_program(program)
    assert (result.outcome, result.status) == ("exited", 3), describe(result)
    assert result.console == b"child\nparent\n"
    assert result.stats is not None
    assert result.stats.adds_up


def test_the_parent_may_end_first():
    child = Program().syscall(YIELD).print("orphan\n").exit(9)
    result = run_program(Program().fork(child).exit(4))
    assert (result.outcome, result.status, result.console) == ("exited", 4, b"orphan\n")


def test_pids():
    with load_program(Program().syscall(FORK).spin()) as vm:
        assert [process.pid for process in vm.processes] == [1]
        vm.run(timeout=0.3)
        assert sorted(process.pid for process in vm.processes) == [1, 2]
        child = next(process for process in vm.processes if process.pid == 2)
        assert child.parent is not None
        assert child.parent.pid == 1


def test_spinning_processes_share_the_cpu():
    """Each counts in a page of shared memory; nobody yields."""
    program = Program().syscall(MMAP, DATA + 0x10_0000, 4096, RW, SHARED | 0x10, -1, 0)
    program.raw("48 89 c3").syscall(FORK)  # mov rbx, rax
    program.raw("48 8d 1c c3")  # lea rbx, [rbx + rax * 8]: word 0 is the child's, 2 the parent's
    loop = program.here
    program.inc_at("rbx").jump_back(loop)
    with load_program(program) as vm:
        before = (0, 0)
        for _ in range(3):
            assert vm.run(timeout=0.4).outcome == "deadline"
            words = struct.unpack("<3Q", vm.mm.read(DATA + 0x10_0000, 24))
            now = (words[0], words[2])
            assert all(a > b for a, b in zip(now, before, strict=True)), (now, before)
            before = now


def test_vector_registers_and_fs_are_each_processs_own():
    # mov rax, 1 or 2; movq xmm5, rax; wait; movq rdi, xmm5
    def body(value: int) -> Program:
        code = Program().mov("rax", value).raw("66 48 0f 6e e8")
        code.syscall(158, 0x1002, DATA + value * 8)
        for _ in range(4):
            code.syscall(YIELD)
        code.raw("66 48 0f 7e ef")  # movq rdi, xmm5
        return code.raw("64 48 03 3c 25 00 00 00 00")  # add rdi, fs:[0]

    child = body(2).raw("48 89 3c 25").raw(struct.pack("<I", DATA + 0x100)).exit(None)
    program = Program()
    for value in (1, 2):
        program.mov("rbx", DATA + value * 8).mov("rcx", value * 16).store("rbx", "rcx")
    program.fork(child).raw(body(1).bytes).exit(None)
    with load_program(program) as vm:
        result = vm.run(timeout=TIMEOUT)
        assert result.status == 17, describe(result)


def test_what_ended_has_given_its_memory_back():
    touch = Program().syscall(MMAP, 0, 8 << 20, RW, ANON, -1, 0).raw("48 89 c3")
    touch.mov("rcx", 2048)
    loop = touch.here
    touch.inc_at("rbx").add("rbx", 4096).dec("rcx").jump_back_unless_zero(loop)
    program = Program().fork(Program().raw(touch.bytes).exit(0)).mov("r12", 5000)
    loop = program.here
    program.syscall(YIELD).dec("r12").jump_back_unless_zero(loop).syscall(1000).exit(0)
    used: list[int] = []
    with load_program(program, memory="64M") as vm:
        vm.on_syscall(1000, lambda *_: used.append(vm.arena.statistics().used_bytes) or 0)  # type: ignore[func-returns-value]
        before = vm.arena.statistics().used_bytes
        result = vm.run(timeout=TIMEOUT)
        assert result.status == 0
        assert result.stats is not None
        assert result.stats.allocated_bytes >= 8 << 20
    assert used[0] - before < 4 << 20


def test_more_processes_than_enough(scaled: Callable[[int], int]):
    from kvmmm.vmm import user_scheduler

    most = scaled(64)
    program = Program()
    loop = program.here
    program.syscall(FORK).raw("48 85 c0")  # test rax, rax
    program.raw("7f").raw(bytes([(loop - program.here - 1) & 0xFF]))  # jg: the parent goes on
    program.exit_with("rax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_scheduler, "MAX_PROCESSES", most)
        result = run_program(program)
    assert result.outcome == "exited", describe(result)
    assert result.status == -errno.EAGAIN & 0xFF


def test_a_fork_without_memory(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ArenaExhaustedError(1, 0, 1)

    program = Program().mov("rbx", 77).syscall(FORK).exit_with("rax")
    with load_program(program) as vm:
        monkeypatch.setattr(type(vm.mm), "fork", fail)
        result = vm.run(timeout=TIMEOUT)
        assert result.status == -errno.ENOMEM & 0xFF, describe(result)
        assert len(vm.processes) == 0


def test_an_interrupted_turn_ends_the_guest(monkeypatch: pytest.MonkeyPatch):
    with load_program(Program().fork(Program().spin()).spin()) as vm:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(type(vm.vcpu), "load_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vm.run(timeout=TIMEOUT)
        with pytest.raises(StateError, match="has ended"):
            vm.run(timeout=TIMEOUT)


def test_a_fault_of_a_child_ends_the_run():
    child = Program().mov("rax", 0x1000).load("rax", "rax")
    result = run_program(Program().fork(child).spin())
    assert (result.outcome, result.addr) == ("fault", 0x1000)


def test_many_forks_are_quick_enough_to_be_used():
    """No timing asserted: a run that would take minutes misses its deadline."""
    program = Program().mov("r12", 50)
    loop = program.here
    program.fork(Program().exit(0)).syscall(YIELD).dec("r12").jump_back_unless_zero(loop).exit(0)
    began = time.monotonic()
    result = run_program(program)
    assert result.status == 0, f"{describe(result)} after {time.monotonic() - began:.1f} s"
