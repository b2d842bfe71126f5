"""GuestPhysical: windows and slots, on a kernel that only keeps slots."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.guest_physical import GuestPhysical, ViolationError
from kvmmm.segment import SegmentSet
from tests.platform.kvm.user_rig import HUGE, PAGE, WholeFile, as_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.platform.kvm.conftest import Kernel

GIB = 1 << 30
START = 4 * GIB
HVA = 0x7000_0000_0000


def slots(kernel: Kernel) -> list[tuple[int, int, int, int]]:
    return sorted(kernel.slots.values())


class TestWindows:
    def test_the_arena_begins_at_4_gib(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical()
        assert slots(kernel) == [(START, 64 << 20, physical.arena.hva, 0)]
        assert physical.gpa_of(physical.arena, 0x5000) == START + 0x5000
        window = physical.window_at(START + (64 << 20) - 1)
        assert window is not None
        assert window.file is physical.arena
        assert physical.window_at(START + (64 << 20)) is None
        assert physical.window_at(START - 1) is None

    def test_others_come_above_it_aligned(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical()
        small, large = WholeFile(HVA, 3 * PAGE), WholeFile(HVA // 2, GIB + PAGE)
        assert physical.gpa_of(as_file(small), PAGE) == START + GIB + PAGE
        assert physical.gpa_of(as_file(large), 0) == START + 2 * GIB
        assert physical.gpa_of(as_file(small), 0) == START + GIB
        assert slots(kernel)[1:] == [
            (START + GIB, 3 * PAGE, HVA, 0),
            (START + 2 * GIB, GIB + PAGE, large.hva, 0),
        ]
        third = WholeFile(HVA, PAGE)
        assert physical.gpa_of(as_file(third), 0) == START + 4 * GIB

    def test_a_file_that_cannot_be_written_has_readonly_slots(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical()
        file = WholeFile(HVA, PAGE)
        file.writable = False
        physical.gpa_of(as_file(file), 0)
        assert slots(kernel)[1] == (START + GIB, PAGE, HVA, abi.KVM_MEM_READONLY)

    def test_a_huge_file_has_few_slots(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical()
        physical.gpa_of(as_file(WholeFile(HVA, 200 * GIB)), 0)
        assert [length >> 30 for _, length, _, _ in slots(kernel)[1:]] == [64, 64, 64, 8]

    @pytest.mark.parametrize("closed", [False, True])
    def test_a_window_is_used_again(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel, closed: bool
    ):
        physical = make_physical()
        files = [WholeFile(HVA + n * GIB, PAGE) for n in range(3)]
        for file in files:
            physical.gpa_of(as_file(file), 0)
        if closed:
            files[1].hva = 0
        else:
            physical.forget(as_file(files[1]))
            physical.forget(as_file(files[1]))
        assert physical.gpa_of(as_file(WholeFile(HVA, PAGE)), 0) == START + 2 * GIB
        assert physical.vm.n_pauses == 1  # type: ignore[attr-defined]
        assert len(kernel.slots) == 4

    def test_no_room(self, make_physical: Callable[..., GuestPhysical], kernel: Kernel):
        physical = make_physical(physical_bits=36)
        physical.gpa_of(as_file(WholeFile(HVA, 58 * GIB)), 0)
        with pytest.raises(MmError, match=r"no room .* end at 0x1000000000") as caught:
            physical.gpa_of(as_file(WholeFile(HVA, 2 * GIB)), 0)
        assert caught.value.errno == errno.ENOMEM
        assert physical.gpa_of(as_file(WholeFile(HVA, GIB)), 0) == 63 * GIB
        assert len(kernel.slots) == 3

    def test_slots_run_out(self, make_physical: Callable[..., GuestPhysical], kernel: Kernel):
        physical = make_physical(limit=3)
        physical.gpa_of(as_file(WholeFile(HVA, PAGE)), 0)
        with pytest.raises(MmError, match="memslots"):
            physical.gpa_of(as_file(WholeFile(HVA, PAGE)), 0)
        assert len(kernel.slots) == 2
        physical.zap()  # for which there is always one left


class TestZap:
    def test_a_slot_comes_and_goes_where_no_memory_is(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical()
        gone: list[tuple[int, int, int, int]] = []
        before = dict(kernel.slots)
        kernel.on_delete = lambda: gone.extend(
            kernel.slots[n] for n in kernel.slots.keys() - before
        )
        physical.zap()
        assert kernel.slots == before
        assert [(gpa < START, length) for gpa, length, _, _ in gone] == [(True, PAGE)]
        assert (physical.n_zaps, physical.vm.n_pauses) == (1, 0)  # type: ignore[attr-defined]

    def test_or_all_of_them_do(self, make_physical: Callable[..., GuestPhysical], kernel: Kernel):
        physical = make_physical()
        before = slots(kernel)
        physical.replace_slots()
        assert slots(kernel) == before
        assert physical.vm.n_pauses == 1  # type: ignore[attr-defined]


class TestLazySlots:
    def test_nothing_is_registered_before(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        make_physical(lazy_slots=True)
        assert slots(kernel) == []

    def test_chunks_double_where_one_follows_another(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True, limit=64)
        physical.arena.allocate(64 << 20)
        at = START
        while at < START + (64 << 20):
            physical.serve_violation(at + 5, READ)
            at = max(gpa + length for gpa, length, _, _ in slots(kernel))
        assert [length >> 20 for _, length, _, _ in slots(kernel)] == [2, 4, 8, 16, 32, 2]
        assert physical.n_violations == 6

    def test_at_random_they_are_small_and_never_overlap(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True, limit=64)
        physical.arena.allocate(64 << 20)
        for n in (9, 3, 30, 4, 2, 9, 31, 0):
            physical.serve_violation(START + n * HUGE + 77, WRITE)
        covered: SegmentSet[int] = SegmentSet()
        for gpa, length, hva, _ in kernel.slots.values():
            assert hva - physical.arena.hva == gpa - START
            covered.insert(gpa, gpa + length, hva)
        assert all(covered.find(START + n * HUGE) for n in (0, 2, 3, 4, 9, 30, 31))
        assert not covered.find(START + 20 * HUGE)

    def test_few_slots_make_large_chunks(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True, limit=6)
        physical.arena.allocate(64 << 20)
        for n in (31, 0, 16, 8, 24, 4, 12, 20):
            physical.serve_violation(START + n * HUGE, READ)
        assert len(kernel.slots) <= 5

    def test_a_slot_that_is_there_by_now_is_normal(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True)
        physical.arena.allocate(PAGE)
        for _ in range(2):
            physical.serve_violation(START, READ_WRITE)
        assert len(kernel.slots) == 1

    def test_what_no_table_can_lead_to(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True)
        physical.arena.allocate(PAGE)
        for gpa, why in (
            (START + PAGE, "nobody owns the frame at offset 0x1000"),
            (START + GIB, "no file has its window there"),
            (0x1000, "no file has its window there"),
        ):
            with pytest.raises(ViolationError, match=why) as caught:
                physical.serve_violation(gpa, WRITE)
            assert (caught.value.gpa, caught.value.access) == (gpa, WRITE)
        file = WholeFile(HVA, PAGE)
        file.writable = False
        gpa = physical.gpa_of(as_file(file), 0)
        with pytest.raises(ViolationError, match="reading only"):
            physical.serve_violation(gpa, WRITE)
        physical.serve_violation(gpa, READ)
        assert slots(kernel) == [(gpa, PAGE, HVA, abi.KVM_MEM_READONLY)]

    def test_tables_are_never_missing(
        self, make_physical: Callable[..., GuestPhysical], kernel: Kernel
    ):
        physical = make_physical(lazy_slots=True)
        gpas = [physical.frames.allocate()[0] for _ in range(40)]
        for gpa in gpas:
            assert physical.vm.memslots.find(gpa) is not None
        assert len(set(gpas)) == 40
        assert slots(kernel) == [(START, HUGE, physical.arena.hva, 0)]

    def test_completing_needs_the_slot(self, make_physical: Callable[..., GuestPhysical]):
        physical = make_physical(lazy_slots=True)
        exit_ = SimpleNamespace(gpa=START + 8, size_bytes=8, is_write=True)
        with pytest.raises(GuestFaultError) as caught:
            physical.complete(exit_)  # type: ignore[arg-type]
        assert (caught.value.addr, caught.value.access) == (START + 8, WRITE)


class TestTableFrames:
    def test_a_table_that_comes_back_is_handed_out_empty(
        self, make_physical: Callable[..., GuestPhysical]
    ):
        physical = make_physical()
        frames = physical.frames
        gpa, entries = frames.allocate()
        assert entries.tolist() == [0] * 512
        assert frames.entries(gpa) is entries
        entries[7] = 1
        frames.free(gpa)
        again, entries = frames.allocate()
        assert (again, entries[7], frames.n_tables) == (gpa, 0, 1)
        fo = gpa - START
        entries[3] = 0x1234
        assert physical.arena.view[fo + 24 : fo + 26].tobytes() == b"\x34\x12"
        assert frames.table_hva_delta == (physical.arena.hva - START) % (1 << 64)

    def test_a_tight_arena_gives_single_pages_and_a_stock_is_kept(
        self, make_physical: Callable[..., GuestPhysical]
    ):
        physical = make_physical()
        arena, frames = physical.arena, physical.frames
        arena.allocate(64 << 20)
        pages = range(5, 4000, 400)
        for n in pages:
            arena.dec_ref(FileRange(n * PAGE, (n + 1) * PAGE))
        got = {frames.allocate()[0] for _ in range(2)}
        with pytest.raises(ArenaExhaustedError):
            frames.allocate()
        with frames.urgent():
            got |= {frames.allocate()[0] for _ in range(7)}
            with pytest.raises(ArenaExhaustedError):
                frames.allocate()
        with frames.urgent(last=True):
            got.add(frames.allocate()[0])
            with pytest.raises(ArenaExhaustedError):
                frames.allocate()
        assert got == {START + n * PAGE for n in pages}
        assert frames.n_tables == 10
        # What comes back is the stock again, first of all.
        for gpa in sorted(got)[:9]:
            frames.free(gpa)
        frames.allocate()
        with pytest.raises(ArenaExhaustedError):
            frames.allocate()

    def test_everything_goes_back_to_the_arena(self, make_physical: Callable[..., GuestPhysical]):
        physical = make_physical()
        for _ in range(100):
            physical.frames.allocate()
        assert physical.arena.statistics().used_bytes == 112 * PAGE
        physical.close()
        physical.close()
        statistics = physical.arena.statistics()
        assert (statistics.used_bytes, statistics.reserved_bytes) == (0, 0)
