"""Pauses: every vCPU outside KVM_RUN, without Python on its thread noticing."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import IoExit, MmioExit, PauseGate, lib
from tests.platform.kvm.conftest import ABSENT, CODE, DATA, SECOND, STACK_TOP
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.platform.kvm.vcpu import Vcpu
    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(60)]

STOPPED, DEADLINE = -lib.KVMMM_STOP_REQUEST, -lib.KVMMM_STOP_DEADLINE
COUNT = Code().mov("rbx", DATA).inc_at("rbx").jump_back(10).bytes
"""Counts at DATA for ever."""


class Runner:
    """A thread that runs a vCPU; its result or exception is kept."""

    def __init__(self, vcpu: Vcpu, seconds: float = 30) -> None:
        self.vcpu = vcpu
        self.result: object = None
        self._seconds = seconds
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self.vcpu.run(int(self._seconds * SECOND))
        except BaseException as e:  # noqa: BLE001 - the test looks at it
            self.result = e

    def wait_until_in_guest(self) -> None:
        while not self.vcpu.in_guest:
            time.sleep(0.0005)

    def join(self) -> object:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.result

    def stop(self) -> object:
        self.vcpu.stop()
        return self.join()


def counter(one: Rig, addr: int = DATA) -> int:
    return int.from_bytes(one.memory[addr : addr + 8], "little")


def wait_for_progress(one: Rig, addr: int = DATA) -> None:
    before = counter(one, addr)
    deadline = time.monotonic() + 20
    while counter(one, addr) == before:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture
def counting(rig: MakeRig) -> Iterator[tuple[Rig, Runner]]:
    """A guest that counts in ring 3, on a thread."""
    one = rig(COUNT, 3)
    runner = Runner(one.vcpu)
    runner.wait_until_in_guest()
    yield one, runner
    if one.vcpu.thread_id:
        runner.stop()


class TestPause:
    def test_nothing_runs_within_it_and_all_goes_on_after_it(self, counting: tuple[Rig, Runner]):
        one, runner = counting
        for _ in range(20):
            wait_for_progress(one)
            with one.vm.paused():
                assert not one.vcpu.in_guest
                before = counter(one)
                time.sleep(0.002)
                assert counter(one) == before
        assert runner.stop() == STOPPED

    def test_python_on_the_vcpus_thread_does_not_notice(self, rig: MakeRig):
        one = rig(COUNT, 3)
        exits_before = one.vcpu.statistics()["exits"]
        runner = Runner(one.vcpu)
        runner.wait_until_in_guest()
        for _ in range(50):
            with one.vm.paused():
                pass
        assert runner.result is None
        assert one.vcpu.statistics()["exits"] == exits_before
        assert runner.stop() == STOPPED

    def test_pauses_nest_and_overlap(self, counting: tuple[Rig, Runner]):
        one, _ = counting
        gate = one.vm.paused()
        assert isinstance(gate, PauseGate)
        with one.vm.paused(), one.vm.paused():
            held, released = threading.Event(), threading.Event()

            def overlap() -> None:
                with one.vm.paused():
                    held.set()
                    released.wait(20)

            thread = threading.Thread(target=overlap)
            thread.start()
            assert held.wait(20)
            assert gate.n_pauses == 3
            before = counter(one)
        time.sleep(0.01)
        assert gate.n_pauses == 1
        assert counter(one) == before
        released.set()
        thread.join()
        wait_for_progress(one)

    def test_without_vcpus_and_with_none_that_runs(self, rig: MakeRig):
        with Vm() as vm, vm.paused():
            pass
        one = rig(Code().out32(0xB0).bytes)
        with one.vm.paused():
            pass
        assert isinstance(one.once(), IoExit)

    def test_an_exit_without_a_pause_is_refused(self):
        gate = PauseGate([])
        with pytest.raises(RuntimeError, match="no pause"):
            gate.__exit__(None, None, None)

    def test_a_vcpu_that_is_made_meanwhile_is_paused_too(self, rig: MakeRig):
        one = rig(COUNT, 3)
        with one.vm.paused():
            other = one.vm.create_vcpu()
            other.load_boot_state(one.layout)
            other.regs.rip, other.regs.rflags = CODE, 2
            runner = Runner(other)
            time.sleep(0.05)
            assert counter(one) == 0
        wait_for_progress(one)
        assert runner.stop() == STOPPED

    def test_from_a_handler_of_ones_own(self, rig: MakeRig):
        one = rig(Code().out32(0xB0).jump_back(0).bytes, 3)
        calls = []

        def handler(_exit: IoExit) -> object:
            with one.vm.paused(), one.vm.paused():
                calls.append(one.vcpu.in_guest)
            return "done" if len(calls) == 20 else None

        one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, handler)
        assert one.vcpu.run(30 * SECOND) == "done"
        assert calls == [False] * 20

    def test_closing_waits_for_no_pause(self, counting: tuple[Rig, Runner]):
        one, runner = counting
        with one.vm.paused():
            runner.stop()
            one.vm.close()


class TestEndsWithinAPause:
    def test_a_stop_is_answered(self, counting: tuple[Rig, Runner]):
        one, runner = counting
        with one.vm.paused():
            assert runner.stop() == STOPPED

    def test_a_stop_with_an_access_pending_completes_it_later(self, rig: MakeRig):
        code = Code().mov("rbx", ABSENT).load("rax", "rbx").out32(0xB0)
        one = rig(code.bytes, 3)
        paused = threading.Event()
        go = threading.Event()

        def handler(exit_: MmioExit) -> None:
            exit_.value = 0x77
            go.set()
            assert paused.wait(20)

        one.vcpu.on_mmio = handler
        runner = Runner(one.vcpu)
        assert go.wait(20)
        with one.vm.paused():
            paused.set()
            assert runner.stop() == STOPPED
        assert one.once().port == 0xB0
        assert one.vcpu.regs.rax == 0x77

    def test_the_deadline_is_answered(self, rig: MakeRig):
        one = rig(COUNT, 3)
        with one.vm.paused():
            assert Runner(one.vcpu, 0.08).join() == DEADLINE
        assert counter(one) == 0
        assert one.once(0.02) == DEADLINE
        assert counter(one) > 0

    def test_ones_own_run_within_ones_own_pause_ends_at_its_deadline(self, rig: MakeRig):
        one = rig(COUNT, 3)
        with one.vm.paused():
            assert one.once(0.08) == DEADLINE


def pause_at_random(one: Rig, addrs: list[int], n: int, seed: int, found: list[str]) -> None:
    rng = random.Random(seed)
    for _ in range(n):
        with one.vm.paused():
            if any(vcpu.in_guest for vcpu in one.vm.vcpus):
                found.append("in the guest")
            before = [counter(one, addr) for addr in addrs]
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.001)
            if [counter(one, addr) for addr in addrs] != before:
                found.append("a counter moved")
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.0005)


def test_two_vcpus_stand_still_whoever_pauses(rig: MakeRig, scaled: Callable[[int], int]):
    one = rig(COUNT, 3)
    addrs = [DATA, DATA + 0x1000]
    second = second_vcpu(one, Code().mov("rbx", addrs[1]).inc_at("rbx").jump_back(10).bytes)
    runners = [Runner(one.vcpu, 55), Runner(second, 55)]
    found: list[str] = []
    pausers = [
        threading.Thread(target=pause_at_random, args=(one, addrs, scaled(1000), seed, found))
        for seed in range(2)
    ]
    for thread in pausers:
        thread.start()
    for thread in pausers:
        thread.join()
    results = [runner.result for runner in runners]
    for addr in addrs if results == [None, None] else []:
        wait_for_progress(one, addr)
    assert [runner.stop() for runner in runners] == [STOPPED, STOPPED]
    assert results == [None, None]
    assert not found


def second_vcpu(one: Rig, code: bytes) -> Vcpu:
    """A vCPU more, in ring 3, with its own code and stack; it raises no exceptions."""
    at = CODE + 0x1000
    one.memory[at : at + len(code)] = code
    vcpu = one.vm.create_vcpu()
    for port in (0xB0, 0xB1):
        vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)
    vcpu.load_boot_state(one.layout)
    sregs = vcpu.get_sregs()
    vcpu.return_to_frame(sregs, rip=at, cs=0x33, rflags=2, rsp=STACK_TOP - 0x8000, ss=0x2B)
    return vcpu


def test_handlers_of_two_vcpus_pause_each_other(rig: MakeRig, scaled: Callable[[int], int]):
    one = rig(Code().out32(0xB0).jump_back(0).bytes, 3)
    second = second_vcpu(one, Code().out32(0xB0).jump_back(0).bytes)
    n = scaled(500)
    counts = {one.vcpu: 0, second: 0}

    def attach(vcpu: Vcpu) -> None:
        def handler(_port: int, _value: int) -> object:
            with one.vm.paused():
                counts[vcpu] += 1
            return "done" if counts[vcpu] == n else None

        vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_VALUE, handler)

    for vcpu in counts:
        attach(vcpu)
    assert [runner.join() for runner in [Runner(vcpu) for vcpu in counts]] == ["done", "done"]


def test_stops_are_not_lost_among_pauses(rig: MakeRig, scaled: Callable[[int], int]):
    one = rig(COUNT, 3)
    over = threading.Event()

    def pause() -> None:
        while not over.is_set():
            with one.vm.paused():
                pass

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        for n in range(scaled(200)):
            if n % 2:
                assert one.once(0.003) == DEADLINE
            else:
                runner = Runner(one.vcpu)
                assert runner.stop() == STOPPED
    finally:
        over.set()
        thread.join()
