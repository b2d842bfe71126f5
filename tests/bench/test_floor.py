"""The floors do the same as the product: otherwise there is nothing to divide by."""

from __future__ import annotations

import pytest

from kvmmm.bench import floor
from kvmmm.bench.guest import (
    MARK_END,
    MARK_START,
    WORK_PORT,
    BenchmarkError,
    guest_at_start,
    guest_path,
)
from kvmmm.safemem.ffi import ffi, lib
from kvmmm.vmm.microvm import MicroVM

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60), pytest.mark.usefixtures("no_leak")]


def test_a_floor_counts_the_exits_from_mark_to_mark() -> None:
    with guest_at_start("bench_pio", "n=12", "mark=4") as vm:
        times, n_exits = floor.run_exits(vm, WORK_PORT, MARK_START, 3)

    assert n_exits == 3 * 5
    assert len(times) == 3
    assert all(taken_ns > 0 for taken_ns in times)


def test_a_floor_ends_at_an_exit_that_it_does_not_expect() -> None:
    with (
        guest_at_start("bench_pio", "n=12", "mark=4") as vm,
        pytest.raises(BenchmarkError, match="kvmmm_floor_exits"),
    ):
        floor.run_exits(vm, MARK_END, MARK_START, 1)


def test_a_guest_that_never_exits_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "_TIMEOUT_NS", 50_000_000)
    words = ("mode=lines", "bytes=64", "mark=1", "after=spin")

    with (
        guest_at_start("bench_console", *words) as vm,
        pytest.raises(BenchmarkError, match="timed out"),
    ):
        floor.run_exits(vm, lib.KVMMM_PORT_DOORBELL, MARK_END, 1)


def test_a_bulk_floor_copies_what_the_guest_left() -> None:
    copy = ffi.new("uint8_t[]", 128)
    with guest_at_start("bench_console", "mode=raw", "bytes=128", "line=64", "mark=1") as vm:
        shared_hva = vm.area.hva + 0x10000
        assert floor.run_bulk(vm, WORK_PORT, copy, shared_hva, 128) > 0

    text = bytes(ffi.buffer(copy))
    assert text.startswith(b"abcdefghijklmnopqrstuvwxyzabcdef")
    assert text[63] == text[127] == ord("\n")


def test_a_machine_starts_and_goes_as_often_as_one_likes() -> None:
    path = guest_path("bench_first")
    with MicroVM("64M") as model:
        model.load(path)
        assert model.run(timeout=10).ok
        machine = floor.MachineFloor(model, path, lib.KVMMM_PORT_EXIT)

    for _ in range(3):
        taken_ns = machine.start()
        steps = machine.steps()
        assert machine.close() > 0
        assert set(steps) == set(floor.STEPS)
        assert 0 < sum(steps.values()) <= taken_ns


def test_a_machine_that_does_not_start_leaves_nothing_behind() -> None:
    path = guest_path("bench_first")
    with MicroVM("64M") as model:
        model.load(path)
        assert model.run(timeout=10).ok
        machine = floor.MachineFloor(model, path, MARK_END)  # not the port that it uses

    with pytest.raises(BenchmarkError, match="kvmmm_floor_start"):
        machine.start()
