"""A whole VM forks: what both sides have, what each has for itself, and what is left behind."""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.safemem.ffi import ffi
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import EXITED, PAUSED, RunResult
from tests.vmm.guest_run import (
    COUNT,
    TIMEOUT,
    count_is_right,
    counting,
    describe,
    finish,
    load_code,
)
from tests.vmm.machine_code import BASE, Code
from tests.vmm.probe_guest import PORT, Probe, pause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

AT = 0x80_0000


def run_all(vms: list[MicroVM]) -> list[RunResult]:
    """Run VMs at the same time, each on a thread of its own."""
    results: dict[int, RunResult] = {}

    def run(n: int) -> None:
        results[n] = vms[n].run(timeout=TIMEOUT)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(vms))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[n] for n in range(len(vms))]


class TestTrees:
    """A guest kernel with two trees of page tables, its own IDT, and AVX in ring 3."""

    @pytest.fixture
    def parent(self, is_slow_machine: bool) -> Iterator[MicroVM]:
        size = "pages=8 rounds=3" if is_slow_machine else "pages=64 rounds=20"
        with MicroVM("32M") as vm:
            vm.load(bundled.find("trees").path, args=size.split())
            vm.on_out(PORT, pause, value_only=True)
            result = vm.run(timeout=TIMEOUT)
            assert result.outcome == PAUSED, describe(result)
            assert b"each tree keeps its own pages" in result.console
            yield vm

    def check(self, vms: list[MicroVM], results: list[RunResult]) -> None:
        for n, (vm, result) in enumerate(zip(vms, results, strict=True)):
            assert result.ok, describe(result)
            assert result.tests == (6, 0), describe(result)
            lines = result.console.decode().splitlines()
            assert f"trees: side {n}" in lines, lines
            assert sum(line.startswith("trees: side") for line in lines) == 1
            assert "PASS: each tree keeps its own pages" not in lines  # printed before the fork
            assert vm.statistics().adds_up

    def tell_sides(self, vms: list[MicroVM]) -> None:
        for n, vm in enumerate(vms):
            vm.vcpu.regs.rbx = n

    @pytest.mark.npt
    @pytest.mark.usefixtures("no_leak")
    def test_one_after_the_other(self, parent: MicroVM):
        with parent.fork() as child:
            vms = [parent, child]
            self.tell_sides(vms)
            self.check(vms, [vm.run(timeout=TIMEOUT) for vm in vms])

    @pytest.mark.npt
    def test_at_once(self, parent: MicroVM):
        with parent.fork() as child:
            vms = [parent, child]
            self.tell_sides(vms)
            self.check(vms, run_all(vms))

    @pytest.mark.npt
    def test_three_generations(self, parent: MicroVM):
        """Forked again, the fork forked; the first two are gone before the others run."""
        with parent.fork() as child, child.fork() as grandchild, parent.fork() as second:
            vms = [parent, child, grandchild, second]
            self.tell_sides(vms)
            self.check(vms[:2], run_all(vms[:2]))
            parent.close()
            child.close()
            for n, vm in enumerate(vms[2:]):
                vm.vcpu.regs.rbx = n
            self.check(vms[2:], run_all(vms[2:]))

    def test_a_child_forked_in_the_middle_of_its_rounds(self, parent: MicroVM):
        """Wherever a deadline happens to stop it: in ring 0, in ring 3, in an exception."""
        for n in range(12):
            with parent.fork() as child:
                if child.run(timeout=0.0005 * (n + 1)).outcome != "deadline":
                    continue
                try:
                    grandchild = child.fork()
                except StateError:
                    # It ended while a breakpoint was waited for.
                    assert child.run(timeout=TIMEOUT).ok
                    continue
                with grandchild:
                    results = run_all([child, grandchild])
                    assert all(result.ok for result in results), describe(results[1])
                    # Also from the middle of a line; what fork itself had printed is the parent's.
                    assert results[0].console.endswith(results[1].console)
        self.tell_sides([parent])
        self.check([parent], [parent.run(timeout=TIMEOUT)])


class TestState:
    def test_both_count_on_from_the_same_number(self):
        with load_code(counting(Code().ring3())) as parent:
            assert parent.run(timeout=0.05).outcome == "deadline"
            before = count_is_right(parent)
            with parent.fork() as child:
                assert count_is_right(child) == before
                assert [r.outcome for r in (child.run(timeout=0.05), parent.run(timeout=0.02))] == [
                    "deadline", "deadline",
                ]  # fmt: skip
                assert min(count_is_right(child), count_is_right(parent)) > before
                finish(child)
                assert parent.mm.read(COUNT + PAGE_BYTES, 8) == bytes(8)  # not told to end
                finish(parent)

    @pytest.mark.npt
    def test_every_part_of_the_cpu(self):
        with load_code(counting(Code().ring3())) as parent:
            parent.run(timeout=0.02)
            with parent.fork() as child:
                assert parent.vcpu.save_state().differences(child.vcpu.save_state()) == []

    def test_before_the_first_run(self):
        with load_code(Code().ring3().mov("rbx", AT).inc_at("rbx").exit(7)) as parent:
            parent.mm.copy_out(AT, b"\x05")
            with parent.fork() as child:
                assert child.run(timeout=TIMEOUT).status == 7
                assert child.mm.read(AT, 1) == b"\x06"
                assert parent.mm.read(AT, 1) == b"\x05"
            assert parent.run(timeout=TIMEOUT).status == 7

    def test_memory_that_was_remapped_before_and_is_remapped_after(self):
        with Probe(memory="32M") as parent:
            parent.store(AT, 1)
            parent.vm.mm.munmap(AT + PAGE_BYTES, PAGE_BYTES)
            parent.vm.mm.mmap(PAGE_BYTES, addr=AT + 2 * PAGE_BYTES, fixed=True, replace=True)
            with parent.fork() as child:
                shown = parent.vm.mm.smaps()
                assert child.vm.mm.smaps() == shown
                assert re.findall(r"Rss: +[1-9]", shown)  # something is there
                assert child.ends_with("load", AT + PAGE_BYTES).outcome == "fault"
                child.vm.mm.mmap(PAGE_BYTES, addr=AT + PAGE_BYTES, fixed=True)
                child.store(AT + PAGE_BYTES, 2)
                assert parent.ends_with("load", AT + PAGE_BYTES).outcome == "fault"
                assert (parent.load(AT), child.load(AT)) == (1, 1)

    def test_what_the_child_shall_not_have(self):
        with Probe(memory="32M") as parent:
            parent.vm.mm.mmap(PAGE_BYTES, addr=AT, fixed=True, replace=True, name="secret")
            parent.store(AT, 1)
            parent.vm.mm.madvise(AT, PAGE_BYTES, 10)  # MADV_DONTFORK
            with parent.fork() as child:
                result = child.do("load", AT)
                assert (result.outcome, result.addr) == ("fault", AT), describe(result)
            assert parent.load(AT) == 1

    def test_shared_memory_stays_shared(self):
        with Probe(memory="32M") as parent:
            parent.vm.mm.mmap(
                HUGE_PAGE_BYTES, READ_WRITE, addr=AT, fixed=True, replace=True, private=False
            )
            parent.store(AT, 1)
            with parent.fork() as child, child.fork() as grandchild:
                grandchild.store(AT + 8, 2)
                assert [side.load(AT + 8) for side in (parent, child, grandchild)] == [2, 2, 2]
                parent.store(AT + PAGE_BYTES, 3)  # a page that nobody had touched
                assert child.load(AT + PAGE_BYTES) == 3
                parent.vm.close()
                assert grandchild.load(AT) == 1

    def test_untouched_memory_is_not_copied(self):
        with Probe(memory="1G") as parent:
            parent.store(900 << 20, 1)
            resident = resident_bytes(parent.vm)
            with parent.fork() as child:
                assert child.load(900 << 20) == 1
                assert resident_bytes(parent.vm) < 2 * resident + HUGE_PAGE_BYTES


def resident_bytes(vm: MicroVM) -> int:
    return os.fstat(vm.arena.fd).st_blocks * 512


class TestConsole:
    def test_output_that_was_not_handed_on_is_the_parents(self):
        with load_code(counting(Code().ring3())) as parent:
            parent.run(timeout=0.02)
            # As a guest that has put a line into the ring, and was stopped before it rang.
            console = ffi.cast("struct kvmmm_console *", parent.area.hva)
            with parent.arena.view_of(parent.area.file_range) as area:
                area[0x10000:0x10004] = b"half"
            console.out_head = 4
            with parent.fork() as child:
                assert finish(child).console == b""
                assert finish(parent).console == b"half"

    def test_sinks_of_their_own(self):
        code = Code().out8(0xE9, ord("a")).out32(PORT).out8(0xE9, ord("b")).exit(0)
        seen: list[tuple[str, bytes]] = []
        with load_code(code, console=lambda chunk: seen.append(("parent", chunk))) as parent:
            parent.on_out(PORT, pause, value_only=True)
            assert parent.run(timeout=TIMEOUT).outcome == PAUSED
            with parent.fork(console=lambda chunk: seen.append(("child", chunk))) as child:
                assert child.run(timeout=TIMEOUT).ok
                assert parent.run(timeout=TIMEOUT).ok
        assert seen == [("parent", b"a"), ("child", b"b"), ("parent", b"b")]

    @pytest.mark.parametrize("has_ended_input", [False, True])
    def test_inputs_of_their_own(self, has_ended_input: bool):
        ours, theirs = os.pipe(), os.pipe()
        try:
            with MicroVM("32M", console_input=None if has_ended_input else ours[0]) as parent:
                parent.load(bundled.find("echo").path)
                if not has_ended_input:
                    assert parent.run(timeout=0.3).outcome == "deadline"  # it waits for input
                with parent.fork(console_input=theirs[0]) as child:
                    os.write(ours[1], b"to the parent\n")
                    os.write(theirs[1], b"to the child\n")
                    for end in (ours[1], theirs[1]):
                        os.close(end)
                    result = child.run(timeout=TIMEOUT)
                    assert result.outcome == EXITED, describe(result)
                    assert b"to the child" in result.console
                    result = parent.run(timeout=TIMEOUT)
                    assert (b"to the parent" in result.console) == (not has_ended_input)
        finally:
            for end in (ours[0], theirs[0]):
                os.close(end)


class TestRefused:
    def test_nothing_is_loaded(self):
        with MicroVM("4M") as vm, pytest.raises(StateError, match="nothing is loaded"):
            vm.fork()

    def test_closed(self):
        with load_code(Code().exit(0)) as vm:
            vm.close()
            with pytest.raises(StateError, match="closed"):
                vm.fork()

    def test_ended(self):
        with load_code(Code().exit(0)) as vm:
            assert vm.run(timeout=TIMEOUT).ok
            with pytest.raises(StateError, match="has ended"):
                vm.fork()

    def test_while_it_runs(self):
        """From a handler, and from another thread."""
        errors: list[BaseException] = []

        def try_to_fork(vm: MicroVM) -> None:
            with pytest.raises(StateError) as caught:
                vm.fork()
            errors.append(caught.value)

        with load_code(Code().out32(PORT).exit(0)) as vm:

            def handler(_port: int, _value: int) -> None:
                try_to_fork(vm)
                thread = threading.Thread(target=try_to_fork, args=(vm,))
                thread.start()
                thread.join()

            vm.on_out(PORT, handler, value_only=True)
            assert vm.run(timeout=TIMEOUT).ok
        assert ["running" in str(error) for error in errors] == [True, True]


def used_bytes(vm: MicroVM) -> int:
    statistics = vm.arena.statistics()
    return statistics.used_bytes + statistics.reserved_bytes


class TestNothingIsLeft:
    @pytest.mark.usefixtures("no_leak")
    def test_twenty_children(self, scaled: Callable[[int], int]):
        with Probe(memory="16M") as parent:
            parent.store(AT, 1)
            parent.vm.mm.mmap(
                PAGE_BYTES, addr=2 * AT - PAGE_BYTES, fixed=True, replace=True, pure_data=True
            )
            parent.store(2 * AT - PAGE_BYTES, 1)
            before = used_bytes(parent.vm)
            for n in range(scaled(20)):
                with parent.fork() as child:
                    child.store(AT, n + 2)
                    child.store(2 * AT - PAGE_BYTES, n + 2)
                assert used_bytes(parent.vm) == before
            assert (parent.load(AT), parent.load(2 * AT - PAGE_BYTES)) == (1, 1)

    @pytest.mark.usefixtures("no_leak")
    def test_closed_in_any_order(self):
        for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
            parent = Probe(memory="16M")
            parent.store(AT, 1)
            child = parent.fork()
            family = [parent, child, child.fork()]
            for n in order:
                assert family[n].load(AT) == 1
                family[n].vm.close()
            assert parent.vm.arena.fd < 0

    @pytest.mark.usefixtures("no_leak")
    def test_an_arena_without_room(self):
        """Wherever it ends, the parent is whole, and can fork once there is room."""
        outcomes = set()
        for arena in range(12, 60, 2):
            with Probe(memory="16M", arena=f"{arena}M") as parent:
                parent.store(AT, 1)
                parent.store(AT + 3 * HUGE_PAGE_BYTES, 2)
                before = used_bytes(parent.vm)
                children = []
                try:
                    while len(children) < 3:
                        children.append(parent.fork())
                    outcomes.add("room")
                except ArenaExhaustedError:
                    outcomes.add(f"after {len(children)}")
                for child in children:
                    child.store(AT, 3)
                    assert child.load(AT + 3 * HUGE_PAGE_BYTES) == 2
                    child.vm.close()
                assert used_bytes(parent.vm) == before
                parent.vm.mm.check_invariants()
                assert (parent.load(AT), parent.load(AT + 3 * HUGE_PAGE_BYTES)) == (1, 2)
                assert parent.vm.arena.capacity_bytes == arena << 20
                if children:
                    parent.fork().vm.close()
        assert {"room", "after 0", "after 1"} <= outcomes

    @pytest.mark.usefixtures("no_leak")
    @pytest.mark.parametrize("step", ["create_vcpu", "copy_to", "load_state"])
    def test_whatever_fails(self, step: str, monkeypatch: pytest.MonkeyPatch):
        from kvmmm.platform.kvm.vcpu import Vcpu
        from kvmmm.platform.kvm.vm import Vm
        from kvmmm.vmm.system_area import SystemArea

        def fail(*_args: object) -> None:
            raise OSError(5, "as if the host had refused")

        with Probe(memory="16M") as parent:
            parent.store(AT, 1)
            before = used_bytes(parent.vm)
            owner = {"create_vcpu": Vm, "copy_to": SystemArea, "load_state": Vcpu}[step]
            monkeypatch.setattr(owner, step, fail)
            with pytest.raises(OSError, match="as if"):
                parent.vm.fork()
            monkeypatch.undo()
            assert used_bytes(parent.vm) == before
            with parent.fork() as child:
                assert (child.load(AT), parent.load(AT)) == (1, 1)

    def test_an_image_is_shared_by_its_symbols_too(self):
        with load_code(Code().raw("0f 0b").bytes) as parent, parent.fork() as child:
            result = child.run(timeout=TIMEOUT)
            assert result.outcome == "exception"
            assert f"at {BASE:#x}" in result.report
