"""Guest memory that is mapped, unmapped, protected and moved after the guest's first run."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import StateError
from kvmmm.hostarch.access import ANY_ACCESS, NO_ACCESS, READ, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.mm.advice import MADV_DONTNEED
from kvmmm.vmm.result import PAUSED, RunResult
from tests.vmm.guest_run import (
    COUNT,
    TIMEOUT,
    count_is_right,
    counting,
    describe,
    finish,
    load_code,
    run_code,
)
from tests.vmm.machine_code import BASE, Code
from tests.vmm.probe_guest import RET, Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

AT = 0x80_0000
NEXT = AT + PAGE_BYTES


@pytest.fixture(params=[0, 3], ids=["ring 0", "ring 3"])
def probe(request: pytest.FixtureRequest) -> Iterator[Probe]:
    with Probe(request.param, memory="32M") as made:
        yield made


def assert_fault(result: RunResult, addr: int, what: str) -> None:
    assert (result.outcome, result.addr) == ("fault", addr), describe(result)
    assert what in result.report.splitlines()[0], describe(result)


def mmap_at(probe: Probe, addr: int = AT, perms: int = READ_WRITE) -> None:
    probe.vm.mm.mmap(PAGE_BYTES, perms, addr=addr, fixed=True, replace=True, name="[again]")


@pytest.mark.npt
class TestBetweenRuns:
    def test_unmapped_is_a_fault_and_mapped_again_is_zero(self, probe: Probe):
        probe.store(AT, 0x1111)
        probe.store(NEXT, 0x2222)
        probe.vm.mm.munmap(AT, PAGE_BYTES)
        assert_fault(probe.ends_with("load", AT), AT, "read from 0x800000, where nothing is mapped")
        assert_fault(probe.ends_with("store", AT + 8), AT + 8, "write to 0x800008")
        assert probe.load(NEXT) == 0x2222
        n_allocated = probe.vm.mm.counters.allocated_bytes
        mmap_at(probe)
        assert probe.vm.mm.counters.allocated_bytes == n_allocated
        assert probe.load(AT) == 0
        assert probe.vm.mm.counters.allocated_bytes == n_allocated + PAGE_BYTES
        probe.store(AT + 16, 0x3333)
        assert probe.load(AT + 16) == 0x3333
        assert probe.load(NEXT) == 0x2222

    def test_read_only_and_back(self, probe: Probe):
        probe.store(AT, 0x1111)
        for _ in range(3):
            probe.vm.mm.mprotect(AT, PAGE_BYTES, READ)
            assert_fault(probe.ends_with("store", AT, 1), AT, "read-only")
            assert_fault(probe.ends_with("xadd", AT, 1), AT, "read-only")
            assert probe.load(AT) == 0x1111
            probe.store(NEXT, 5)
            probe.vm.mm.mprotect(AT, PAGE_BYTES, READ_WRITE)
            probe.store(AT + 8, 0x2222)
            assert (probe.load(AT), probe.load(AT + 8)) == (0x1111, 0x2222)

    def test_no_access_and_back(self, probe: Probe):
        probe.store(AT, 0x1111)
        probe.vm.mm.mprotect(AT, PAGE_BYTES, NO_ACCESS)
        assert_fault(probe.ends_with("load", AT), AT, "not readable")
        probe.vm.mm.mprotect(AT, PAGE_BYTES, READ)
        assert probe.load(AT) == 0x1111

    def test_execution_is_granted_and_taken_away(self, probe: Probe):
        probe.store(AT, RET)
        assert_fault(probe.ends_with("call", AT), AT, "not executable")
        for _ in range(2):
            probe.vm.mm.mprotect(AT, PAGE_BYTES, READ_EXECUTE)
            assert probe.do("call", AT).outcome == PAUSED
            probe.vm.mm.mprotect(AT, PAGE_BYTES, READ_WRITE)
            assert_fault(probe.ends_with("call", AT), AT, "not executable")
        mmap_at(probe, perms=ANY_ACCESS)
        probe.store(AT, RET)
        assert probe.do("call", AT).outcome == PAUSED

    def test_memory_that_moves(self, probe: Probe):
        to = 0x120_0000
        probe.store(AT, 0x1111)
        probe.vm.mm.munmap(to, HUGE_PAGE_BYTES)
        moved = probe.vm.mm.mremap(AT, PAGE_BYTES, PAGE_BYTES, may_move=True, new_addr=to)
        assert moved == to
        assert probe.load(to) == 0x1111
        assert_fault(probe.ends_with("load", AT), AT, "nothing is mapped")

    def test_memory_that_is_given_back(self, probe: Probe):
        probe.store(AT, 0x1111)
        probe.store(NEXT, 0x2222)
        probe.vm.mm.madvise(AT, PAGE_BYTES, MADV_DONTNEED)
        assert (probe.load(AT), probe.load(NEXT)) == (0, 0x2222)

    def test_page_0_stays_nobodys(self, probe: Probe):
        with pytest.raises(OSError, match="not within"):
            mmap_at(probe, 0)
        assert_fault(probe.ends_with("load", 0), 0, "nothing is mapped")


def test_a_page_here_and_there_takes_tables(scaled: Callable[[int], int]):
    """Many superpages split; then more than there is room for: said, and undone by undoing it."""
    n_split = scaled(300)
    with Probe(memory="1200M") as probe:
        mm = probe.vm.mm
        for n in range(n_split):
            mm.mprotect(AT + n * HUGE_PAGE_BYTES, PAGE_BYTES, READ)
        last = AT + (n_split - 1) * HUGE_PAGE_BYTES
        assert probe.load(last) == 0
        assert_fault(probe.ends_with("store", last), last, "read-only")
        for n in range(n_split, 580):
            mm.mprotect(AT + n * HUGE_PAGE_BYTES, PAGE_BYTES, READ)
        with pytest.raises(StateError, match="no page left for page tables"):
            probe.do("load", AT)
        mm.mprotect(last + HUGE_PAGE_BYTES, (580 - n_split) * HUGE_PAGE_BYTES, READ_WRITE)
        assert probe.load(AT) == 0
        probe.store(AT + 570 * HUGE_PAGE_BYTES, 1)
        assert_fault(probe.ends_with("store", last), last, "read-only")


class TestDuringARun:
    @pytest.mark.parametrize("ring", [0, 3])
    def test_by_a_handler(self, ring: int):
        """Unmapped and mapped, between two stores; the loads in between see zero."""
        code = Code().ring(ring).mov("rbx", AT).mov("rcx", 7)
        code.store("rbx", "rcx").out32(0xB0).load("rsi", "rbx").store("rbx", "rcx").out32(0xB1)
        with load_code(code.exit(0)) as vm:
            seen = []

            def remap(_port: int, _value: int) -> None:
                vm.mm.munmap(AT, PAGE_BYTES)
                vm.mm.mmap(PAGE_BYTES, addr=AT, fixed=True)

            vm.on_out(0xB0, remap, value_only=True)
            vm.on_out(0xB1, lambda _p, _v: seen.append(vm.vcpu.regs.rsi), value_only=True)
            result = vm.run(timeout=TIMEOUT)
            assert result.ok, describe(result)
            assert seen == [0]
            assert vm.mm.read(AT, 8) == b"\x07" + bytes(7)
            assert result.stats is not None
            assert result.stats.adds_up, result.stats.as_dict()

    @pytest.mark.parametrize("ring", [0, 3])
    def test_what_a_handler_grants_is_there_at_once(self, ring: int):
        """Tables that forbade it send a #PF by the default IDT: judged by the new ones."""
        code = Code().ring(ring).mov("rbx", AT).mov("rcx", RET).store("rbx", "rcx")
        code.out32(0xB0).call("rbx").exit(3)

        def prepare(vm: object) -> None:
            def grant(_port: int, _value: int) -> None:
                vm.mm.mprotect(AT, PAGE_BYTES, ANY_ACCESS)

            vm.on_out(0xB0, grant, value_only=True)

        result = run_code(code, prepare)
        assert (result.outcome, result.status) == ("exited", 3), describe(result)

    @pytest.mark.parametrize("ring", [0, 3])
    def test_execution_that_a_handler_takes_away(self, ring: int):
        code = Code().ring(ring).mov("rbx", AT).mov("rcx", RET).store("rbx", "rcx")
        code.call("rbx").out32(0xB0).load("rax", "rbx").call("rbx").exit(3)

        def prepare(vm: object) -> None:
            def take(_port: int, _value: int) -> None:
                vm.mm.mprotect(AT, PAGE_BYTES, READ)

            vm.mm.mprotect(AT, PAGE_BYTES, ANY_ACCESS)
            vm.on_out(0xB0, take, value_only=True)

        assert_fault(run_code(code, prepare), AT, "not executable")

    def test_by_another_thread(self, scaled: Callable[[int], int]):
        """A guest that counts into memory, which comes and goes under it."""
        rounds = scaled(300)
        with load_code(counting(Code().ring3(), Code().mov("rdi", AT).inc_at("rdi"))) as vm:
            results: list[RunResult] = []
            thread = threading.Thread(target=lambda: results.append(vm.run(timeout=TIMEOUT)))
            thread.start()
            try:
                for n in range(rounds):
                    vm.mm.mmap(PAGE_BYTES * (1 + n % 3), addr=AT, fixed=True, replace=True)
                    vm.mm.mprotect(NEXT, PAGE_BYTES, (READ, READ_WRITE)[n % 2])
                    if not n % 5:
                        vm.refresh_tables()
                    counted = int.from_bytes(vm.mm.read(AT, 8), "little")
                    assert counted <= int.from_bytes(vm.mm.read(COUNT, 8), "little") + 1
            finally:
                vm.stop()
                thread.join(TIMEOUT)
            assert results[0].outcome == "stopped", describe(results[0])
            count_is_right(vm)
            assert finish(vm).ok

    def test_a_guest_with_an_idt_of_its_own(self):
        """Then `refresh_tables` is for the host to call: the guest would get the #PF."""
        # lidt of an empty table: any exception is a triple fault.
        table = BASE + 0x800
        code = Code().mov("rbx", table).raw("0f 01 1b").ring3().mov("rbx", AT)
        code = code.mov("rcx", RET).store("rbx", "rcx").out32(0xB0).call("rbx").exit(3)

        def run(*, refreshes: bool) -> RunResult:
            with load_code(code.bytes.ljust(0x900, b"\0")) as vm:

                def grant(_port: int, _value: int) -> None:
                    vm.mm.mprotect(AT, PAGE_BYTES, ANY_ACCESS)
                    if refreshes:
                        vm.refresh_tables()

                vm.on_out(0xB0, grant, value_only=True)
                return vm.run(timeout=TIMEOUT)

        assert run(refreshes=True).status == 3
        assert run(refreshes=False).outcome == "shutdown"
