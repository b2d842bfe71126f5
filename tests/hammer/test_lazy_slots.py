"""Removal between an EPT violation and the access that the host makes by hand.

With `lazy_slots` the first access to a frame leaves the CPU after its tables were walked. Whatever
the host does to the page before it gets there has come first, or comes after the whole access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm.advice import MADV_DONTNEED
from kvmmm.vmm import result
from tests.hammer.guest import PAGE, POISON
from tests.vmm.guest_run import TIMEOUT
from tests.vmm.user_program import Program, load_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.vmm.user_vm import UserVM

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(120)]

AT, ELSEWHERE = 1 << 32, 2 << 32
VALUE = 0x1122_3344_5566_7788
STORE = Program().mov("rbx", AT).mov("rax", VALUE).store("rbx", "rax").exit(7)
LOAD = Program().mov("rbx", AT).load("rdi", "rbx").exit(None)


class Rig:
    """A VM whose program touches AT, and what the host does before that access is made.

    Attributes:
        fo: The frame that the CPU was led to.
    """

    def __init__(self, program: Program, host: Callable[[Rig], object]) -> None:
        self.vm: UserVM = load_program(program, memory="128M", lazy_slots=True)
        self.mm = self.vm.mm
        # Far from frames that have a slot.
        self.spare = [self.vm.arena.allocate(16 << 20)]
        self.mm.mmap(PAGE, READ_WRITE, addr=AT, fixed=True)
        self.mm.copy_out(AT, b"\x05")
        self.spare.append(self.vm.arena.allocate(PAGE))
        self.host = host
        self.fo = -1
        self._serve: Any = self.vm.vcpu.on_mmio
        self.vm.vcpu.on_mmio = self._on_mmio

    def _on_mmio(self, exit_: Any) -> object:
        if self.fo < 0:
            found = self.mm.pmas.find(AT)
            assert found is not None
            self.fo = AT + found[2].delta
            assert exit_.gpa == self.vm.physical.gpa_of(self.vm.arena, self.fo)
            self.host(self)
        return self._serve(exit_)

    def run(self) -> Any:
        done = self.vm.run(timeout=TIMEOUT)
        assert self.fo >= 0
        return done

    def poison_dropped(self) -> None:
        """The frame has a new owner."""
        arena = self.vm.arena
        try:
            self.spare.append(arena.allocate(PAGE, at=self.fo))
        except ArenaExhaustedError:
            return
        arena.view[self.fo : self.fo + PAGE] = POISON

    def frame(self) -> bytes:
        return bytes(self.vm.arena.view[self.fo : self.fo + 8])

    def close(self) -> None:
        for fr in self.spare:
            self.vm.arena.dec_ref(fr)
        self.vm.close()


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(program: Program, host: Callable[[Rig], object]) -> Rig:
        made.append(Rig(program, host))
        return made[-1]

    yield make
    for one in made:
        one.close()


def unmap(one: Rig) -> None:
    one.mm.munmap(AT, PAGE)
    one.poison_dropped()


def forget(one: Rig) -> None:
    one.mm.madvise(AT, PAGE, MADV_DONTNEED)
    one.poison_dropped()


def test_nothing_comes_in_between(rig: Callable[..., Rig]):
    one = rig(STORE, lambda _one: None)
    assert one.run().status == 7
    assert one.mm.read(AT, 8) == VALUE.to_bytes(8, "little")
    assert rig(LOAD, lambda _one: None).run().status == 5


@pytest.mark.parametrize("host", [unmap, forget])
def test_a_store_does_not_reach_a_dropped_frame(rig: Callable[..., Rig], host: Any):
    one = rig(STORE, host)
    assert one.run().status == 7
    assert one.frame() == POISON[:8]


@pytest.mark.parametrize("host", [unmap, forget])
def test_a_load_sees_no_poison(rig: Callable[..., Rig], host: Any):
    assert rig(LOAD, host).run().status == 0


def test_a_page_that_moves_takes_the_store_along(rig: Callable[..., Rig]):
    def move(one: Rig) -> None:
        one.mm.mremap(AT, PAGE, PAGE, may_move=True, new_addr=ELSEWHERE)

    one = rig(STORE, move)
    assert one.run().status == 7
    assert one.mm.read(ELSEWHERE, 8) == VALUE.to_bytes(8, "little")


def test_a_page_that_was_protected_is_not_written(rig: Callable[..., Rig]):
    one = rig(STORE, lambda one: one.mm.mprotect(AT, PAGE, READ))
    done = one.run()
    assert done.outcome == result.FAULT, done
    assert one.frame() == b"\x05".ljust(8, b"\0")
    one = rig(LOAD, lambda one: one.mm.mprotect(AT, PAGE, 0))
    assert one.run().outcome == result.FAULT


def test_a_fork_in_between_does_not_see_the_store(rig: Callable[..., Rig]):
    children = []

    def fork(one: Rig) -> None:
        space = one.vm._new_space()
        children.append((one.mm.fork(space), space))

    one = rig(STORE, fork)
    assert one.run().status == 7
    ((child, space),) = children
    assert child.read(AT, 8) == b"\x05".ljust(8, b"\0")
    assert one.mm.read(AT, 8) == VALUE.to_bytes(8, "little")
    child.close()
    space.release()


def test_an_instruction_that_is_run_again():
    """What KVM cannot emulate has its slots made, and is run again: by then the page is gone."""
    program = Program().mov("rbx", AT).raw("66 0f 38 17 03").exit(7)  # ptest xmm0, [rbx]
    vm = load_program(program, memory="128M", lazy_slots=True)
    try:
        spare = vm.arena.allocate(16 << 20)
        vm.mm.mmap(PAGE, READ_WRITE, addr=AT, fixed=True)
        vm.mm.copy_out(AT, b"\x05")
        serve: Any = vm.vcpu.on_cold
        n_cold = []

        def on_cold(reason: int) -> object:
            if not n_cold:
                vm.mm.munmap(AT, PAGE)
            n_cold.append(reason)
            return serve(reason)

        vm.vcpu.on_cold = on_cold
        done = vm.run(timeout=TIMEOUT)
        if not n_cold:
            pytest.skip("this KVM emulates it")
        assert done.outcome == result.FAULT, done
        vm.arena.dec_ref(FileRange(spare.start, spare.end))
    finally:
        vm.close()
