"""A MicroVM's life: made, loaded, run, closed; its limits; and what is left when a step fails."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

import kvmmm
from kvmmm.errors import (
    ImageError,
    KvmmmError,
    StateError,
)
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import RunResult
from tests.conftest import Footprint, wait_for_no_leak
from tests.vmm.elf_builder import tiny
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.safemem.ffi import IoExit

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]


def test_200_vms_leave_nothing_behind(footprint: Footprint, scaled: Callable[[int], int]):
    guests = [bundled.find(name).path for name in ("hello", "ro", "null")]
    images = [kvmmm.read_image(path, memory_bytes=64 << 20) for path in guests]
    with MicroVM("64M") as first:  # what a process keeps is there after the first
        first.load(images[0])
        first.run(timeout=TIMEOUT)
    before = Footprint()
    for n in range(scaled(200)):
        with MicroVM("64M") as one:
            one.load(images[n % 3])
            assert one.run(timeout=TIMEOUT).outcome == ("fault" if n % 3 else "exited")
        if n % 50 == 0:
            now = Footprint()
            assert (now.fds, now.mappings) == (before.fds, before.mappings)
    leaks = wait_for_no_leak(before)
    assert not leaks, leaks
    assert Footprint().fds == footprint.fds


def test_vms_that_nobody_closes_are_collected(footprint: Footprint):
    for _ in range(10):
        one = MicroVM("64M")
        one.load(Code().exit(0).bytes, base=BASE)
        assert one.run(timeout=TIMEOUT).ok
        del one
    gc.collect()
    leaks = wait_for_no_leak(footprint)
    assert not leaks, leaks


@pytest.mark.npt
@pytest.mark.usefixtures("no_leak")
def test_many_vms_at_a_time(scaled: Callable[[int], int]):
    vms = [load_code(Code().mov("rax", n).out32(0xB8), memory="4M") for n in range(scaled(64))]
    try:
        assert [one.run(timeout=TIMEOUT).status for one in vms] == list(range(len(vms)))
    finally:
        for one in vms:
            one.close()


class TestCalls:
    def test_run_before_load(self):
        with MicroVM("4M") as one, pytest.raises(StateError, match="call load"):
            one.run(timeout=1)

    def test_load_twice(self):
        with load_code(Code().exit(0)) as one:
            with pytest.raises(StateError, match="this VM has a guest"):
                one.load(Code().exit(1).bytes, base=BASE)
            assert one.run(timeout=TIMEOUT).status == 0

    @pytest.mark.parametrize("end", [Code().exit(0), Code().raw("f4"), Code().raw("0f 0b")])
    def test_run_after_the_guest_has_ended(self, end: Code):
        with load_code(end) as one:
            one.run(timeout=TIMEOUT)
            with pytest.raises(StateError, match="has ended"):
                one.run(timeout=TIMEOUT)

    @pytest.mark.parametrize(
        "call",
        [
            lambda one: one.run(timeout=1),
            lambda one: one.load(b"\xf4", base=BASE),
            lambda one: one.stop(),
            lambda one: one.on_out(0xB0, None),
            lambda one: one.statistics(),
        ],
        ids=["run", "load", "stop", "on_out", "statistics"],
    )
    @pytest.mark.parametrize("is_loaded", [False, True])
    def test_after_close(self, call: Callable[[MicroVM], object], is_loaded: bool):
        one = MicroVM("4M")
        if is_loaded:
            one.load(b"\xf4", base=BASE)
        one.close()
        one.close()
        with pytest.raises((StateError, ValueError)) as caught:
            call(one)
        assert "released" not in str(
            caught.value
        )  # who releases memoryviews is not the caller's care

    def test_a_rejected_image_leaves_a_vm_that_takes_another(self):
        with MicroVM("4M") as one:
            for image, why in ((b"", "empty"), (b"\x7fELF", "truncated"), (b"text", "ELF")):
                with pytest.raises(ImageError, match=why):
                    one.load(image)
            with pytest.raises(ImageError):
                one.load(Code().exit(0).bytes, base=1 << 40)
            one.load(Code().exit(0).bytes, base=BASE)
            assert one.run(timeout=TIMEOUT).ok

    @pytest.mark.usefixtures("no_leak")
    def test_a_closed_one_is_closed_by_with_too(self):
        with MicroVM("4M") as one:
            one.close()

    @pytest.mark.usefixtures("no_leak")
    def test_close_while_somebody_holds_guest_memory(self):
        one = MicroVM("4M")
        view = one.arena.view_of(one.area.file_range)
        with pytest.raises(StateError, match="still held"):
            one.close()
        view.release()
        one.close()

    def test_a_handler_that_answers_nonsense(self):
        with load_code(Code().out32(0xB0).exit(0)) as one:
            one.on_out(0xB0, lambda _port, _value: "nonsense", value_only=True)
            with pytest.raises(KvmmmError, match="'nonsense', which is no RunResult"):
                one.run(timeout=TIMEOUT)

    def test_a_handlers_exception_ends_the_guest(self):
        def handler(_exit: IoExit) -> None:
            raise LookupError("mine")

        with load_code(Code().out32(0xB0).exit(0)) as one:
            one.on_out(0xB0, handler)
            with pytest.raises(LookupError, match="mine"):
                one.run(timeout=TIMEOUT)
            with pytest.raises(StateError, match="has ended"):
                one.run(timeout=TIMEOUT)


class TestOnOut:
    @pytest.mark.npt
    def test_exits_with_values_registers_and_an_end(self):
        seen: list[tuple[Any, ...]] = []

        def handler(exit_: IoExit) -> RunResult | None:
            seen.append((exit_.port, exit_.value, one.vcpu.regs.r9))
            one.vcpu.regs.r9 += 5
            return RunResult("exited", status=3) if len(seen) == 3 else None

        code = Code().ring3().mov("r9", 10).mov("rax", 1)
        loop = code.here
        code.add("rax", 1).out32(0xB1).jump_back(loop)
        with load_code(code) as one:
            one.on_out(0xB1, handler)
            result = one.run(timeout=TIMEOUT)
        assert seen == [(0xB1, 2, 10), (0xB1, 3, 15), (0xB1, 4, 20)]
        assert (result.outcome, result.status) == ("exited", 3)

    def test_in_by_value_and_by_exit(self):
        def by_exit(exit_: IoExit) -> None:
            if not exit_.is_write:
                exit_.value = 0x22

        found: list[int] = []
        code = Code().ring3().mov("rax", 0).in8(0xB0).out32(0xB2).in8(0xB1).out32(0xB2)
        with load_code(code.exit(0)) as one:
            one.on_out(0xB0, lambda _port, value: 0x11 if value is None else None, value_only=True)
            one.on_out(0xB1, by_exit)
            one.on_out(0xB2, lambda _port, value: found.append(value), value_only=True)
            assert one.run(timeout=TIMEOUT).ok
        assert found == [0x11, 0x22]

    @pytest.mark.parametrize("port", [-1, 1 << 16])
    def test_a_port_has_16_bits(self, port: int):
        with MicroVM("4M") as one, pytest.raises(ValueError, match="no port"):
            one.on_out(port, None)

    def test_ring_3_may_use_open_ports_only(self):
        result = run_code(Code().ring3().out32(0xC0).exit(0))
        assert result.outcome == "exception", describe(result)
        assert "#GP" in result.report


def test_tiny_elf_of_the_loaders_tests_runs():
    """16 bytes of nop at TEXT, then nothing: it runs into the zeros of its page."""
    with MicroVM("4M") as one:
        one.load(tiny())
        result = one.run(timeout=1)
    assert result.outcome in {"fault", "deadline"}, describe(result)
