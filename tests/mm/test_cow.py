"""Copy on write: what is copied, how much around it, and what is taken without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestBusError
from kvmmm.hostarch.access import READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        made.first.map(START, START + 4 * HUGE)
        yield made


def test_a_window_is_copied(family: Family):
    parent = family.first
    parent.store(START + 3 * PAGE, b"x" * (3 * HUGE))
    child = family.fork(parent)
    old = parent.offset(START)
    child.store(START + HUGE + 5 * PAGE, b"y")
    assert child.mm.counters.cow_breaks == 1
    assert child.mm.counters.copied_bytes == HUGE
    assert [pma for pma in child.pmas() if not pma[2]] == [(START + HUGE, START + 2 * HUGE, False)]
    assert child.offset(START) == old
    assert child.load(START + HUGE, 5 * PAGE + 2) == b"x" * (5 * PAGE) + b"yx"


def test_a_window_is_clipped_to_the_pma_and_the_vma(family: Family):
    parent = family.first
    parent.map(0x10000, 0x20000)
    parent.mm.mprotect(0x18000, 0x8000, READ)
    parent.mm.populate(0x14000, 0xC000)
    child = family.fork(parent)
    # Both have the same rules now, and are one pma.
    assert child.pmas() == [(0x14000, 0x20000, True)]
    child.store(0x16000, b"x")
    assert child.pmas() == [(0x14000, 0x18000, False), (0x18000, 0x20000, True)]
    family.check()


def test_resident_bytes_stay_the_same(family: Family):
    parent = family.first
    parent.store(START, b"x")
    child = family.fork(parent)
    before = child.mm.rss_bytes
    child.store(START, b"y")
    assert child.mm.rss_bytes == child.mm.max_rss_bytes == before


def test_reads_copy_nothing(family: Family):
    parent = family.first
    parent.store(START, b"x")
    child = family.fork(parent)
    child.space.pages.clear()
    assert child.load(START, 1) == b"x"
    assert child.mm.read(START, 1) == b"x"
    assert child.mm.read(START, 1, ignore_permissions=True) == b"x"
    assert child.mm.counters.cow_breaks == 0
    assert child.offset(START) == parent.offset(START)


@pytest.mark.parametrize("by_cpu", [True, False])
def test_around_code_only_what_is_written(family: Family, by_cpu: bool):
    parent = family.first
    parent.map(START, START + HUGE, READ_EXECUTE | WRITE)
    parent.store(START, b"x" * 10 * PAGE)
    child = family.fork(parent)
    if by_cpu:
        child.store(START + 5 * PAGE + 1, b"\xcc")
    else:
        child.mm.copy_out(START + 5 * PAGE + 1, b"\xcc")
    assert child.mm.counters.copied_bytes == PAGE
    assert child.load(START + 5 * PAGE, 3) == b"x\xccx"
    assert parent.load(START + 5 * PAGE, 3) == b"xxx"


@pytest.mark.parametrize("kind", ["stack", "grows_down"])
def test_on_a_stack_a_page_around_it(family: Family, kind: str):
    parent = family.first
    parent.map(START, START + HUGE, **{kind: True})
    parent.store(START, b"x" * 10 * PAGE)
    child = family.fork(parent)
    child.store(START + 5 * PAGE, b"y")
    assert child.mm.counters.copied_bytes == 3 * PAGE
    assert [pma[:2] for pma in child.pmas() if not pma[2]] == [(START + 4 * PAGE, START + 7 * PAGE)]


def test_the_last_owner_of_a_window_takes_it(family: Family):
    """The pma is still shared elsewhere; this window is not."""
    parent = family.first
    parent.store(START, b"x" * 2 * HUGE)
    child = family.fork(parent)
    child.store(START, b"y")  # its window is the child's own now
    offset = parent.offset(START)
    parent.store(START, b"z")
    assert parent.mm.counters.cow_breaks == 0
    assert parent.offset(START) == offset
    assert parent.mm.pmas.find(START + HUGE)[2].need_cow
    parent.store(START + HUGE, b"z")
    assert parent.mm.counters.cow_breaks == 1


def test_owning_follows_the_vmas(family: Family):
    parent = family.first
    parent.store(START, b"x")
    child = family.fork(parent)
    family.end(child)
    parent.mm.mprotect(START + PAGE, PAGE, READ)
    parent.store(START, b"y")
    family.check()
    assert not parent.space.is_mapped(START + PAGE, WRITE)
    parent.mm.mprotect(START + PAGE, PAGE, READ_WRITE)
    parent.store(START + PAGE, b"y")
    assert parent.mm.counters.cow_breaks == 0


def test_a_forbidden_write_stays_forbidden(family: Family):
    from kvmmm.errors import GuestFaultError

    parent = family.first
    parent.store(START, b"x")
    parent.mm.mprotect(START, PAGE, READ)
    child = family.fork(parent)
    with pytest.raises(GuestFaultError):
        child.store(START, b"y")
    assert child.mm.counters.cow_breaks == 0
    # A debugger's breakpoint is the child's own.
    assert child.mm.copy_out(START, b"\xcc", ignore_permissions=True) == 1
    assert parent.load(START, 1) == b"x"
    assert child.load(START, 1) == b"\xcc"
    family.check()


def test_mprotect_gives_no_write_back_to_what_is_shared(family: Family):
    parent = family.first
    parent.store(START, b"x")
    child = family.fork(parent)
    for perms in (READ, READ_WRITE):
        parent.mm.mprotect(START, 4 * HUGE, perms)
        family.check()
    parent.store(START, b"y")
    assert child.load(START, 1) == b"x"


def test_copies_are_one_pma_where_they_can_be(family: Family):
    parent = family.first
    parent.store(START, b"x" * 4 * HUGE)
    child = family.fork(parent)
    for i in range(4):
        child.store(START + i * HUGE, b"y")
    assert child.pmas() == [(START, START + 4 * HUGE, False)]


def test_one_shootdown_a_copy_before_the_old_reference_goes(
    family: Family, monkeypatch: pytest.MonkeyPatch
):
    parent = family.first
    parent.store(START, b"x")
    child = family.fork(parent)
    frame = child.offset(START)
    unmap, n_unmaps = child.space.unmap, []

    def check(ranges: object) -> None:
        n_unmaps.append(ranges)
        assert family.arena.ref_count(frame) == 2
        unmap(ranges)  # type: ignore[arg-type]

    monkeypatch.setattr(child.space, "unmap", check)
    child.store(START + 7, b"y")
    assert len(n_unmaps) == 1
    assert family.arena.ref_count(frame) == 1


def test_a_large_host_copy_breaks_all_it_writes(family: Family):
    parent = family.first
    parent.store(START, b"x" * 4 * HUGE)
    child = family.fork(parent)
    shootdowns = child.space.n_shootdowns
    child.mm.copy_out(START + 10, b"y" * (3 * HUGE))
    assert child.space.n_shootdowns == shootdowns + 1
    assert child.mm.read(START, 3 * HUGE + 12) == b"x" * 10 + b"y" * (3 * HUGE) + b"xx"
    assert parent.load(START, 3 * HUGE) == b"x" * 3 * HUGE


class TestFiles:
    """What is a file's is copied when it is written privately."""

    @pytest.fixture
    def file(self) -> FakeFile:
        made = FakeFile(4 * HUGE)
        made.bytes[:] = b"f" * len(made.bytes)
        return made

    @pytest.mark.parametrize("reads_around", [False, True])
    @pytest.mark.parametrize("read_first", [False, True])
    def test_a_private_write(
        self, family: Family, file: FakeFile, reads_around: bool, read_first: bool
    ):
        mappable = FakeMappable(file)
        mappable.reads_around = reads_around
        one = family.first
        one.map(START, START + 2 * HUGE, mappable=mappable, offset=HUGE)
        if read_first:
            assert one.load(START, 1) == b"f"
        one.store(START + 5, b"mine")
        assert one.load(START + 4, 6) == b"fminef"
        assert file.bytes == b"f" * len(file.bytes)
        assert all(not access & WRITE for _, _, access in mappable.calls)
        found = one.mm.pmas.find(START)
        assert found is not None
        assert found[2].private
        assert found[2].file is family.arena

    def test_the_file_ends_in_the_middle_of_a_window(self, family: Family, file: FakeFile):
        mappable = FakeMappable(file)
        mappable.reads_around = True
        one = family.first
        one.map(START, START + 2 * HUGE, mappable=mappable)
        assert one.load(START, 1) == b"f"
        file.size_bytes = 8 * PAGE + 100  # nobody told us
        one.store(START + 3 * PAGE, b"mine")
        # Whole pages only.
        assert [pma[:2] for pma in one.pmas() if not pma[2]] == [(START, START + 8 * PAGE)]
        with pytest.raises(GuestBusError) as caught:
            one.store(START + 8 * PAGE + 5, b"no")
        assert caught.value.addr == START + 8 * PAGE + 5
        assert one.mm.counters.refused == 1
        assert one.load(START + 3 * PAGE, 5) == b"minef"

    def test_nothing_can_be_read(self, family: Family, file: FakeFile):
        mappable = FakeMappable(file)
        one = family.first
        one.map(START, START + 2 * HUGE, mappable=mappable)
        assert one.load(START, 1) == b"f"
        file.size_bytes = 0
        before = one.pmas(), family.arena.statistics().used_bytes
        with pytest.raises(GuestBusError):
            one.store(START, b"no")
        assert before == (one.pmas(), family.arena.statistics().used_bytes)

    def test_both_have_it_until_one_writes(self, family: Family, file: FakeFile):
        mappable = FakeMappable(file)
        one = family.first
        one.map(START, START + HUGE, mappable=mappable)
        one.store(START, b"mine")
        child = family.fork(one)
        child.store(START, b"MINE")
        assert one.load(START, 5) == b"minef"
        one.mm.munmap(START, HUGE)
        assert child.load(START, 5) == b"MINEf"


class TestSmallArena:
    def test_a_copy_shrinks_to_the_page(self):
        with Family(Arena(2 * HUGE)) as family:
            parent = family.first
            parent.map(START, START + HUGE)
            parent.store(START, b"x" * HUGE)
            child = family.fork(parent)
            taken = family.arena.allocate(HUGE - 2 * PAGE)
            child.store(START + 5 * PAGE, b"y")
            child.store(START + 9 * PAGE, b"y")
            assert child.mm.counters.copied_bytes == 2 * PAGE
            before = child.pmas(), dict(child.space.pages)
            with pytest.raises(ArenaExhaustedError):
                child.store(START + 7 * PAGE, b"y")
            assert before == (child.pmas(), dict(child.space.pages))
            family.check()
            assert child.load(START + 7 * PAGE, 1) == b"x"
            family.arena.dec_ref(taken)
            child.store(START + 7 * PAGE, b"y")
            assert child.load(START + 5 * PAGE, 5 * PAGE)[::PAGE] == b"yxyxy"
            assert parent.load(START, HUGE) == b"x" * HUGE

    def test_it_ends_in_the_middle_of_a_copy(self):
        """What was done is kept, what was not can be done later."""
        with Family(Arena(5 * HUGE)) as family:
            parent = family.first
            parent.map(START, START + 3 * HUGE)
            parent.mm.copy_out(START, b"x" * 3 * HUGE)
            child = family.fork(parent)
            with pytest.raises(ArenaExhaustedError) as caught:
                child.mm.copy_out(START, b"y" * 3 * HUGE)
            notes = " ".join(caught.value.__notes__)
            assert hex(START + 2 * HUGE) in notes
            assert f"{2 * HUGE} bytes" in notes
            family.check()
            assert child.mm.read(START, 3 * HUGE) == b"y" * 2 * HUGE + b"x" * HUGE
            assert parent.mm.read(START, 3 * HUGE) == b"x" * 3 * HUGE
            parent.mm.munmap(START, HUGE)
            assert child.mm.copy_out(START, b"z" * 3 * HUGE) == 3 * HUGE


def test_pages_of_a_pin_are_not_a_relatives(family: Family):
    """A reference more, and yet nobody to copy from."""
    parent = family.first
    parent.store(START, b"x")
    with parent.mm.pin_frames(START, 1, READ):
        parent.mm.mprotect(START, HUGE, READ)
        parent.mm.mprotect(START, HUGE, READ_WRITE)
        offset = parent.offset(START)
        parent.store(START, b"y")
        assert parent.offset(START) == offset
        assert family.arena.ref_count(offset) == 2
        with family.arena.view_of(FileRange(offset, offset + 1)) as view:
            assert bytes(view) == b"y"
