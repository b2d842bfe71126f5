"""New roots: which page tables a vCPU walks, from any thread, while it runs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import ANY_ACCESS
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import flags_of
from kvmmm.safemem.ffi import lib
from tests.platform.kvm.conftest import CODE, DATA, MEMORY, SECOND
from tests.platform.kvm.test_pause import Runner, counter
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(60)]

STOPPED, DEADLINE = -lib.KVMMM_STOP_REQUEST, -lib.KVMMM_STOP_DEADLINE
ROOTS_AT = 0x3_0000
WINDOW = 0x4000_0000_00
"""Guest-virtual; each root maps it to another page."""
PAGES = (0x12_0000, 0x12_1000)


def make_root(one: Rig, at: int, page: int) -> int:
    """Tables that map memory as it is, and WINDOW to `page`."""
    tables = PageTables(MemoryTableAllocator(12, at, one.memory[at : at + 12 * 4096]))
    tables.map(0, MEMORY, 0, flags_of(ANY_ACCESS, user=True))
    tables.map(WINDOW, 4096, page, flags_of(ANY_ACCESS, user=True))
    return tables.root_gpa


@pytest.fixture
def two_roots(rig: MakeRig) -> tuple[Rig, list[int]]:
    """A guest that copies WINDOW's first word to DATA for ever; and two roots."""
    code = Code().mov("rbx", WINDOW).mov("rcx", DATA).load("rax", "rbx").store("rcx", "rax")
    one = rig(code.jump_back(20).bytes, 3)
    for n, page in enumerate(PAGES):
        one.memory[page : page + 8] = (100 + n).to_bytes(8, "little")
    return one, [make_root(one, ROOTS_AT + n * 12 * 4096, page) for n, page in enumerate(PAGES)]


class TestSetRoot:
    def test_before_the_first_run(self, two_roots: tuple[Rig, list[int]]):
        one, roots = two_roots
        for n, root in ((0, roots[0]), (1, roots[1]), (1, roots[1])):
            one.vcpu.set_root(root)
            assert one.once(0.02) == DEADLINE
            assert counter(one) == 100 + n
            assert one.vcpu.get_sregs().cr3 == root

    def test_while_it_runs(self, two_roots: tuple[Rig, list[int]], scaled: Callable[[int], int]):
        one, roots = two_roots
        one.vcpu.set_root(roots[0])
        runner = Runner(one.vcpu)
        for n in range(scaled(200)):
            one.vcpu.set_root(roots[n % 2])
            # The next store may still be of what was loaded before the switch; no later one.
            deadline = time.monotonic() + 20
            while counter(one) != 100 + n % 2:
                assert time.monotonic() < deadline
            if n % 10 == 0:
                time.sleep(0.0005)
                assert counter(one) == 100 + n % 2
        assert runner.stop() == STOPPED

    def test_the_old_root_is_not_used_after_it(self, two_roots: tuple[Rig, list[int]]):
        """The page behind the old root may change at once."""
        one, roots = two_roots
        one.vcpu.set_root(roots[0])
        runner = Runner(one.vcpu)
        runner.wait_until_in_guest()
        one.vcpu.set_root(roots[1])
        deadline = time.monotonic() + 20
        while counter(one) != 101:  # the store of what it had loaded before is over
            assert time.monotonic() < deadline
        one.memory[PAGES[0] : PAGES[0] + 8] = (666).to_bytes(8, "little")
        for _ in range(200):
            assert counter(one) == 101
        assert runner.stop() == STOPPED

    def test_from_its_own_handler(self, two_roots: tuple[Rig, list[int]]):
        one, roots = two_roots
        code = Code().mov("rbx", WINDOW).load("rax", "rbx").out32(0xB0).jump_back(10).bytes
        one.memory[CODE : CODE + len(code)] = code
        one.start(CODE, 3)
        seen: list[int] = []

        def handler(_port: int, value: int) -> object:
            seen.append(value)
            one.vcpu.set_root(roots[len(seen) % 2])
            return "done" if len(seen) == 10 else None

        one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_VALUE, handler)
        one.vcpu.set_root(roots[0])
        assert one.vcpu.run(30 * SECOND) == "done"
        assert seen == [100, 101] * 5

    def test_a_boot_state_brings_its_own_root(self, two_roots: tuple[Rig, list[int]]):
        one, roots = two_roots
        one.vcpu.set_root(roots[0])
        one.start(CODE, 3)
        assert one.vcpu.get_sregs().cr3 == one.layout.root_gpa
        one.vcpu.set_root(roots[0])  # not taken for the same as before
        assert one.once(0.02) == DEADLINE
        assert one.vcpu.get_sregs().cr3 == roots[0]

    def test_two_threads_set_roots(
        self, two_roots: tuple[Rig, list[int]], scaled: Callable[[int], int]
    ):
        one, roots = two_roots
        one.vcpu.set_root(roots[0])
        runner = Runner(one.vcpu)

        def switch(n: int) -> None:
            for _ in range(scaled(300)):
                one.vcpu.set_root(roots[n])
                with one.vm.paused():
                    pass

        threads = [threading.Thread(target=switch, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.vcpu.set_root(roots[1])
        assert runner.stop() == STOPPED
        assert one.vcpu.get_sregs().cr3 == roots[1]

    @pytest.mark.parametrize(
        ("gpa", "error"), [(1, ValueError), (-1, OverflowError), ("0", TypeError)]
    )
    def test_what_no_root_is(self, rig: MakeRig, gpa: object, error: type[Exception]):
        with pytest.raises(error):
            rig(b"").vcpu.set_root(gpa)  # type: ignore[arg-type]
