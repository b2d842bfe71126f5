"""Copies through the address space: what is done where it has no translation, or cannot have."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import (
    AddressSpaceIOUnavailableError,
    ArenaExhaustedError,
    GuestBusError,
    GuestFaultError,
    NoProgressError,
)
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import MemoryManager, Policy, asio
from kvmmm.safemem.ffi import IOOpts
from tests.fakes import FakeFile, FakeMappable
from tests.mm.copying import START, Ground, through
from tests.mm.family import HUGE, PAGE, Family
from tools.fuzz.space import TableSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import File

AT = START + 16 * HUGE
"""Nothing is mapped there, nor for a long way behind."""
VIA = [False, True]
NAMES = {False: "walk", True: "mirror"}


class Mapped:
    """Writes down what a TableSpace is told to map; lets nothing through from `deaf` on."""

    def __init__(self, space: Any) -> None:
        self.runs: list[tuple[int, int]] = []
        self.deaf = 1 << 64
        self._map_file = space.map_file
        space.map_file = self

    def __call__(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        self.runs.append((addr, addr + fr.length_bytes))
        if addr < self.deaf:
            self._map_file(addr, file, fr, perms)


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground() as made:
        yield made


@pytest.fixture
def mapped(ground: Ground) -> Iterator[Mapped]:
    space: Any = ground.mm.address_space
    yield Mapped(space)
    del space.map_file


def reaches(ground: Ground, addr: int, access: int, *, mirrored: bool) -> bool:
    mm = ground.mm
    if mirrored:
        return mm.mirror is not None and mm.mirror.find(addr, 1, access) is not None
    return mm.address_space.is_mapped(addr, access)


def fault(ground: Ground, addr: int, end: int, access: int, *, mirrored: bool) -> None:
    ground.mm.handle_asio_fault(addr, AddrRange(addr, end), access, mirrored=mirrored)


class TestWhatIsThere:
    """A copy of what one pma has is served in few steps; everything else as a fault is."""

    def test_the_whole_pma(self, ground: Ground):
        ground.map(AT, 8 * PAGE)
        ground.mm.copy_out(AT, b"x", opts=IOOpts(mechanism="mirror"))
        ground.mm.mirror.forget(AT, AT + 8 * PAGE)
        assert asio.mirror_resident(ground.mm, AT + PAGE, AT + 2 * PAGE, WRITE)
        assert all(reaches(ground, AT + i * PAGE, READ_WRITE, mirrored=True) for i in range(8))

    def test_what_takes_more(self, ground: Ground):
        mm = ground.mm
        ground.map(AT, 4 * PAGE)
        ground.map(AT + 4 * PAGE, 4 * PAGE, READ)
        assert not asio.mirror_resident(mm, AT, AT + PAGE, READ)  # no mirror, no pma
        mm.copy_out(AT, b"x", opts=IOOpts(mechanism="mirror"))
        mm.read(AT + 4 * PAGE, 1)
        mm.mirror.forget(AT, AT + 8 * PAGE)
        for at, end, access in (
            (AT + 3 * PAGE, AT + 4 * PAGE + 1, READ),  # two pmas
            (AT + 4 * PAGE, AT + 5 * PAGE, WRITE),  # not allowed
            (AT + 8 * PAGE, AT + 9 * PAGE, READ),  # nothing
        ):
            assert not asio.mirror_resident(mm, at, end, access)
        assert mm.mirror.n_resident_pages == 0
        assert asio.mirror_resident(mm, AT + 4 * PAGE, AT + 5 * PAGE, READ)
        assert not reaches(ground, AT + 4 * PAGE, WRITE, mirrored=True)


@pytest.mark.parametrize("mirrored", VIA, ids=NAMES.values())
class TestHowFar:
    """Inability to reach the first page is an error; of later ones nothing is said."""

    def pages(self, ground: Ground, n: int, access: int, *, mirrored: bool) -> list[bool]:
        return [reaches(ground, AT + i * PAGE, access, mirrored=mirrored) for i in range(n)]

    def test_all_of_it(self, ground: Ground, mirrored: bool):
        ground.map(AT, 8 * PAGE)
        fault(ground, AT + 100, AT + 7 * PAGE + 1, WRITE, mirrored=mirrored)
        assert all(self.pages(ground, 8, READ_WRITE, mirrored=mirrored))

    def test_to_a_hole(self, ground: Ground, mirrored: bool):
        ground.map(AT, 4 * PAGE)
        ground.map(AT + 5 * PAGE, 3 * PAGE)
        fault(ground, AT + 100, AT + 8 * PAGE, WRITE, mirrored=mirrored)
        expected = [True] * 4 + [False] * 4
        assert self.pages(ground, 8, WRITE, mirrored=mirrored) == expected

    def test_to_what_is_forbidden(self, ground: Ground, mirrored: bool):
        ground.map(AT, 4 * PAGE)
        ground.map(AT + 4 * PAGE, 4 * PAGE, READ)
        fault(ground, AT, AT + 8 * PAGE, WRITE, mirrored=mirrored)
        assert self.pages(ground, 5, WRITE, mirrored=mirrored) == [True] * 4 + [False]
        fault(ground, AT, AT + 8 * PAGE, READ, mirrored=mirrored)
        assert all(self.pages(ground, 8, READ, mirrored=mirrored))
        assert not reaches(ground, AT + 4 * PAGE, WRITE, mirrored=mirrored)

    def test_to_the_end_of_addresses(self, ground: Ground, mirrored: bool):
        top = ground.mm.max_addr
        ground.map(top - PAGE, PAGE)
        fault(ground, top - 1, top, WRITE, mirrored=mirrored)
        assert reaches(ground, top - PAGE, WRITE, mirrored=mirrored)

    def test_to_where_memory_ends(self, mirrored: bool):
        with Ground(arena_bytes=10 << 20) as ground:
            ground.map(AT, 32 << 20)
            fault(ground, AT, AT + (32 << 20), WRITE, mirrored=mirrored)
            assert reaches(ground, AT, WRITE, mirrored=mirrored)
            assert not reaches(ground, AT + (31 << 20), WRITE, mirrored=mirrored)
            with pytest.raises(ArenaExhaustedError) as caught:
                fault(ground, AT + (31 << 20), AT + (32 << 20), WRITE, mirrored=mirrored)
            assert caught.value.__notes__ == [f"at guest address {AT + (31 << 20):#x}"]
            ground.mm.munmap(AT, 32 << 20)

    @pytest.mark.parametrize("perms", [None, NO_ACCESS, READ])
    def test_not_even_the_first(self, ground: Ground, mirrored: bool, perms: int | None):
        if perms is not None:
            ground.map(AT, PAGE, perms)
        ground.map(AT + PAGE, PAGE)
        addr = AT + 0x123
        with pytest.raises(GuestFaultError) as caught:
            fault(ground, addr, AT + 2 * PAGE, WRITE, mirrored=mirrored)
        error = caught.value
        assert (error.addr, error.access, error.mapped) == (addr, WRITE, perms is not None)
        assert type(error) is GuestFaultError
        assert not reaches(ground, AT + PAGE, WRITE, mirrored=mirrored)

    def test_a_file_ends_before_it(self, ground: Ground, mirrored: bool):
        mappable = FakeMappable(FakeFile(2 * PAGE))
        ground.map(AT, 4 * PAGE, mappable=mappable, private=True)
        with pytest.raises(GuestBusError) as caught:
            fault(ground, AT + 2 * PAGE + 5, AT + 4 * PAGE, WRITE, mirrored=mirrored)
        assert (caught.value.addr, caught.value.access) == (AT + 2 * PAGE + 5, WRITE)
        # Private copies are in the arena: as far as the file has bytes.
        fault(ground, AT + 5, AT + 4 * PAGE, WRITE, mirrored=mirrored)
        assert self.pages(ground, 4, WRITE, mirrored=mirrored) == [True, True, False, False]
        ground.mm.munmap(AT, 4 * PAGE)

    def test_what_a_mappable_says(self, ground: Ground, mirrored: bool):
        mappable = FakeMappable(FakeFile(PAGE))
        mappable.error = OSError(errno.ENOSPC, "the disk is full")
        ground.map(AT, 2 * PAGE, mappable=mappable, private=True)
        with pytest.raises(OSError, match="the disk is full") as caught:
            fault(ground, AT + PAGE, AT + 2 * PAGE, WRITE, mirrored=mirrored)
        assert caught.value is mappable.error
        assert caught.value.__notes__ == [f"at guest address {AT + PAGE:#x}"]
        ground.mm.munmap(AT, 2 * PAGE)

    def test_copies_on_write_are_broken(self, ground: Ground, mirrored: bool):
        ground.mm.copy_out(START, b"before")
        child = ground.fork()
        fault(ground, START, START + PAGE, READ, mirrored=mirrored)
        assert not reaches(ground, START, WRITE, mirrored=mirrored)
        fault(ground, START, START + PAGE, WRITE, mirrored=mirrored)
        assert reaches(ground, START, WRITE, mirrored=mirrored)
        ground.mm.copy_out(START, b"after!", **through(NAMES[mirrored]))
        assert child.read(START, 6) == b"before"

    def test_a_foreign_file_is_unavailable(self, ground: Ground, mirrored: bool):
        """It may be cut short; and the copy goes another way."""
        ground.map(AT, 2 * PAGE, mappable=FakeMappable(FakeFile(2 * PAGE)), private=False)
        with pytest.raises(AddressSpaceIOUnavailableError):
            fault(ground, AT, AT + PAGE, WRITE, mirrored=mirrored)
        how = through(NAMES[mirrored])
        ground.map(AT + 2 * PAGE, PAGE)
        data = bytes(range(256)) * 40
        assert ground.mm.copy_out(AT + 5, data, **how) == len(data)
        assert ground.mm.read(AT + 5, len(data), **how) == data
        assert ground.mm.swap_uint32(AT + 8, 7, **how) == int.from_bytes(data[3:7], "little")
        assert ground.mm.load_uint32(AT + 8) == 7
        ground.mm.munmap(AT, 3 * PAGE)


class TestWhatIsMapped:
    """As a guest's fault maps: units where there are such, else whole pmas."""

    UNIT = 64 << 10

    def test_all_of_the_pmas(self, ground: Ground, mapped: Mapped):
        ground.map(AT, HUGE)
        fault(ground, AT + 5 * PAGE, AT + 6 * PAGE, WRITE, mirrored=False)
        assert mapped.runs == [(AT, AT + HUGE)]

    @pytest.mark.parametrize(
        ("first", "end", "expected"),
        [
            (20, 21, (16, 32)),
            (15, 17, (0, 32)),
            (16, 32, (16, 32)),
            (0, 1, (0, 16)),
            (40, 41, (32, 41)),  # the pma ends in the middle of a unit
        ],
    )
    def test_units(
        self, ground: Ground, mapped: Mapped, first: int, end: int, expected: tuple[int, int]
    ):
        ground.mm.address_space.map_unit_bytes = self.UNIT  # type: ignore[misc]
        ground.map(AT, 41 * PAGE)
        low, high = AT + first * PAGE, AT + end * PAGE
        fault(ground, low + 1, high - 1, WRITE, mirrored=False)
        assert mapped.runs == [(AT + expected[0] * PAGE, AT + expected[1] * PAGE)]

    def test_a_pma_that_begins_in_the_middle_of_a_unit(self, ground: Ground, mapped: Mapped):
        ground.mm.address_space.map_unit_bytes = self.UNIT  # type: ignore[misc]
        ground.map(AT + 3 * PAGE, 4 * PAGE)
        ground.map(AT + 7 * PAGE, PAGE, READ)
        fault(ground, AT + 4 * PAGE, AT + 5 * PAGE, WRITE, mirrored=False)
        assert mapped.runs == [(AT + 3 * PAGE, AT + 7 * PAGE)]

    def test_no_page_for_a_table(self, ground: Ground, mapped: Mapped):
        """It comes out: the arena has none for anybody."""

        def refuse(*_: Any) -> None:
            raise ArenaExhaustedError(PAGE, 0, 0)

        mapped._map_file = refuse
        with pytest.raises(ArenaExhaustedError):
            ground.mm.read(START, 8, **through("walk"))
        assert ground.mm.read(START, 8) == bytes(8)

    def test_whole_runs_in_the_mirror(self, ground: Ground):
        ground.map(AT, HUGE)
        ground.map(AT + HUGE, HUGE, READ)
        fault(ground, AT + 5 * PAGE, AT + HUGE + PAGE, READ, mirrored=True)
        mirror = ground.mm.mirror
        assert mirror.n_maps == 2
        assert mirror.n_resident_pages == 2 * HUGE // PAGE
        assert mirror.find(AT + HUGE, 1, WRITE) is None


class TestMechanismsFallBack:
    def forbid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("through the address space")

        monkeypatch.setattr(asio, "handle_asio_fault", never)

    def test_a_space_without_tables(self, monkeypatch: pytest.MonkeyPatch):
        """Memslots, say: a walk is internal mappings there."""
        self.forbid(monkeypatch)
        with Family(Arena(16 << 20)) as family:
            mm = family.first.mm
            family.first.map(START, START + HUGE)
            assert mm.walk is None
            mm.copy_out(START, b"there", **through("walk"))
            assert mm.read(START, 5, **through("walk")) == b"there"

    @pytest.mark.parametrize("mechanism", ["walk", "mirror"])
    @pytest.mark.parametrize(
        "how",
        [
            {"address_space_active": False},
            {"ignore_permissions": True},
            {"address_space_active": False, "ignore_permissions": True},
        ],
        ids=repr,
    )
    def test_what_is_not_eligible(
        self, ground: Ground, monkeypatch: pytest.MonkeyPatch, mechanism: str, how: dict[str, bool]
    ):
        self.forbid(monkeypatch)
        opts = IOOpts(mechanism=mechanism, **how)  # type: ignore[arg-type]
        ground.map(AT, PAGE, READ if opts.ignore_permissions else READ_WRITE)
        ground.mm.copy_out(AT, b"there", opts=opts)
        assert ground.mm.read(AT, 5, opts=opts) == b"there"
        assert ground.mm.mirror is None
        monkeypatch.undo()

    def test_a_keyword_counts_as_well(self, ground: Ground, monkeypatch: pytest.MonkeyPatch):
        self.forbid(monkeypatch)
        ground.map(AT, PAGE, READ)
        ground.mm.copy_out(AT, b"there", **through("walk"), ignore_permissions=True)
        monkeypatch.undo()

    def test_a_mirror_without_room(self):
        with Family(Arena(16 << 20), policy=Policy(mirror_vmas=1)) as family:
            mm = family.first.mm
            family.first.map(START, START + HUGE)
            ar = AddrRange(START, START + 1)
            with pytest.raises(AddressSpaceIOUnavailableError):
                mm.handle_asio_fault(START, ar, WRITE, mirrored=True)
            mm.copy_out(START, b"there", **through("mirror"))
            assert mm.read(START, 5, **through("mirror")) == b"there"
            assert mm.mirror.n_resident_pages == 0


class TestNoProgress:
    """A fault that is served, and comes again: 100 times."""

    def check(self, error: NoProgressError, addr: int, access: int, done: int) -> None:
        found = error.addr, error.access, error.done, error.n_tries, error.mapped
        assert found == (addr, access, done, 100, True)
        assert "served 100 times" in str(error)

    def test_a_space_that_maps_nothing(self, ground: Ground, mapped: Mapped):
        mapped.deaf = 0
        with pytest.raises(NoProgressError) as caught:
            ground.mm.copy_out(START + 5, b"data", **through("walk"))
        self.check(caught.value, START + 5, WRITE, 0)
        assert len(mapped.runs) == 100
        with pytest.raises(NoProgressError) as caught:
            ground.mm.read(START + 5, 4, **through("walk"))
        self.check(caught.value, START + 5, READ, 0)
        for word in (
            lambda: ground.mm.swap_uint32(START, 1, **through("walk")),
            lambda: ground.mm.load_uint32(START, **through("walk")),
        ):
            with pytest.raises(NoProgressError):
                word()
        # Nothing is lost: others go.
        ground.mm.copy_out(START + 5, b"data")
        assert ground.mm.read(START + 5, 4, **through("mirror")) == b"data"

    def test_from_a_page_on(self, ground: Ground, mapped: Mapped):
        """What comes before it is done; and each page may take so many tries."""
        ground.map(AT, PAGE)
        ground.map(AT + PAGE, PAGE, READ_WRITE, stack=False)
        ground.mm.mprotect(AT, PAGE, 7)
        mapped.deaf = AT + PAGE
        data = bytes(range(200)) * 30
        with pytest.raises(NoProgressError) as caught:
            ground.mm.copy_out(AT + 10, data, **through("walk"))
        self.check(caught.value, AT + PAGE, WRITE, PAGE - 10)
        assert ground.mm.read(AT + 10, PAGE - 10) == data[: PAGE - 10]
        assert ground.mm.read(AT + PAGE, PAGE) == bytes(PAGE)
        with pytest.raises(NoProgressError) as caught:
            ground.mm.copy_out_many([(AT, b"x"), (AT + PAGE - 1, b"yz")], **through("walk"))
        self.check(caught.value, AT + PAGE, WRITE, 2)
        assert caught.value.item == 1  # type: ignore[attr-defined]

    def test_of_internal_mappings(self, ground: Ground, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(MemoryManager, "fill_frames", lambda *_: None)
        ground.map(AT, 4 * PAGE)
        ground.mm.populate(AT, 4 * PAGE)
        with pytest.raises(NoProgressError) as caught:
            ground.mm.read(AT + 1, 5)
        self.check(caught.value, AT + 1, READ, 0)
        monkeypatch.undo()
        assert ground.mm.read(AT + 1, 5) == bytes(5)

    def test_some_tries_are_borne(self, ground: Ground, mapped: Mapped):
        """Up to that many, at each address anew."""
        served = mapped._map_file

        def reluctant(addr: int, *rest: Any) -> None:
            if not len(mapped.runs) % 90:
                served(addr, *rest)

        mapped._map_file = reluctant
        space = ground.mm.address_space
        assert isinstance(space, TableSpace)
        space.map_unit_bytes = PAGE
        n_bytes = 4 * PAGE
        # One page at a time is asked for, so that each is a fault of its own.
        for at in range(START, START + n_bytes, PAGE):
            assert ground.mm.zero_out(at, PAGE, **through("walk")) == PAGE
        assert len(mapped.runs) == 4 * 90
