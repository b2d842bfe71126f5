"""Programs whose memory runs out, at every kind of moment: they stop, and go on once there is some.

A program's own operations are the witness: it increments each word once, so whatever is done twice,
or not at all, shows.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ
from tests.mm.hoard import Hoard
from tests.vmm.guest_run import TIMEOUT, describe
from tests.vmm.user_program import FORK, MMAP, YIELD, Program, load_program

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.result import RunResult
    from kvmmm.vmm.user_vm import UserVM

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(200)]

PAGE = 4096
RW, ANON, POPULATE = 3, 0x22, 0x8000
N_PAGES = 700
BASE = 0x2000_0000
TELL = 1000
"""A system call of the tests' own."""


def mmap_at_base(program: Program, flags: int = ANON, n_pages: int = N_PAGES) -> Program:
    """Map pages at BASE, and leave their address in rbx."""
    fixed = 0x10
    return program.syscall(MMAP, BASE, n_pages * PAGE, RW, flags | fixed, -1, 0).mov("rbx", BASE)


def touch(program: Program, n_pages: int = N_PAGES, by: int = 1) -> Program:
    """Add `by` to the first word of each page from BASE on."""
    program.mov("rbx", BASE).mov("rcx", n_pages)
    loop = program.here
    program.raw(bytes([0x48, 0x83, 0x03, by]))  # add qword [rbx], by
    return program.add("rbx", PAGE).dec("rcx").jump_back_unless_zero(loop)


def words(mm: Any, n_pages: int = N_PAGES) -> list[int]:
    """The first word of each page from BASE on."""
    data = mm.read(BASE, n_pages * PAGE)
    return [struct.unpack_from("<Q", data, i * PAGE)[0] for i in range(n_pages)]


def check(vm: UserVM) -> None:
    managers = [process.mm for process in vm.processes]
    managers[0].check_invariants(managers[1:])


def run_while_it_lasts(vm: UserVM, hoard: Hoard, n_pages: int) -> tuple[RunResult, int]:
    """Run on, giving `n_pages` each time that memory has run out; says how often that was."""
    n_times = 0
    while (result := vm.run(timeout=TIMEOUT)).outcome == "memory":
        n_times += 1
        assert n_times < 2 * N_PAGES
        assert "guest memory is exhausted" in result.report
        assert result.addr is not None
        check(vm)
        hoard.give(n_pages)
    return result, n_times


@pytest.mark.parametrize(("n_pages", "n_given"), [(60, 1), (700, 20), (700, 100)])
def test_faults(n_pages: int, n_given: int, scaled: Callable[[int], int]):
    n_pages = scaled(n_pages)
    program = touch(mmap_at_base(Program()), n_pages).syscall(TELL).exit(7)
    seen: list[list[int]] = []
    with load_program(program) as vm, Hoard(vm.arena) as hoard:
        vm.on_syscall(TELL, lambda process, _: seen.append(words(process.mm, n_pages)) or 0)  # type: ignore[func-returns-value]
        hoard.take_all()
        result, n_times = run_while_it_lasts(vm, hoard, n_given)
        assert (result.outcome, result.status) == ("exited", 7), describe(result)
        # Each page that is given serves a fault, or is a table of the way there.
        assert n_times >= n_pages // n_given // 2
        vm.mm.check_invariants()
    assert seen == [[1] * n_pages]


@pytest.mark.parametrize(("n_pages", "n_given"), [(60, 1), (700, 64)])
def test_copy_on_write(n_pages: int, n_given: int, scaled: Callable[[int], int]):
    """Both sides write what the other has as well; who comes first copies."""
    n_pages = scaled(n_pages)
    program = touch(mmap_at_base(Program()), n_pages)
    child = touch(Program(), n_pages, by=10).syscall(TELL).exit(0)
    program.fork(child).raw(touch(Program(), n_pages, by=5).bytes).syscall(TELL).exit(0)
    seen: dict[int, list[int]] = {}
    with load_program(program) as vm, Hoard(vm.arena) as hoard:

        def tell(process: Any, _args: object) -> int:
            seen[process.pid] = words(process.mm, n_pages)
            return 0

        def fork(process: Any, _args: object) -> Any:
            answer = vm.scheduler.fork(process)
            hoard.take_all()
            return answer

        vm.on_syscall(TELL, tell)
        vm.on_syscall(FORK, fork)
        result, n_times = run_while_it_lasts(vm, hoard, n_given)
        assert (result.outcome, result.status) == ("exited", 0), describe(result)
        assert n_times
        vm.mm.check_invariants()
    assert seen == {1: [6] * n_pages, 2: [11] * n_pages}


def test_fork():
    """Without room for a copy of what is pinned it fails, without a trace; later it does not."""
    n_pages = 4
    program = touch(mmap_at_base(Program(), n_pages=n_pages), n_pages)
    program.syscall(TELL).syscall(FORK).raw("49 89 c4").syscall(TELL + 1)  # mov r12, rax
    child = touch(Program(), n_pages, by=10).syscall(TELL + 2).exit(0)
    program.fork(child).syscall(YIELD).syscall(TELL + 2).exit_with("r12")
    seen: dict[int, list[int]] = {}
    with load_program(program) as vm, Hoard(vm.arena) as hoard:
        pins: list[Any] = []
        used: list[int] = []

        def take(process: Any, _args: object) -> int:
            pins.append(process.mm.pin_frames(BASE + PAGE, PAGE, READ))
            hoard.take_all()
            used.append(vm.arena.statistics().used_bytes)
            return 0

        def give(_process: Any, _args: object) -> int:
            used.append(vm.arena.statistics().used_bytes)
            check(vm)
            assert len(vm.processes) == 1
            hoard.give_all()
            return 0

        def tell(process: Any, _args: object) -> int:
            seen[process.pid] = words(process.mm, n_pages)
            return 0

        for number, call in enumerate((take, give, tell)):
            vm.on_syscall(TELL + number, call)
        result = vm.run(timeout=TIMEOUT)
        assert result.status == -errno.ENOMEM & 0xFF, describe(result)
        for pin in pins:
            pin.release()
    assert used[0] == used[1]
    assert sorted(seen.values()) == [[1] * n_pages, [11] * n_pages]


def test_populate():
    """MAP_POPULATE gives what there is, the faults that follow find none; the host is told."""
    n_pages = 64
    program = mmap_at_base(Program(), ANON | POPULATE, n_pages).syscall(TELL)
    touch(program, n_pages).syscall(TELL + 1).exit(0)
    seen: list[list[int]] = []
    with load_program(program) as vm, Hoard(vm.arena) as hoard:
        hoard.take_all()
        hoard.give(10)
        resident: list[int] = []

        def populate(process: Any, _args: object) -> int:
            resident.append(process.mm.rss_bytes)
            with pytest.raises(ArenaExhaustedError):
                process.mm.populate(BASE, n_pages * PAGE)
            check(vm)
            return 0

        vm.on_syscall(TELL, populate)
        vm.on_syscall(TELL + 1, lambda process, _: seen.append(words(process.mm, n_pages)) or 0)  # type: ignore[func-returns-value]
        before = vm.mm.rss_bytes
        result = vm.run(timeout=TIMEOUT)
        assert result.outcome == "memory", describe(result)
        assert before < resident[0] < before + 11 * PAGE
        hoard.give_all()
        vm.mm.populate(BASE, n_pages * PAGE)
        faults = vm.mm.counters.faults
        result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", 0), describe(result)
        assert vm.mm.counters.faults == faults
        vm.mm.check_invariants()
    assert seen == [[1] * n_pages]


def test_what_the_host_frees_may_be_the_programs_own():
    """The way out that a supervisor has: unmap what the program can do without."""
    program = touch(mmap_at_base(Program())).exit(9)
    with load_program(program, memory="8M") as vm, Hoard(vm.arena) as hoard:
        hoard.take_all()
        hoard.give(40)
        n_times = 0
        while (result := vm.run(timeout=TIMEOUT)).outcome == "memory":
            n_times += 1
            assert result.addr is not None
            vm.mm.munmap(BASE, result.addr - BASE)  # what it has done with
            vm.mm.check_invariants()
        assert (result.outcome, result.status) == ("exited", 9), describe(result)
        assert n_times > 10
