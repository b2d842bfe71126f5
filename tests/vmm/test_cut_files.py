"""A file that somebody cuts short under a running guest: KVM_RUN fails, the guest has a bus error.

The host never touches what is gone, and the run ends with a report, or with an error that says why.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import IoctlError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES
from kvmmm.memmap.host_file import HostFile
from kvmmm.vmm.user_vm import UserVM
from tests.vmm.guest_run import TIMEOUT, describe, load_code
from tests.vmm.machine_code import Code
from tests.vmm.user_program import MMAP, Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmmm.vmm.microvm import MicroVM
    from kvmmm.vmm.result import RunResult
    from kvmmm.vmm.user_process import Process

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(200)]

PAGE = 4096
N_PAGES = 4
AT = 0x80_0000
SHARED, PRIVATE, FIXED = 1, 2, 0x10
CUT = 1000
"""A system call of the tests' own."""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE * N_PAGES)
    with HostFile.open(path, writable=True) as opened:
        yield opened


def read_forever(code: Code, *, is_write: bool) -> None:
    """Touch the last page for ever."""
    code.mov("rbx", AT + (N_PAGES - 1) * PAGE)
    loop = code.here
    if is_write:
        code.store("rbx", "rbx")
    code.load("rcx", "rbx").jump_back(loop)


def program_that_reads(*, kind: int = SHARED, is_write: bool = False) -> Program:
    program = Program().syscall(MMAP, AT, N_PAGES * PAGE, READ_WRITE, kind | FIXED, 3, 0)
    read_forever(program, is_write=is_write)
    return program


def load_user(program: Program, file: HostFile, *, lazy_slots: bool = False) -> UserVM:
    vm = UserVM(lazy_slots=lazy_slots)
    vm.load(program.elf(), files={3: file})
    return vm


def load_kernel(file: HostFile, ring: int, *, private: bool) -> MicroVM:
    code = Code().ring(ring)
    read_forever(code, is_write=False)
    vm = load_code(code, memory="32M")
    vm.mm.mmap(
        HUGE_PAGE_BYTES, READ_WRITE, addr=AT, fixed=True, replace=True, private=private,
        mappable=file,
    )  # fmt: skip
    return vm


def run_while(
    vm: UserVM | MicroVM, change: Callable[[], object], after_s: float = 0.05
) -> RunResult:
    """Run; `change` happens meanwhile, on another thread."""
    assert vm.run(timeout=after_s).outcome == "deadline"  # it is at reading
    thread = threading.Thread(target=lambda: (time.sleep(after_s), change()))
    thread.start()
    try:
        return vm.run(timeout=TIMEOUT)
    finally:
        thread.join()


def assert_bus_error(vm: UserVM | MicroVM, result: RunResult, at: int = N_PAGES - 1) -> None:
    assert (result.outcome, result.addr) == ("fault", AT + at * PAGE), describe(result)
    assert "SIGBUS" in result.report or "file that is mapped there ends before" in result.report
    vm.mm.check_invariants()


class TestUserVm:
    @pytest.mark.parametrize("is_write", [False, True])
    def test_shared(self, file: HostFile, *, is_write: bool):
        with load_user(program_that_reads(is_write=is_write), file) as vm:
            result = run_while(vm, lambda: os.ftruncate(file.fd, PAGE))
            assert_bus_error(vm, result)

    def test_private(self, file: HostFile):
        with load_user(program_that_reads(kind=PRIVATE), file) as vm:
            result = run_while(vm, lambda: os.ftruncate(file.fd, PAGE))
            assert_bus_error(vm, result)

    def test_one_of_several_processes(self, file: HostFile):
        """Whoever runs then: each has its own bus error."""
        program = Program().syscall(MMAP, AT, N_PAGES * PAGE, READ_WRITE, SHARED | FIXED, 3, 0)
        child = Program()
        read_forever(child, is_write=False)
        program.fork(child)
        read_forever(program, is_write=True)
        with load_user(program, file) as vm:
            result = run_while(vm, lambda: os.ftruncate(file.fd, PAGE), after_s=0.2)
            assert_bus_error(vm, result)
            assert len(vm.processes) == 2
            for process in vm.processes:
                assert process.mm.pmas.find(AT + (N_PAGES - 1) * PAGE) is None

    def test_cut_by_us_while_it_runs(self, file: HostFile, scaled: Callable[[int], int]):
        """Its own thread may be too late to notice, or first: neither is an error of KVM's."""
        for n in range(scaled(30)):
            file.truncate(N_PAGES * PAGE)
            with load_user(program_that_reads(), file) as vm:
                result = run_while(vm, lambda: file.truncate(PAGE), after_s=0.002 + n * 1e-4)
                assert_bus_error(vm, result)

    def test_a_file_that_is_long_again_is_read_on(self, file: HostFile):
        with load_user(program_that_reads(), file) as vm:
            assert vm.run(timeout=0.05).outcome == "deadline"
            os.ftruncate(file.fd, PAGE)
            os.ftruncate(file.fd, N_PAGES * PAGE)
            assert vm.run(timeout=0.05).outcome == "deadline"
            assert vm.vcpu.regs.rcx == 0

    @pytest.mark.parametrize("is_write", [False, True])
    def test_before_there_is_a_slot(self, file: HostFile, *, is_write: bool):
        """The access is to be made by hand then: not by touching what would end the host."""
        program = Program().syscall(MMAP, AT, N_PAGES * PAGE, READ_WRITE, SHARED | FIXED, 3, 0)
        read_forever(program.syscall(CUT), is_write=is_write)

        def cut(process: Process, _args: object) -> int:
            process.mm.populate(AT, N_PAGES * PAGE)
            os.ftruncate(file.fd, PAGE)
            return 0

        with load_user(program, file, lazy_slots=True) as vm:
            vm.on_syscall(CUT, cut)
            assert_bus_error(vm, vm.run(timeout=TIMEOUT))

    def test_the_deadline_holds(self, file: HostFile, monkeypatch: pytest.MonkeyPatch):
        """However often a file seems to have been cut."""
        with load_user(program_that_reads(), file) as vm:
            assert vm.run(timeout=0.05).outcome == "deadline"
            os.ftruncate(file.fd, PAGE)
            monkeypatch.setattr(vm, "_revalidate_files", lambda: True)
            assert vm.run(timeout=0.1).outcome == "deadline"
            monkeypatch.undo()
            assert_bus_error(vm, vm.run(timeout=TIMEOUT))

    def test_what_cannot_be_read_for_another_reason(
        self, file: HostFile, monkeypatch: pytest.MonkeyPatch
    ):
        with load_user(program_that_reads(), file) as vm:
            assert vm.run(timeout=0.05).outcome == "deadline"
            os.ftruncate(file.fd, PAGE)
            monkeypatch.setattr(file, "revalidate", lambda: False)
            with pytest.raises(IoctlError, match="none of the files") as caught:
                vm.run(timeout=TIMEOUT)
            assert (caught.value.ioctl, caught.value.errno) == ("KVM_RUN", errno.EFAULT)
            monkeypatch.undo()
            # Nothing is lost by it.
            assert_bus_error(vm, vm.run(timeout=TIMEOUT))


@pytest.mark.parametrize("ring", [0, 3])
class TestMicroVm:
    @pytest.fixture(params=[False, True], ids=["shared", "private"])
    def loaded(
        self, file: HostFile, ring: int, request: pytest.FixtureRequest
    ) -> Iterator[MicroVM]:
        with load_kernel(file, ring, private=request.param) as vm:
            yield vm

    def test_by_somebody_else(self, loaded: MicroVM, file: HostFile):
        result = run_while(loaded, lambda: os.ftruncate(file.fd, PAGE))
        assert_bus_error(loaded, result)

    def test_by_us(self, loaded: MicroVM, file: HostFile):
        result = run_while(loaded, lambda: file.truncate(PAGE))
        assert_bus_error(loaded, result)
