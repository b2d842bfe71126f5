"""What backs addresses: translations asked for, kept, asked for again; moved, protected, mapped."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestBusError, GuestFaultError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, NO_ACCESS, READ, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm import backing, debug
from kvmmm.mm.pma import Removal
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

START = 8 * HUGE


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.setattr(debug, "ENABLED", True)
    with Family(Arena(64 << 20)) as made:
        yield made


@pytest.fixture
def file() -> FakeFile:
    return FakeFile(64 * PAGE)


@pytest.fixture
def mappable(file: FakeFile) -> FakeMappable:
    return FakeMappable(file)


def test_a_translation_is_asked_for_what_is_needed_and_may_give_more(
    family: Family, mappable: FakeMappable, file: FakeFile
):
    one = family.first
    one.map(START, START + 16 * PAGE, mappable=mappable, offset=8 * PAGE, private=False)
    one.load(START + 3 * PAGE + 5, 1)
    assert mappable.calls == [
        (FileRange(11 * PAGE, 12 * PAGE), FileRange(8 * PAGE, 24 * PAGE), READ)
    ]
    assert one.pmas() == [(START + 3 * PAGE, START + 4 * PAGE, False)]
    mappable.reads_around = True
    one.load(START, 1)
    # Up to what is backed already.
    assert mappable.calls[1][1] == FileRange(8 * PAGE, 11 * PAGE)
    assert one.pmas() == [(START, START + 4 * PAGE, False)]
    assert {page: n for page, n in file.references.items() if n} == {
        n * PAGE: 1 for n in range(8, 12)
    }


@pytest.mark.parametrize(
    ("private", "access", "asked"),
    [
        (False, READ, READ),
        (False, EXECUTE, READ_EXECUTE),
        (False, READ_WRITE, READ_WRITE),
        (True, READ, READ),
        (True, READ_WRITE, READ),
        (True, EXECUTE, READ_EXECUTE),
    ],
)
def test_what_it_is_asked_for(
    family: Family, mappable: FakeMappable, private: bool, access: int, asked: int
):
    one = family.first
    one.map(START, START + PAGE, ANY_ACCESS, mappable=mappable, private=private)
    one.mm.handle_user_fault(START, access)
    assert mappable.calls[0][2] == asked


def test_a_translation_for_reading_is_asked_for_again_to_write(
    family: Family, mappable: FakeMappable, file: FakeFile
):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=mappable, private=False)
    one.load(START, 4 * PAGE)
    n_calls = len(mappable.calls)
    shootdowns = one.space.n_shootdowns
    one.store(START + PAGE, b"x")
    assert file.bytes[PAGE] == ord("x")
    assert [access for _, _, access in mappable.calls[n_calls:]] == [READ_WRITE]
    assert one.space.n_shootdowns == shootdowns  # the same frame
    assert file.references[PAGE] == 1
    assert one.space.load(START, 2 * PAGE)[PAGE] == ord("x")


def test_the_second_answer_may_be_another_frame(
    family: Family, mappable: FakeMappable, file: FakeFile
):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=mappable, private=False)
    one.load(START, 4 * PAGE)
    mappable.delta = 32 * PAGE
    shootdowns = one.space.n_shootdowns
    one.store(START + PAGE, b"x")
    assert one.space.n_shootdowns == shootdowns + 1
    assert file.bytes[33 * PAGE] == ord("x")
    assert (file.references[PAGE], file.references[33 * PAGE]) == (0, 1)
    assert one.offset(START) == 0


def test_execute_is_asked_for_again_too(family: Family, mappable: FakeMappable):
    one = family.first
    one.map(START, START + PAGE, mappable=mappable)
    one.load(START, 1)
    one.mm.mprotect(START, PAGE, READ_EXECUTE)
    assert one.space.load(START, 1, EXECUTE) == b"\0"
    assert mappable.calls[-1][2] == READ_EXECUTE
    # A private write and execute access at once: both reasons, one after the other.
    one.mm.mprotect(START, PAGE, ANY_ACCESS)
    assert one.mm.copy_out(START, b"\xcc") == 1


def test_pieces(family: Family, file: FakeFile):
    one = family.first
    one.map(START, START + 8 * PAGE, mappable=FakeMappable(file, piece_bytes=PAGE, delta=PAGE))
    file.bytes[PAGE : 9 * PAGE] = b"".join(bytes([i]) * PAGE for i in range(8))
    assert one.mm.read(START + 1, 8 * PAGE - 1)[PAGE - 1 :: PAGE] == bytes(range(1, 8))
    # They continue one another, and are one.
    assert one.pmas() == [(START, START + 8 * PAGE, True)]


class TestEnd:
    def test_behind_it_is_a_bus_error(self, family: Family):
        one = family.first
        one.map(START, START + 8 * PAGE, mappable=FakeMappable(FakeFile(2 * PAGE)))
        assert one.load(START, 2 * PAGE) == bytes(2 * PAGE)
        with pytest.raises(GuestBusError) as caught:
            one.load(START + 2 * PAGE + 7, 1)
        assert (caught.value.addr, caught.value.mapped) == (START + 2 * PAGE + 7, True)
        assert caught.value.errno == errno.EFAULT

    def test_copies_move_what_comes_before(self, family: Family):
        one = family.first
        one.map(START, START + 8 * PAGE, mappable=FakeMappable(FakeFile(2 * PAGE)), private=False)
        with pytest.raises(GuestBusError) as caught:
            one.mm.copy_out(START + 10, b"x" * 4 * PAGE)
        assert (caught.value.addr, caught.value.done) == (START + 2 * PAGE, 2 * PAGE - 10)
        assert one.mm.read(START + 10, 2 * PAGE - 10) == b"x" * (2 * PAGE - 10)

    def test_another_error_comes_out_as_it_is(self, family: Family, mappable: FakeMappable):
        mappable.file.size_bytes = 0
        mappable.error = PermissionError(errno.EACCES, "no")
        one = family.first
        one.map(START, START + PAGE, mappable=mappable)
        with pytest.raises(PermissionError):
            one.load(START, 1)
        assert one.mm.counters.refused == 1
        with pytest.raises(PermissionError):
            one.mm.read(START, 1)

    def test_shared_memory_without_room(self):
        with Family(Arena(HUGE)) as family:
            one = family.first
            one.map(START, START + 2 * HUGE, private=False)
            one.store(START, b"x")
            taken = family.arena.statistics().free_bytes
            fr = family.arena.allocate(taken) if taken else None
            with pytest.raises(ArenaExhaustedError):
                one.store(START + HUGE, b"x")
            assert one.load(START, 1) == b"x"
            if fr is not None:
                family.arena.dec_ref(fr)


class TestFilesThatFault:
    """Bytes that the host must not touch."""

    def test_copies(self, family: Family):
        file = FakeFile(4 * PAGE, may_fault=True)
        one = family.first
        one.map(START, START + 4 * PAGE, mappable=FakeMappable(file), private=False)
        one.mm.copy_out(START + PAGE - 3, b"across")
        assert one.mm.read(START + PAGE - 3, 6) == b"across"
        assert one.mm.zero_out(START, 2 * PAGE) == 2 * PAGE
        assert file.bytes[: 2 * PAGE] == bytes(2 * PAGE)
        file.size_bytes = PAGE + 10
        for copy in (
            lambda: one.mm.read(START + 5, 3 * PAGE),
            lambda: one.mm.copy_out(START + 5, b"x" * 3 * PAGE),
            lambda: one.mm.zero_out(START + 5, 3 * PAGE),
        ):
            with pytest.raises(GuestBusError) as caught:
                copy()
            # The page in which the file ends can be used as a whole, as with mmap(2).
            assert (caught.value.addr, caught.value.done) == (START + 2 * PAGE, 2 * PAGE - 5)


class TestMaxPerms:
    def test_a_debugger_cannot_write_what_nobody_may(self, family: Family, mappable: FakeMappable):
        mappable.max_shared_perms = READ_EXECUTE
        one = family.first
        one.map(START, START + PAGE, READ, mappable=mappable, private=False, max_perms=READ)
        with pytest.raises(GuestFaultError) as caught:
            one.mm.copy_out(START, b"x", ignore_permissions=True)
        assert caught.value.mapped
        assert one.mm.read(START, 1, ignore_permissions=True) == b"\0"

    def test_it_can_write_a_private_mapping_of_a_file_that_is_read(
        self, family: Family, mappable: FakeMappable, file: FakeFile
    ):
        one = family.first
        one.map(START, START + PAGE, READ, mappable=mappable)
        assert one.load(START, 1) == b"\0"
        one.mm.copy_out(START, b"\xcc", ignore_permissions=True)
        assert one.load(START, 1) == b"\xcc"
        assert file.bytes[0] == 0
        assert not one.space.is_mapped(START, 2)

    def test_what_a_debugger_backs_is_not_mapped(self, family: Family):
        one = family.first
        one.map(START, START + HUGE, NO_ACCESS)
        one.mm.copy_out(START, b"x", ignore_permissions=True)
        one.mm.map_resident()
        assert not one.space.pages
        one.mm.mprotect(START, PAGE, READ)
        assert one.load(START, 1) == b"x"


class TestMove:
    def test_frames_go_with_it(self, family: Family):
        one = family.first
        one.map(START, START + 2 * HUGE)
        one.store(START + PAGE, b"here")
        mm = one.mm
        with mm.mapping_lock, mm.active_lock:
            pieces = mm.vmas.remove(START, START + HUGE)
            mm.vmas.insert(START + 5 * HUGE, START + 6 * HUGE, pieces[0][2])
            removal = Removal()
            backing.move_locked(mm, START, START + HUGE, START + 5 * HUGE, removal)
            assert one.space.pages
            removal.run(mm)
        assert not one.space.pages
        family.check()
        assert one.load(START + 5 * HUGE + PAGE, 4) == b"here"
        one.mm.munmap(START + 5 * HUGE, HUGE)

    def test_shared_copies_travel(self, family: Family):
        one = family.first
        one.map(START, START + HUGE)
        one.store(START, b"here")
        child = family.fork(one)
        child.mm.mremap(START, HUGE, 2 * HUGE, may_move=True)
        family.check()


class TestProtect:
    def test_only_what_loses_is_unmapped(self, family: Family):
        one = family.first
        one.map(START, START + 4 * PAGE)
        one.mm.mprotect(START, PAGE, READ)
        one.mm.populate(START, 4 * PAGE)
        shootdowns = one.space.n_shootdowns
        one.mm.mprotect(START, 2 * PAGE, READ)
        assert one.space.n_shootdowns == shootdowns + 1
        assert sorted(one.space.pages) == [START, START + 2 * PAGE, START + 3 * PAGE]
        one.mm.mprotect(START, 4 * PAGE, ANY_ACCESS)
        assert one.space.n_shootdowns == shootdowns + 1
        one.store(START, b"x" * 4 * PAGE)
        assert len(one.mm.pmas) == 1

    def test_nothing_there(self, family: Family):
        one = family.first
        one.map(START, START + 4 * PAGE)
        one.mm.mprotect(START, PAGE, READ)
        assert one.space.n_shootdowns == 0


class TestPopulate:
    def test_files(self, family: Family, mappable: FakeMappable, file: FakeFile):
        mappable.reads_around = True
        one = family.first
        one.map(START, START + 8 * PAGE, mappable=mappable)
        one.mm.populate(START + PAGE, 2 * PAGE)
        assert sorted(one.space.pages) == [START + PAGE, START + 2 * PAGE]
        file.size_bytes = 5 * PAGE
        with pytest.raises(GuestBusError) as caught:
            one.mm.populate(START, 8 * PAGE)
        assert (caught.value.addr, caught.value.done) == (START + 5 * PAGE, 5 * PAGE)
        assert len(one.space.pages) == 5

    def test_what_can_be_done(self, family: Family):
        one = family.first
        one.map(START, START + PAGE)
        one.map(START + 2 * PAGE, START + 3 * PAGE, NO_ACCESS)
        one.map(START + 3 * PAGE, START + 4 * PAGE, mappable=FakeMappable(FakeFile(0)))
        one.map(START + 5 * PAGE, START + 6 * PAGE)
        mm = one.mm
        with mm.mapping_lock, mm.active_lock:
            backing.populate_locked(mm, START - PAGE, START + 8 * PAGE, ignore_errors=True)
        assert sorted(one.space.pages) == [START, START + 5 * PAGE]
        for start, mapped in ((START, False), (START + 2 * PAGE, True)):
            with mm.mapping_lock, mm.active_lock, pytest.raises(GuestFaultError) as caught:
                backing.populate_locked(mm, start, START + 8 * PAGE)
            assert caught.value.mapped is mapped

    def test_no_page_for_a_table(self, family: Family):
        one = family.first
        one.map(START, START + PAGE)
        one.space.map_failure = ArenaExhaustedError(1, 2, 3)
        with pytest.raises(ArenaExhaustedError):
            one.mm.populate(START, PAGE)
        one.space.map_failure = ArenaExhaustedError(1, 2, 3)
        with pytest.raises(ArenaExhaustedError):
            one.load(START, 1)
        assert one.load(START, 1) == b"\0"


class TestMapUnit:
    def test_a_fault_maps_its_unit_only(self):
        with Family(Arena(64 << 20)) as family:
            one = family.first
            one.space.map_unit_bytes = 16 * PAGE
            one.map(START + PAGE, START + HUGE)
            one.store(START + 5 * PAGE, b"x")
            assert sorted(one.space.pages) == [START + n * PAGE for n in range(1, 16)]
            one.store(START + 40 * PAGE, b"x")
            assert max(one.space.pages) == START + 47 * PAGE
            assert len(one.space.pages) == 31
