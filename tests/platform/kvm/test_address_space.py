"""MemslotAddressSpace: which slots a translation becomes, against a model of pages and on KVM."""

from __future__ import annotations

import random
import struct
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.platform.kvm import abi, memslot
from kvmmm.platform.kvm.address_space import MemslotAddressSpace
from kvmmm.platform.kvm.memslot import MemslotTable
from kvmmm.vmm.microvm import MicroVM
from tests.platform.kvm.conftest import Kernel
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
MAX = 64 * PAGE
READONLY = abi.KVM_MEM_READONLY


class HostFile:
    """A File at some host address; nobody touches its bytes."""

    def __init__(self, hva: int) -> None:
        self.hva = hva


FILE: Any = HostFile(0x7000_0000_0000)


def fr(start_page: int, n_pages: int) -> FileRange:
    return FileRange(start_page * PAGE, (start_page + n_pages) * PAGE)


@pytest.fixture
def space(kernel: Kernel) -> MemslotAddressSpace:  # noqa: ARG001 - where its slots go
    return make_space(64)


class FakeVm:
    """Slots, and pauses: all changes of what is there must happen within one."""

    def __init__(self, limit: int) -> None:
        self.fd = 0
        self.memslots = MemslotTable(-1, limit)
        self.n_pauses = 0
        self.is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        assert not self.is_paused, "one pause an operation"
        self.n_pauses += 1
        self.is_paused = True
        yield
        self.is_paused = False


def make_space(limit: int, max_addr: int = MAX) -> MemslotAddressSpace:
    return MemslotAddressSpace(FakeVm(limit), max_addr)  # type: ignore[arg-type]


def slots(kernel: Kernel) -> list[tuple[int, int, int, int]]:
    """(first page, pages, page of FILE, flags), ascending."""
    return sorted(
        (gpa // PAGE, size // PAGE, (hva - FILE.hva) // PAGE, flags)
        for gpa, size, hva, flags in kernel.slots.values()
    )


class TestMapFile:
    def test_a_slot_over_the_files_mapping(self, space: MemslotAddressSpace, kernel: Kernel):
        space.map_file(4 * PAGE, FILE, fr(10, 3), READ_WRITE)
        assert slots(kernel) == [(4, 3, 10, 0)]

    @pytest.mark.parametrize("perms", [READ, READ | EXECUTE])
    def test_readonly_where_nothing_may_be_written(
        self, space: MemslotAddressSpace, kernel: Kernel, perms: int
    ):
        space.map_file(4 * PAGE, FILE, fr(10, 3), perms)
        assert slots(kernel) == [(4, 3, 10, READONLY)]
        assert space.is_mapped(4 * PAGE, READ)
        assert not space.is_mapped(4 * PAGE, WRITE)

    def test_only_what_is_missing_is_added(self, space: MemslotAddressSpace, kernel: Kernel):
        space.map_file(6 * PAGE, FILE, fr(16, 2), READ_WRITE)
        space.map_file(10 * PAGE, FILE, fr(20, 2), READ_WRITE)
        before = dict(kernel.slots)
        space.map_file(4 * PAGE, FILE, fr(14, 10), READ_WRITE)
        assert before.items() <= kernel.slots.items()
        assert slots(kernel) == [
            (4, 2, 14, 0),
            (6, 2, 16, 0),
            (8, 2, 18, 0),
            (10, 2, 20, 0),
            (12, 2, 22, 0),
        ]

    def test_all_there_is_nothing_to_do(self, space: MemslotAddressSpace, kernel: Kernel):
        space.map_file(4 * PAGE, FILE, fr(14, 10), READ_WRITE)
        before = dict(kernel.slots)
        space.map_file(6 * PAGE, FILE, fr(16, 2), READ_WRITE)
        assert kernel.slots == before

    @pytest.mark.parametrize(
        ("place", "perms"), [(40, READ_WRITE), (16, READ)], ids=["elsewhere", "read-only"]
    )
    def test_what_changed_is_replaced_and_the_rest_stays(
        self, space: MemslotAddressSpace, kernel: Kernel, place: int, perms: int
    ):
        space.map_file(4 * PAGE, FILE, fr(14, 6), READ_WRITE)
        space.map_file(6 * PAGE, FILE, fr(place, 2), perms)
        flags = 0 if perms & WRITE else READONLY
        assert slots(kernel) == [(4, 2, 14, 0), (6, 2, place, flags), (8, 2, 18, 0)]

    def test_replacing_pauses_once_and_adding_does_not(
        self, space: MemslotAddressSpace, kernel: Kernel
    ):
        vm = cast("FakeVm", space.vm)
        kernel.on_delete = lambda: check_paused(vm)
        for page in (4, 8, 12):
            space.map_file(page * PAGE, FILE, fr(14, 2), READ)
        assert (vm.n_pauses, space.n_pauses, space.n_slot_changes) == (0, 0, 0)
        space.map_file(0, FILE, fr(30, 20), READ_WRITE)
        assert (vm.n_pauses, space.n_pauses, space.n_slot_changes) == (1, 1, 3)
        assert slots(kernel) == [(0, 20, 30, 0)]
        space.map_file(0, FILE, fr(30, 20), READ_WRITE)
        assert vm.n_pauses == 1

    def test_a_broken_copy_on_write_replaces_its_slot_in_one_pause(
        self, space: MemslotAddressSpace, kernel: Kernel
    ):
        space.map_file(0, FILE, fr(0, 8), READ)
        space.map_file(2 * PAGE, FILE, fr(40, 2), READ_WRITE)
        assert slots(kernel) == [(0, 2, 0, READONLY), (2, 2, 40, 0), (4, 4, 4, READONLY)]
        assert (space.n_pauses, space.n_slot_changes) == (1, 1)


def check_paused(vm: FakeVm) -> None:
    assert vm.is_paused


class TestUnmap:
    def test_cuts_what_sticks_out(self, space: MemslotAddressSpace, kernel: Kernel):
        space.map_file(4 * PAGE, FILE, fr(14, 8), READ)
        space.unmap([AddrRange(6 * PAGE, 8 * PAGE)])
        assert slots(kernel) == [(4, 2, 14, READONLY), (8, 4, 18, READONLY)]
        assert not space.is_mapped(6 * PAGE, 0)
        assert space.is_mapped(8 * PAGE, READ)

    def test_nothing_there_is_no_error(self, space: MemslotAddressSpace, kernel: Kernel):
        space.unmap([AddrRange(0, MAX)])
        assert slots(kernel) == []
        assert space.n_pauses == 0

    def test_many_ranges_are_one_pause(self, space: MemslotAddressSpace, kernel: Kernel):
        for page in range(0, 40, 2):
            space.map_file(page * PAGE, FILE, fr(page, 1), READ)
        space.unmap([AddrRange(page * PAGE, (page + 3) * PAGE) for page in (0, 10, 20)])
        assert len(kernel.slots) == 14
        assert (space.n_pauses, space.n_slot_changes) == (1, 6)

    def test_release_leaves_nothing_below_the_end(self, kernel: Kernel):
        space = make_space(16, MAX // 2)
        space.map_file(0, FILE, fr(0, 4), READ)
        space.map_file(8 * PAGE, FILE, fr(0, 4), READ)
        space._slots.add(MAX // 2, PAGE, FILE.hva)
        space.release()
        space.release()
        assert slots(kernel) == [(MAX // 2 // PAGE, 1, 0, 0)]
        assert space.n_pauses == 1

    def test_release_after_the_vm(self, space: MemslotAddressSpace, kernel: Kernel):
        space.map_file(0, FILE, fr(0, 4), READ)
        space.vm.fd = -1
        space.release()
        assert len(kernel.slots) == 1


class TestMerging:
    @pytest.mark.usefixtures("kernel")
    def test_windows_grow_as_slots_run_out(self):
        space = make_space(8, 64 << 20)
        sizes = []
        for page in range(7):
            sizes.append(space.min_window_bytes)
            space.vm.memslots.add(page * PAGE, PAGE, FILE.hva)
        assert sizes[0] == 2 << 20
        assert sizes == sorted(sizes)
        assert sizes[-1] >= 64 << 20
        assert all(size & (size - 1) == 0 for size in sizes)

    def test_neighbours_become_one_near_the_limit(self, kernel: Kernel):
        space = make_space(8)
        for page in [0, 4, 2, 6]:
            space.map_file(page * PAGE, FILE, fr(page, 1), READ_WRITE)
        assert space.n_merges == 0
        for page in [1, 5, 3]:
            space.map_file(page * PAGE, FILE, fr(page, 1), READ_WRITE)
        space.map_file(9 * PAGE, FILE, fr(9, 1), READ_WRITE)
        assert space.n_evictions == 0
        assert space.n_merges > 0
        assert (0, 3, 0, 0) in slots(kernel)
        assert all(space.is_mapped(page * PAGE, WRITE) for page in [*range(7), 9])

    def test_in_order_any_number_of_pages_fits(self, kernel: Kernel):
        space = make_space(8)
        for page in range(64):
            space.map_file(page * PAGE, FILE, fr(page, 1), READ_WRITE)
        assert space.n_merges > 0
        assert len(kernel.slots) <= 8
        for page in range(64):
            slot = space._slots.find(page * PAGE)
            assert slot is not None
            assert slot.delta == FILE.hva

    def test_only_what_one_slot_can_be_is_merged(self, kernel: Kernel):
        space = make_space(16)
        for page, (place, perms) in enumerate(
            [(0, READ), (1, READ), (2, READ_WRITE), (3, READ_WRITE), (9, READ_WRITE)]
        ):
            space.map_file(page * PAGE, FILE, fr(place, 1), perms)
        space.map_file(7 * PAGE, FILE, fr(12, 1), READ_WRITE)
        space._merge_neighbours()
        assert slots(kernel) == [(0, 2, 0, READONLY), (2, 2, 2, 0), (4, 1, 9, 0), (7, 1, 12, 0)]

    @pytest.mark.usefixtures("kernel")
    def test_without_a_free_slot_all_are_dropped(self):
        """A translation is a cache: what is asked for last is there, the rest faults again."""
        space = make_space(8)
        for page in range(0, 64, 2):
            space.map_file(page * PAGE, FILE, fr(page, 1), READ_WRITE)
            assert space.is_mapped(page * PAGE, WRITE)
        assert space.n_evictions > 0

    def test_a_cut_without_a_free_slot_drops_the_upper_part(self, kernel: Kernel):
        space = make_space(1)
        space.map_file(0, FILE, fr(0, 9), READ_WRITE)
        space.unmap([AddrRange(3 * PAGE, 5 * PAGE)])
        assert slots(kernel) == [(0, 3, 0, 0)]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["map", "map", "map", "unmap", "merge"]),
        st.integers(0, 63),
        st.integers(1, 12),
        st.integers(0, 3),
        st.sampled_from([READ, READ_WRITE]),
    ),
    max_size=30,
)


@given(steps=STEPS, limit=st.sampled_from([4, 12, 128]))
def test_slots_say_what_a_model_of_pages_says(
    steps: list[tuple[str, int, int, int, int]], limit: int
):
    kernel = Kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memslot, "ioctl", kernel.ioctl)
        space = make_space(limit)
        model: dict[int, tuple[int, int]] = {}  # page -> hva, flags
        for verb, first, count, shift, perms in steps:
            pages = range(first, min(first + count, 64))
            ar = AddrRange(pages.start * PAGE, pages.stop * PAGE)
            if verb == "map":
                space.map_file(ar.start, FILE, fr(first + 100 * shift, len(pages)), perms)
                flags = 0 if perms & WRITE else READONLY
                for page in pages:
                    model[page] = (FILE.hva + (page + 100 * shift) * PAGE, flags)
            elif verb == "unmap":
                space.unmap([ar])
                for page in pages:
                    model.pop(page, None)
            else:
                space._merge_neighbours()
            found = {
                page: (hva + page * PAGE - gpa, flags)
                for gpa, size, hva, flags in kernel.slots.values()
                for page in range(gpa // PAGE, (gpa + size) // PAGE)
            }
            assert found.items() <= model.items()  # a cache: some may be gone, none be wrong
            assert limit < 128 or found == model
            assert verb != "map" or set(pages) <= set(found)
            assert len(kernel.slots) == len(space._slots)
            space._slots.by_gpa.check_invariants()


def test_it_is_no_space_to_share(space: MemslotAddressSpace):
    assert not space.fork_into(make_space(8))
    assert (space.map_unit_bytes, space.walks_frames) == (0, True)


def test_completing_an_access_needs_its_slot(space: MemslotAddressSpace):
    exit_ = SimpleNamespace(gpa=5 * PAGE, size_bytes=8, is_write=True)
    with pytest.raises(GuestFaultError) as caught:
        space.complete(exit_)  # type: ignore[arg-type]
    assert (caught.value.addr, caught.value.access) == (5 * PAGE, WRITE)


def random_touches(order: list[int]) -> bytes:
    """A ring-3 guest: a word that depends on its address into each page, then out, then exit."""
    code = Code().ring3()
    code.mov("rsi", BASE + 0x1000).mov("rcx", len(order))
    loop = code.here
    code.load("rbx", "rsi").store("rbx", "rbx").add("rsi", 8).dec("rcx")
    code.jump_back_unless_zero(loop).exit(0)
    return code.bytes.ljust(0x1000, b"\0") + struct.pack(f"<{len(order)}Q", *order)


@pytest.mark.kvm
@pytest.mark.timeout(100)
@pytest.mark.parametrize("max_memslots", [8, 12, 32])
def test_a_guest_that_touches_at_random_needs_few_slots(
    max_memslots: int, scaled: Callable[[int], int]
):
    rng = random.Random(max_memslots)
    pages = [page * PAGE for page in range(4 << 20 >> 12, 60 << 20 >> 12)]
    order = rng.sample(pages, scaled(4000))
    with MicroVM("64M", max_memslots=max_memslots) as vm:
        vm.load(random_touches(order), base=BASE)
        result = vm.run(timeout=60)
        assert (result.outcome, result.status) == ("exited", 0), result.report
        assert result.stats is not None
        assert result.stats.n_slots <= max_memslots
        assert result.stats.adds_up
        for addr in order:
            assert vm.mm.read(addr, 8) == struct.pack("<Q", addr)
        vm.mm.check_invariants()


@pytest.mark.kvm
@pytest.mark.timeout(100)
def test_slots_are_merged_under_a_guest(scaled: Callable[[int], int]):
    """Small mappings of different permissions ask for more slots than there are."""
    with MicroVM("64M", max_memslots=10) as vm:
        order = [(8 << 20) + page * PAGE for page in range(scaled(640))]
        random.Random(3).shuffle(order)
        vm.load(random_touches(order), base=BASE)
        for page in order[::2]:  # every second page a mapping by itself: no window covers two
            vm.mm.mmap(PAGE, READ_WRITE, addr=page, fixed=True, replace=True, name=f"[{page:#x}]")
        result = vm.run(timeout=60)
        assert (result.outcome, result.status) == ("exited", 0), result.report
        assert vm.address_space.n_merges > 0
        assert vm.address_space.n_evictions > 0
        assert len(vm.vm.memslots) <= 10
        for addr in order:
            assert vm.mm.read(addr, 8) == struct.pack("<Q", addr)
