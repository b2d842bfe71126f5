"""What a mappable that is not ours raises within a system call: -errno, as from any file."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestConsoleError, IoctlError, SyscallError
from kvmmm.vmm.user_vm import UserVM
from tests.fakes import FakeFile, FakeMappable
from tests.vmm.guest_run import TIMEOUT, describe
from tests.vmm.user_program import DATA, FORK, MMAP, WRITE, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.result import RunResult

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]

PAGE = 4096
MREMAP = 25
FD = 3
TELL = 1000
"""A system call of the tests' own: what the one before it has answered."""


class Stubborn(FakeMappable):
    """Refuses, once it is told to.

    Attributes:
        failure: What it raises; None lets everything pass.
    """

    failure: BaseException | None = None

    def add_mapping(self, *args: Any, **kwargs: Any) -> None:
        if self.failure is not None:
            raise self.failure
        super().add_mapping(*args, **kwargs)

    def copy_mapping(self, *args: Any, **kwargs: Any) -> None:
        if self.failure is not None:
            raise self.failure
        super().copy_mapping(*args, **kwargs)


def map_it(program: Program) -> Program:
    return program.syscall(MMAP, DATA + (1 << 20), PAGE, 1, 0x11, FD, 0)


def told(program: Program) -> Program:
    return program.raw("48 89 c7").syscall(TELL)  # mov rdi, rax


def run(
    program: Program, prepare: Callable[[UserVM, Stubborn], object]
) -> tuple[RunResult, list[int]]:
    answers: list[int] = []
    mappable = Stubborn(FakeFile(1 << 20))
    with UserVM() as vm:
        vm.load(program.elf(), files={FD: mappable})

        def tell(_process: object, args: tuple[int, ...]) -> int:
            answers.append(args[0] - (1 << 64) if args[0] >> 63 else args[0])
            return 0

        vm.on_syscall(TELL, tell)
        prepare(vm, mappable)
        result = vm.run(timeout=TIMEOUT)
        vm.mm.check_invariants()
    return result, answers


def refusing(failure: BaseException) -> Callable[[UserVM, Stubborn], None]:
    def prepare(_vm: UserVM, mappable: Stubborn) -> None:
        mappable.failure = failure

    return prepare


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENXIO, "gone"), PermissionError(errno.EPERM, "sealed")]
)
@pytest.mark.npt
def test_mmap(failure: OSError):
    result, answers = run(told(map_it(Program())).exit(0), refusing(failure))
    assert result.ok, describe(result)
    assert answers == [-(failure.errno or 0)]


@pytest.mark.parametrize("number", [MREMAP, FORK])
def test_what_maps_it_again(number: int):
    program = map_it(Program()).syscall(TELL + 1)
    program.syscall(number, DATA + (1 << 20), PAGE, 2 * PAGE, 1, 0, 0)

    def prepare(vm: UserVM, mappable: Stubborn) -> None:
        # Something behind it: it has to move.
        def refuse(process: Any, _args: object) -> int:
            process.mm.mmap(PAGE, addr=DATA + (1 << 20) + PAGE, fixed=True)
            mappable.failure = OSError(errno.ENXIO, "gone")
            return 0

        vm.on_syscall(TELL + 1, refuse)

    result, answers = run(told(program).exit(0), prepare)
    assert result.ok, describe(result)
    assert answers == [-errno.ENXIO]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (IoctlError("KVM_SET_USER_MEMORY_REGION", "", errno.EINVAL), IoctlError),
        (OSError("without an errno"), OSError),
        (ZeroDivisionError("a defect"), ZeroDivisionError),
    ],
)
def test_a_defect_ends_the_run(failure: BaseException, expected: type[BaseException]):
    with pytest.raises(expected, match=str(failure.args[-1])[:10]):
        run(map_it(Program()).exit(0), refusing(failure))


def test_our_own_refusals_are_as_before():
    failure = SyscallError(errno.EACCES, "read-only")
    result, answers = run(told(map_it(Program())).exit(0), refusing(failure))
    assert (result.status, answers) == (0, [-errno.EACCES])


@pytest.mark.parametrize(
    "failure", [BrokenPipeError(errno.EPIPE, "nobody reads"), GuestConsoleError("full")]
)
def test_a_consoles_sink_is_no_mappable(failure: OSError):
    """What it raises is for whoever gave it to us."""

    def sink(_chunk: bytes) -> None:
        raise failure

    program = Program().syscall(WRITE, 1, DATA, 8).exit(0)
    with UserVM(console=sink) as vm:
        vm.load(program.elf())
        with pytest.raises(type(failure), match=str(failure.strerror)):
            vm.run(timeout=TIMEOUT)
