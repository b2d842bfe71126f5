"""Several vCPUs on several threads, each with its own ticks, deadline and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.safemem.ffi import IoExit, lib
from tests.platform.kvm.conftest import DATA, SECOND
from tests.platform.kvm.test_pause import COUNT, Runner, second_vcpu, wait_for_progress
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Rig

    MakeRig = Callable[..., Rig]

pytestmark = [pytest.mark.kvm, pytest.mark.npt, pytest.mark.timeout(60)]

STOPPED, DEADLINE = -lib.KVMMM_STOP_REQUEST, -lib.KVMMM_STOP_DEADLINE
COUNT_TOO = Code().mov("rbx", DATA + 0x1000).inc_at("rbx").jump_back(10).bytes


@pytest.mark.parametrize("vms", [1, 2])
class TestTwo:
    def make(self, rig: MakeRig, vms: int) -> list[tuple[Rig, int]]:
        """(rig, index of its vCPU) of two vCPUs, in one VM or in two."""
        one = rig(COUNT, 3)
        if vms == 2:
            return [(one, 0), (rig(COUNT, 3), 0)]
        second_vcpu(one, COUNT_TOO)
        return [(one, 0), (one, 1)]

    def test_each_has_its_own_deadline(self, rig: MakeRig, vms: int):
        both = [one.vm.vcpus[n] for one, n in self.make(rig, vms)]
        for seconds in ((0.02, 0.2), (0.2, 0.02), (0.06, 0.06)):
            runners = [Runner(vcpu, s) for vcpu, s in zip(both, seconds, strict=True)]
            assert [runner.join() for runner in runners] == [DEADLINE, DEADLINE]

    def test_each_has_its_own_stop(self, rig: MakeRig, vms: int):
        both = [one.vm.vcpus[n] for one, n in self.make(rig, vms)]
        for first, second in ((0, 1), (1, 0)):
            runners = [Runner(vcpu) for vcpu in both]
            assert runners[first].stop() == STOPPED
            assert runners[second].result is None
            assert both[second].thread_id != 0
            assert runners[second].stop() == STOPPED

    def test_each_has_its_own_ticks(self, rig: MakeRig, vms: int):
        both = [one.vm.vcpus[n] for one, n in self.make(rig, vms)]
        runners = [Runner(vcpu, 0.4) for vcpu in both]
        assert [runner.join() for runner in runners] == [DEADLINE, DEADLINE]
        for vcpu in both:
            assert vcpu.statistics()["interrupted"] >= 2

    def test_both_make_progress_through_exits(self, rig: MakeRig, vms: int):
        pairs = self.make(rig, vms)
        calls = [0, 0]

        def handler(n: int) -> Callable[[int, int], object]:
            def count(_port: int, _value: int) -> object:
                calls[n] += 1
                return "done" if calls[n] == 300 else None

            return count

        for n, (one, index) in enumerate(pairs):
            vcpu = one.vm.vcpus[index]
            at = vcpu.regs.rip
            one.memory[at : at + 7] = Code().out32(0xB0).jump_back(0).bytes
            vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_VALUE, handler(n))
        runners = [Runner(one.vm.vcpus[index]) for one, index in pairs]
        assert [runner.join() for runner in runners] == ["done", "done"]
        assert calls == [300, 300]


class TestCtrlC:
    @pytest.mark.parametrize("hits", ["the process", "the other thread"])
    @pytest.mark.parametrize("pausing", [False, True])
    def test_ends_the_main_threads_run_only(self, rig: MakeRig, hits: str, pausing: bool):
        one = rig(COUNT, 3)
        other = Runner(second_vcpu(one, COUNT_TOO))
        other.wait_until_in_guest()
        over = threading.Event()

        def pause() -> None:
            while pausing and not over.is_set():
                with one.vm.paused():
                    pass

        def interrupt() -> None:
            while not one.vcpu.in_guest:
                time.sleep(0.001)
            if hits == "the process":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                _tgkill(other.vcpu.thread_id, signal.SIGINT)

        threads = [threading.Thread(target=target) for target in (pause, interrupt)]
        for thread in threads:
            thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                one.vcpu.run(30 * SECOND)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not one.vcpu.handler_failed  # it can go on
        wait_for_progress(one, DATA + 0x1000)
        assert other.result is None
        assert other.stop() == STOPPED
        assert one.once(0.01) == DEADLINE


def _tgkill(thread_id: int, signo: int) -> None:
    ident = next(t.ident for t in threading.enumerate() if t.native_id == thread_id)
    assert ident is not None
    signal.pthread_kill(ident, signo)


def test_two_vcpus_share_memory(rig: MakeRig, scaled: Callable[[int], int]):
    """Atomic increments of one word by both: none is lost."""
    n = scaled(200_000)

    def code() -> bytes:
        # lock inc qword [rbx]
        made = Code().mov("rbx", DATA).mov("rcx", n)
        loop = made.here
        return made.raw("f0 48 ff 03").dec("rcx").jump_back_unless_zero(loop).out32(0xB0).bytes

    one = rig(code(), 3)
    second = second_vcpu(one, code())
    runners = [Runner(vcpu) for vcpu in (one.vcpu, second)]
    assert all(isinstance(runner.join(), IoExit) for runner in runners)
    assert int.from_bytes(one.memory[DATA : DATA + 8], "little") == 2 * n
