"""A guest kernel whose memory runs out, at every kind of access: it runs on once there is some.

Each access is made exactly once, to the byte, whatever has to be tried again for it.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables.pte import flags_of
from kvmmm.vmm.exit_handler import ExitHandler
from kvmmm.vmm.result import PAUSED
from tests.mm.hoard import Hoard
from tests.vmm.guest_run import TIMEOUT, describe, load_code
from tests.vmm.machine_code import Code
from tests.vmm.probe_guest import RING_3_ONLY, WRITES, Probe, apply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.safemem.ffi import MmioExit
    from kvmmm.vmm.microvm import MicroVM
    from kvmmm.vmm.result import RunResult

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(200)]

AT = 0x80_0000
EDGE = AT + PAGE_BYTES - 3
"""Three bytes in one page, the rest in the next; neither is there."""
VALUE = 0x1122_3344_5566_7788
SIZE_BYTES = 8 * PAGE_BYTES


def is_known(ring: int, op: str) -> bool:
    return bool(ring) or op not in RING_3_ONLY


EACH_OP = pytest.mark.parametrize(
    ("ring", "op"),
    [(ring, op) for ring in (0, 3) for op in (*WRITES, "load") if is_known(ring, op)],
)


@pytest.fixture
def ring() -> int:
    return 3


@pytest.fixture
def probe(ring: int) -> Iterator[Probe]:
    with Probe(ring, memory="32M", arena="14M") as made:
        made.do("pop", 0)  # the stack is there
        yield made


@pytest.fixture
def hoard(probe: Probe) -> Iterator[Hoard]:
    with Hoard(probe.vm.arena) as made:
        yield made


def check(vm: MicroVM) -> None:
    vm.mm.check_invariants()
    statistics = vm.statistics()
    assert statistics.adds_up, statistics.as_dict()


def assert_exhausted(vm: MicroVM, result: RunResult) -> None:
    assert result.outcome == "memory", describe(result)
    assert "guest memory is exhausted" in result.report
    assert result.exit_code == 72
    check(vm)


def run_on(vm: MicroVM, hoard: Hoard, result: RunResult, n_pages: int = 1) -> tuple[RunResult, int]:
    """Run on, giving pages each time that memory has run out; says how often that was."""
    n_times = 0
    while result.outcome == "memory":
        assert_exhausted(vm, result)
        n_times += 1
        assert n_times < 5000
        hoard.give(n_pages)
        result = vm.run(timeout=TIMEOUT)
    return result, n_times


def memory_of(vm: MicroVM) -> bytes:
    return vm.mm.read(AT, SIZE_BYTES)


def after(op: str, at: int, before: bytes = bytes(SIZE_BYTES)) -> bytearray:
    model = bytearray(before)
    if op != "load":
        apply(model, op, at, VALUE)
    return model


class TestOneAccess:
    @EACH_OP
    def test_page_by_page(self, probe: Probe, hoard: Hoard, op: str):
        """Also across a page's end, where one half of it has been made when memory runs out."""
        hoard.take_all()
        result, n_times = run_on(probe.vm, hoard, probe.do(op, EDGE, VALUE))
        assert result.outcome == PAUSED, describe(result)
        assert n_times == (1 if op in {"store8", "store16"} else 2)
        hoard.give_all()
        assert memory_of(probe.vm) == after(op, EDGE - AT)
        if op == "load":
            assert probe.vm.vcpu.regs.rax == 0
        check(probe.vm)

    @EACH_OP
    def test_as_long_as_there_is_none_it_ends_at_once(self, probe: Probe, hoard: Hoard, op: str):
        hoard.take_all()
        result = probe.do(op, EDGE, VALUE)
        for _ in range(5):
            assert_exhausted(probe.vm, result)
            result = probe.vm.run(timeout=TIMEOUT)
        hoard.give_all()
        result = probe.vm.run(timeout=TIMEOUT)
        assert result.outcome == PAUSED, describe(result)
        assert memory_of(probe.vm) == after(op, EDGE - AT)

    @EACH_OP
    def test_copy_on_write(self, probe: Probe, hoard: Hoard, op: str):
        probe.vm.mm.mmap(HUGE_PAGE_BYTES, addr=AT, fixed=True, replace=True, pure_data=True)
        contents = random.Random(op).randbytes(SIZE_BYTES)
        probe.vm.mm.copy_out(AT, contents)
        with probe.fork() as child:
            assert child.load(EDGE) == probe.load(EDGE)
            hoard.take_all()
            result, n_times = run_on(child.vm, hoard, child.do(op, EDGE, VALUE))
            assert result.outcome == PAUSED, describe(result)
            assert (n_times > 0) == (op != "load")
            assert memory_of(child.vm) == after(op, EDGE - AT, contents)
            assert memory_of(probe.vm) == contents
            check(child.vm)
            check(probe.vm)

    def test_what_the_host_does_meanwhile(self, probe: Probe, hoard: Hoard):
        """It may back the page itself, and fill it: the access finds what is there then."""
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do("add", AT, 5))
        hoard.give(1)
        probe.vm.mm.copy_out(AT, struct.pack("<Q", 100))
        assert probe.vm.run(timeout=TIMEOUT).outcome == PAUSED
        assert probe.vm.mm.read(AT, 8) == struct.pack("<Q", 105)

    @pytest.mark.parametrize("op", ["load", "store", "add", "avx"])
    def test_what_is_unmapped_meanwhile_is_a_fault(self, probe: Probe, hoard: Hoard, op: str):
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do(op, AT, 5))
        probe.vm.mm.munmap(AT, PAGE_BYTES)
        result = probe.vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.addr) == ("fault", AT), describe(result)
        check(probe.vm)
        with pytest.raises(StateError, match="has ended"):
            probe.vm.run(timeout=TIMEOUT)

    def test_a_stop_is_not_lost(self, probe: Probe, hoard: Hoard):
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do("store", AT, 5))
        probe.vm.stop()
        assert_exhausted(probe.vm, probe.vm.run(timeout=TIMEOUT))
        hoard.give(1)
        assert probe.vm.run(timeout=TIMEOUT).outcome == "stopped"
        assert probe.vm.mm.read(AT, 8) == struct.pack("<Q", 5)
        assert probe.vm.run(timeout=TIMEOUT).outcome == PAUSED

    @pytest.mark.parametrize("is_made", [False, True])
    def test_an_interrupted_try_is_made_again(
        self, probe: Probe, hoard: Hoard, is_made: bool, monkeypatch: pytest.MonkeyPatch
    ):
        """Ctrl-C while it is served; also when it has been, and KVM does not know yet."""
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do("add", AT, 5))
        hoard.give_all()
        complete = ExitHandler._complete

        def interrupt(handler: ExitHandler, exit_: MmioExit, access: int) -> None:
            if is_made:
                complete(handler, exit_, access)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ExitHandler, "_complete", interrupt)
            with pytest.raises(KeyboardInterrupt):
                probe.vm.run(timeout=TIMEOUT)
        assert probe.vm.run(timeout=TIMEOUT).outcome == PAUSED
        assert probe.vm.mm.read(AT, 8) == struct.pack("<Q", 5)
        check(probe.vm)


class TestDefaultIdt:
    """A #PF for which there is no memory: reported where it was, and raised again."""

    def test_page_fault(self, probe: Probe, hoard: Hoard):
        probe.vm.stop()
        probe.vm.run(timeout=TIMEOUT)
        tables = probe.vm.area.tables
        assert tables is not None
        tables.map(AT, PAGE_BYTES, AT, flags_of(READ, user=True))
        hoard.take_all()
        result = probe.do("store", AT, 5)
        for _ in range(5):
            assert_exhausted(probe.vm, result)
            assert result.addr == AT
            assert "ring 3" in result.report
            result = probe.vm.run(timeout=TIMEOUT)
        tables.map(AT, PAGE_BYTES, AT, flags_of(READ_WRITE, user=True))
        result, n_times = run_on(probe.vm, hoard, result)
        assert result.outcome == PAUSED, describe(result)
        assert n_times == 1
        assert probe.vm.mm.read(AT, 8) == struct.pack("<Q", 5)
        assert probe.vm.statistics().page_faults >= 5
        check(probe.vm)


class TestFork:
    @EACH_OP
    def test_there_is_room_again(self, probe: Probe, hoard: Hoard, op: str):
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do(op, EDGE, VALUE))
        hoard.give_all()
        with probe.fork() as child:
            for side in (child, probe):
                result = side.vm.run(timeout=TIMEOUT)
                assert result.outcome == PAUSED, describe(result)
                assert memory_of(side.vm) == after(op, EDGE - AT)
                check(side.vm)
            child.store(AT, 1)
            assert memory_of(probe.vm) == after(op, EDGE - AT)

    @EACH_OP
    def test_there_is_none(self, probe: Probe, hoard: Hoard, op: str):
        """Neither for the access, nor, with that, for the copy: refused, and no harm done."""
        hoard.take_all()
        assert_exhausted(probe.vm, probe.do(op, EDGE, VALUE))
        for n_given in (0, 1, 1, 8):
            hoard.give(n_given)
            with pytest.raises(ArenaExhaustedError):
                probe.vm.fork()
            check(probe.vm)
        hoard.give_all()
        with probe.fork() as child:
            for side in (child, probe):
                result = side.vm.run(timeout=TIMEOUT)
                assert result.outcome == PAUSED, describe(result)
                assert memory_of(side.vm) == after(op, EDGE - AT)

    def test_while_a_breakpoint_is_waited_for(
        self, probe: Probe, hoard: Hoard, monkeypatch: pytest.MonkeyPatch
    ):
        """Memory may run out within that moment; what was printed before it is not lost."""
        monkeypatch.setattr("kvmmm.vmm.fork.may_hide_breakpoint", lambda *_args: True)
        code = Code().ring3().mov("rbx", AT).out8(0xE9, ord("x")).inc_at("rbx").exit(0)
        with load_code(code, memory="32M", arena="14M") as vm, Hoard(vm.arena) as own:
            vm.mm.populate((32 << 20) - PAGE_BYTES, PAGE_BYTES)  # its stack
            own.take_all()
            for _ in range(2):
                with pytest.raises(ArenaExhaustedError):
                    vm.fork()
                check(vm)
            own.give_all()
            result = vm.run(timeout=TIMEOUT)
            assert (result.outcome, result.console) == ("exited", b"x"), describe(result)
            assert vm.mm.read(AT, 1) == b"\x01"
        hoard.give_all()
        assert probe.vm.run(timeout=TIMEOUT).outcome == PAUSED


N_PAGES = 400


class TestManyPages:
    """A guest that adds to the first word of each page, once."""

    # addq $5, (%rbx); the same by fild, fistp, which KVM does not emulate
    BODIES = ("48 83 03 05", "df 2b df 3b 48 83 03 05 df 2b df 3b")

    def guest(self, body: str, n_pages: int) -> Code:
        code = Code().ring3().mov("rbx", AT).mov("rcx", n_pages)
        loop = code.here
        code.raw(body).add("rbx", PAGE_BYTES).dec("rcx").jump_back_unless_zero(loop)
        return code.exit(0)

    def words(self, vm: MicroVM, n_pages: int) -> list[int]:
        return [struct.unpack("<Q", vm.mm.read(AT + n * PAGE_BYTES, 8))[0] for n in range(n_pages)]

    @pytest.mark.parametrize("body", BODIES)
    @pytest.mark.parametrize(("n_pages", "n_given"), [(50, 1), (N_PAGES, 30)])
    def test_a_hog(self, body: str, n_pages: int, n_given: int, scaled: Callable[[int], int]):
        n_pages = scaled(n_pages)
        with load_code(self.guest(body, n_pages), memory="32M", arena="16M") as vm:
            with Hoard(vm.arena) as hoard:
                hoard.take_all()
                hoard.give(2)
                result, n_times = run_on(vm, hoard, vm.run(timeout=TIMEOUT), n_given)
                assert result.ok, describe(result)
                assert n_times >= n_pages // n_given // 2
                check(vm)
            assert self.words(vm, n_pages) == [5] * n_pages

    def test_what_the_host_frees_may_be_the_guests_own(self, scaled: Callable[[int], int]):
        """Dropped behind its back, where it does not look any more."""
        n_pages = scaled(N_PAGES)
        with load_code(self.guest(self.BODIES[0], n_pages), memory="32M", arena="16M") as vm:
            with Hoard(vm.arena) as hoard:
                hoard.take_all()
                hoard.give(12)
                n_times = 0
                while (result := vm.run(timeout=TIMEOUT)).outcome == "memory":
                    assert_exhausted(vm, result)
                    assert result.addr is not None
                    vm.mm.madvise(AT, result.addr - AT, 4)  # MADV_DONTNEED
                    n_times += 1
                assert result.ok, describe(result)
                assert n_times >= n_pages // 12 - 1
                check(vm)
            words = self.words(vm, n_pages)
            assert set(words) <= {0, 5}
            assert words[-1] == 5
