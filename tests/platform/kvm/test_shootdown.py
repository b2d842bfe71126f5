"""Shootdowns: which way is chosen and what it does, with fakes; and the trial on a running vCPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, KvmmmError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.platform.kvm import page_table_space, shootdown, shootdown_trial
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.platform.kvm.shootdown import merged
from kvmmm.platform.kvm.shootdown_trial import Proven
from tests.platform.kvm.user_rig import HUGE, PAGE, FakeVm, ar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.platform.kvm.conftest import Kernel

ALL = {"dontneed": True, "zap": True, "root": True, "is_nested": False}
AT = 0x4000_0000


class FakeVcpu:
    """Keeps its root."""

    def __init__(self) -> None:
        self.roots: list[int] = []

    def set_root(self, gpa: int) -> None:
        self.roots.append(gpa)


class Bench:
    """Spaces without KVM; every madvise and every zap is noted, in order, as is every root.

    Attributes:
        events: ("drop", file offset, length), "zap", or "root".
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, arena_bytes: int, **proven: bool) -> None:
        self.events: list[Any] = []
        self.arena = Arena(arena_bytes)
        vm: Any = FakeVm(32, 40)
        vm.device.cpuid.has_giant_pages = True
        self.physical = GuestPhysical(vm, self.arena)
        self.proven = Proven(**(ALL | proven))
        self.spaces: list[PageTableAddressSpace] = []
        monkeypatch.setattr(page_table_space, "proven_on", lambda _device: self.proven)
        monkeypatch.setattr(shootdown, "drop_pages", self._drop)
        monkeypatch.setattr(self.physical, "zap", self._zap)
        monkeypatch.setattr(self.physical, "replace_slots", self._zap)

    def _drop(self, hva: int, length: int) -> None:
        self.events.append(("drop", hva - self.arena.hva, length))

    def _zap(self) -> None:
        self.physical.n_zaps += 1
        self.events.append("zap")

    def space(self, *, loaded: bool = True, **options: Any) -> PageTableAddressSpace:
        space = PageTableAddressSpace(self.physical, **options)
        self.spaces.append(space)
        if loaded:
            space.activate(FakeVcpu())  # type: ignore[arg-type]
        return space

    def take(self) -> list[Any]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        for space in self.spaces:
            space.release()
            space.release()
        assert not self.physical.loaded
        assert self.physical.n_pages == 0
        self.physical.close()
        self.arena.close()


@pytest.fixture
def make(
    kernel: Kernel,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*, arena_bytes: int = 64 << 20, **proven: bool) -> Bench:
        made.append(Bench(monkeypatch, arena_bytes, **proven))
        return made[-1]

    yield make
    for one in made:
        one.close()


def fr(first_page: int, n_pages: int = 1) -> FileRange:
    return FileRange(first_page * PAGE, (first_page + n_pages) * PAGE)


@pytest.mark.parametrize(
    ("runs", "want"),
    [
        ([], []),
        ([(8, 2)], [(8, 2)]),
        ([(8, 2), (4, 2), (6, 2)], [(4, 6)]),
        ([(8, 2), (4, 2), (4, 1), (11, 1)], [(4, 2), (8, 2), (11, 1)]),
        ([(4, 8), (5, 2), (12, 1)], [(4, 9)]),
    ],
)
def test_merged(runs: list[tuple[int, int]], want: list[tuple[int, int]]):
    assert merged(runs) == want


class TestWhichWay:
    def test_what_is_new_needs_none(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 100), READ)
        space.map_file(AT + 200 * PAGE, bench.arena, fr(0, 100), READ_WRITE)
        assert bench.take() == []

    def test_nor_does_more_permission_for_the_same_frame(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 8), READ)
        space.map_file(AT, bench.arena, fr(0, 8), READ_WRITE)
        space.map_file(AT, bench.arena, fr(0, 8), READ_WRITE)
        assert bench.take() == []
        assert space.is_mapped(AT, WRITE)

    def test_the_old_frames_are_dropped_not_the_new_ones(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 8), READ)
        space.map_file(AT + 2 * PAGE, bench.arena, fr(100, 3), READ)
        assert bench.take() == [("drop", 2 * PAGE, 3 * PAGE)]
        space.map_file(AT, bench.arena, fr(0, 8), READ)
        assert bench.take() == [("drop", 100 * PAGE, 3 * PAGE)]

    def test_less_permission_is_a_shootdown_of_the_same_frames(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 8), READ_WRITE)
        space.map_file(AT + PAGE, bench.arena, fr(1, 2), READ)
        assert bench.take() == [("drop", PAGE, 2 * PAGE)]

    def test_one_for_all_ranges(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 64), READ)
        space.unmap([ar(AT), ar(AT + PAGE), ar(AT + 9 * PAGE, 2 * PAGE), ar(1 << 40)])
        assert bench.take() == [("drop", 0, 2 * PAGE), ("drop", 9 * PAGE, 2 * PAGE)]
        assert (space.statistics.n_dontneed, space.statistics.n_pages) == (1, 4)
        space.unmap([ar(AT), ar(1 << 40), AddrRange(0, 0), ar(1 << 60)])
        assert bench.take() == []

    def test_much_is_a_zap(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        for n in range(8):
            space.map_file(AT + n * 4 * HUGE, bench.arena, fr(n * 2048, 2048), READ)
        space.unmap([ar(AT, 2000 * PAGE)])  # of 16 384: less than an eighth
        assert [event[0] for event in bench.take()] == ["drop"]
        space.unmap([ar(AT + 4 * HUGE, 4 * HUGE)])
        assert bench.take() == ["zap"]
        space.unmap([ar(AT + n * 3 * PAGE) for n in range(2800, 3100)])  # many pieces
        assert bench.take() == ["zap"]

    @pytest.mark.parametrize(
        ("proven", "want"),
        [({"zap": False}, "drop"), ({"dontneed": False}, "zap")],
    )
    def test_only_what_works(self, make: Callable[..., Bench], proven: dict[str, bool], want: str):
        bench = make(**proven)
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 64), READ)
        space.unmap([ar(AT)])
        assert [event[0] if event != "zap" else event for event in bench.take()] == [want]

    def test_none_for_a_space_that_no_vcpu_was_ever_in(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space(loaded=False)
        space.map_file(AT, bench.arena, fr(0, 64), READ)
        space.map_file(AT, bench.arena, fr(9, 64), READ)
        space.unmap([ar(AT)])
        assert bench.take() == []
        assert not space.is_mapped(AT, READ)
        assert space.is_mapped(AT + PAGE, READ)

    def test_one_that_they_have_left_still_does(self, make: Callable[..., Bench]):
        bench = make()
        space = bench.space()
        vcpu = next(iter(space._vcpus))
        bench.space(loaded=False).activate(vcpu)
        assert bench.physical.loaded[vcpu] is not space
        space.map_file(AT, bench.arena, fr(0), READ)
        space.unmap([ar(AT)])
        assert bench.take() == [("drop", 0, PAGE)]


class TestRoots:
    def test_a_fork_gives_the_parents_vcpus_a_new_one(self, make: Callable[..., Bench]):
        bench = make()
        parent, child = bench.space(), bench.space(loaded=False)
        other: Any = FakeVcpu()
        parent.activate(other)
        parent.map_file(AT, bench.arena, fr(0, 64), READ_WRITE)
        before = parent.root_gpa
        assert parent.fork_into(child)
        assert parent.root_gpa not in {before, child.root_gpa}
        for vcpu in bench.physical.loaded:
            assert vcpu.roots[-1] == parent.root_gpa  # type: ignore[attr-defined]
        for space in (parent, child):
            assert space.is_mapped(AT, READ)
            assert not space.is_mapped(AT, WRITE)
        # What either changes, the other does not see; the child's frames may be cached: shot down.
        child.map_file(AT, bench.arena, fr(70), READ_WRITE)
        assert ("drop", 0, PAGE) in bench.take()
        assert child.gpa_at(AT) != parent.gpa_at(AT)
        assert not parent.is_mapped(AT, WRITE)

    def test_a_superpage_is_cut_in_tables_that_no_cpu_has_seen(self, make: Callable[..., Bench]):
        bench = make(is_nested=True)
        space = bench.space()
        space.map_file(AT, bench.arena, fr(0, 1024), READ)
        vcpu: Any = next(iter(space._vcpus))
        assert len(vcpu.roots) == 1
        space.map_file(AT + 5 * PAGE, bench.arena, fr(2000), READ)
        assert len(vcpu.roots) == 2
        assert vcpu.roots[1] == space.root_gpa
        assert bench.take() == [("drop", 5 * PAGE, PAGE)]
        assert space.statistics.n_roots == 1

    def test_tables_given_up_come_back_after_a_zap_only(self, make: Callable[..., Bench]):
        bench = make()
        frames = bench.physical.frames
        parent = bench.space()
        parent.map_file(AT, bench.arena, fr(0, 8192), READ_WRITE)
        for n in range(600):
            child = bench.space(loaded=False)
            n_tables = frames.n_tables
            assert parent.fork_into(child)
            parent.map_file(AT + n % 16 * HUGE, bench.arena, fr(9000 + n), READ_WRITE)
            zapped = "zap" in bench.take()
            assert zapped == (frames.n_tables < n_tables)
            child.release()
        assert parent.statistics.n_zaps > 1
        assert frames.n_tables < 700

    def test_a_released_space_cannot_be_entered(self, make: Callable[..., Bench]):
        space = make().space()
        space.release()
        with pytest.raises(KvmmmError, match="released"):
            space.activate(FakeVcpu())  # type: ignore[arg-type]


def exhaust(allocate: Callable[..., object], *arguments: int) -> None:
    """Until there is nothing left."""
    while True:
        try:
            allocate(*arguments)
        except ArenaExhaustedError:
            return


class TestTightArena:
    @pytest.mark.parametrize("has_stock", [True, False])
    def test_unmapping_never_fails(self, make: Callable[..., Bench], has_stock: bool):
        """Where there is no page for cutting a shared table, more goes than was asked for."""
        bench = make(arena_bytes=2 << 20)
        frames = bench.physical.frames
        parent, child = bench.space(), bench.space()
        for n in range(4):
            parent.map_file(AT + n * HUGE, bench.arena, fr(n * 10, 10), READ_WRITE)
        assert parent.fork_into(child)
        exhaust(bench.arena.allocate, PAGE)
        if not has_stock:
            with frames.urgent():
                exhaust(frames.allocate)
        for space in (child, parent):
            bench.take()
            space.unmap([ar(AT + 3 * PAGE)])
            assert not space.is_mapped(AT + 3 * PAGE, READ)
            assert space.is_mapped(AT + 4 * PAGE, READ) == has_stock
            drop = ("drop", 3 * PAGE, PAGE)
            assert bench.take() == ([drop] if has_stock else ["zap", "zap"])

    def test_mapping_takes_back_what_waits_for_a_zap(self, make: Callable[..., Bench]):
        bench = make(arena_bytes=2 << 20)
        space = bench.space()
        exhaust(bench.arena.allocate, PAGE)
        places = iter(range(AT, AT + 100 * HUGE, HUGE))
        exhaust(lambda: space.map_file(next(places), bench.arena, fr(0), READ))
        bench.take()
        space.unmap([ar(AT, 100 * HUGE)])
        # Elsewhere: the tables that are parked at their places are of no use.
        space.map_file(1 << 40, bench.arena, fr(0), READ)
        assert "zap" in bench.take()
        assert space.is_mapped(1 << 40, READ)


class TestProven:
    def test_nothing_works(self, monkeypatch: pytest.MonkeyPatch):
        device: Any = SimpleNamespace(path="/dev/none")
        nothing = Proven(dontneed=False, zap=False, root=True, is_nested=False)
        monkeypatch.setattr(shootdown_trial, "try_out", lambda _device: nothing)
        monkeypatch.setattr(shootdown_trial, "_found", {})
        with pytest.raises(KvmmmError, match="no way was found"):
            shootdown_trial.proven_on(device)
        assert repr(nothing) == "<proven: root>"

    @pytest.mark.parametrize(
        ("is_nested", "giant", "leaf_bytes"),
        [(False, True, PAGE), (True, False, HUGE), (True, True, 1 << 30)],
    )
    def test_leaves(self, is_nested: bool, giant: bool, leaf_bytes: int):
        proven = Proven(dontneed=True, zap=True, root=True, is_nested=is_nested)
        assert proven.best_leaf_bytes(giant_pages=giant) == leaf_bytes


@pytest.mark.kvm
@pytest.mark.npt
@pytest.mark.usefixtures("no_leak")
def test_the_trial_finds_two_ways_here():
    proven = shootdown_trial.try_out(open_device())
    assert proven.root
    assert proven.zap
    assert proven.dontneed


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leak")
def test_the_trial_is_not_taken_in(monkeypatch: pytest.MonkeyPatch):
    """What does nothing is not proven."""
    if shootdown_trial.try_out(open_device()).is_nested:
        pytest.skip("nested paging: a CPU may forget by itself")
    monkeypatch.setattr(shootdown_trial, "drop_pages", lambda _hva, _length: None)
    monkeypatch.setattr(GuestPhysical, "zap", lambda _self: None)
    proven = shootdown_trial.try_out(open_device())
    assert not proven.dontneed
    assert not proven.zap


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leak")
def test_a_guest_that_does_not_turn_proves_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shootdown_trial, "_LOOP", b"\xeb\xfe")
    monkeypatch.setattr(shootdown_trial, "_TURNS_TIMEOUT_S", 0.05)
    assert repr(shootdown_trial.try_out(open_device())) == "<proven: nothing>"
