"""fork: a child with the same memory, and neither sees the other change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.vma import LOCK_EAGER
from tests.fakes import FakeAddressSpace, FakeFile, FakeMappable
from tests.mm.family import HUGE, MAX, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.mm import MemoryManager

START = 8 * HUGE


@pytest.fixture(params=[False, True], ids=["tables", "memslots"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with Family(Arena(64 << 20), walks_frames=request.param) as made:
        made.first.map(START, START + 4 * HUGE, name="[memory]")
        yield made


@pytest.fixture
def process_family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        made.first.map(START, START + 4 * HUGE, name="[memory]")
        yield made


def test_neither_sees_the_other_write(family: Family):
    parent = family.first
    parent.store(START, b"before")
    child = family.fork(parent)
    family.check()
    assert child.load(START, 6) == b"before"
    parent.store(START, b"PARENT")
    family.check()
    child.store(START + 1, b"CHILD")
    family.check()
    assert parent.load(START, 6) == b"PARENT"
    assert child.load(START, 6) == b"bCHILD"
    # And what neither had touched is its own, too.
    child.store(START + 3 * HUGE, b"new")
    assert parent.load(START + 3 * HUGE, 3) == bytes(3)


def test_host_copies_see_it_as_a_cpu_does(family: Family):
    parent = family.first
    parent.mm.copy_out(START + HUGE - 2, b"over the edge")
    child = family.fork(parent)
    child.mm.copy_out(START + HUGE, b"CHILD")
    assert parent.mm.read(START + HUGE - 2, 13) == b"over the edge"
    assert child.mm.read(START + HUGE - 2, 13) == b"ovCHILDe edge"


def test_forks_of_forks(family: Family):
    family.first.store(START, b"0")
    line = [family.first]
    for i in range(1, 5):
        line.append(family.fork(line[-1]))
        line[-1].store(START + i * PAGE, bytes([i]))
        line[-1].store(START, b"%d" % i)
        family.check()
    for i, one in enumerate(line):
        assert one.load(START, 1) == b"%d" % i
        for j in range(1, 5):
            assert one.load(START + j * PAGE, 1) == (bytes([j]) if j <= i else b"\0")
    family.end(line[2])
    family.end(line[0])
    family.check()
    assert line[4].load(START + 2 * PAGE, 1) == b"\2"


def test_layout_limits_and_heap_are_the_childs_own(family: Family):
    parent = family.first.mm
    parent.limits.stack_bytes = 123 << 12
    parent.brk_start = parent.brk_end = START + 8 * HUGE
    parent.mlock(START, PAGE)
    child = family.fork(family.first).mm
    assert child.layout is parent.layout
    assert child.limits.stack_bytes == 123 << 12
    child.limits.stack_bytes = 0
    assert parent.limits.stack_bytes == 123 << 12
    assert (child.brk_start, child.brk_end) == (parent.brk_start, parent.brk_end)
    assert parent.locked_bytes == PAGE
    assert child.locked_bytes == 0
    assert not any(vma.lock_mode for _, _, vma in child.vmas)
    assert child.data_bytes == parent.data_bytes == 4 * HUGE
    assert child.usage_bytes == parent.usage_bytes
    assert [(s, e) for s, e, _ in child.vmas] == [(START, START + 4 * HUGE)]


def test_figures_of_a_child(family: Family):
    family.first.store(START, b"x")
    child = family.fork(family.first).mm
    assert child.rss_bytes == child.max_rss_bytes == HUGE
    assert child.counters.faults == 0


def test_mlockall_is_not_inherited(family: Family):
    family.first.mm.mlockall(current=False, future=LOCK_EAGER)
    assert family.fork(family.first).mm.lock_mode == 0


def test_dontfork(family: Family):
    parent = family.first
    for addr in (START, START + PAGE, START + 2 * PAGE):
        parent.store(addr, b"here")
    page = START + PAGE, START + 2 * PAGE
    with parent.mm.mapping_lock:
        parent.mm.vmas.mutate(*page, lambda _s, _e, vma: vma.replaced(dontfork=True))
    child = family.fork(parent)
    family.check()
    with pytest.raises(GuestFaultError, match="nothing is mapped there"):
        child.load(START + PAGE, 1)
    assert not child.space.is_mapped(START + PAGE, READ)
    assert child.load(START + 2 * PAGE, 4) == b"here"
    # It stays the parent's, and is not to be copied.
    before = parent.mm.counters.cow_breaks
    parent.store(START + PAGE, b"more")
    assert parent.mm.counters.cow_breaks == before
    with parent.mm.mapping_lock:
        parent.mm.vmas.mutate(*page, lambda _s, _e, vma: vma.replaced(dontfork=False))


class TestMappables:
    def test_shared_memory_is_shared(self, family: Family):
        parent = family.first
        parent.map(0x10000, 0x20000, private=False)
        parent.store(0x10000, b"one")
        child = family.fork(parent)
        assert child.load(0x10000, 3) == b"one"
        child.store(0x10001, b"X")
        assert parent.load(0x10000, 3) == b"oXe"
        parent.mm.munmap(0x10000, 0x10000)
        assert child.load(0x10000, 3) == b"oXe"

    def test_a_file_is_told_of_the_child(self, family: Family):
        file = FakeFile(64 * PAGE)
        mappable = FakeMappable(file)
        parent = family.first
        parent.map(0x10000, 0x14000, mappable=mappable, offset=4 * PAGE, private=False)
        parent.map(0x20000, 0x24000, mappable=mappable, offset=0)
        file.bytes[4 * PAGE : 4 * PAGE + 4] = b"file"
        assert parent.load(0x10000, 4) == b"file"
        child = family.fork(parent)
        assert sorted(m[1:] for m in mappable.mappings if m[0] is child.mm) == [
            (0x10000, 0x14000, 4 * PAGE, True), (0x20000, 0x24000, 0, False),
        ]  # fmt: skip
        assert child.mm.pmas.find(0x10000) is None
        assert child.load(0x10000, 4) == b"file"
        # A copy of the parent's is handed on, what is still the file's is not.
        parent.store(0x20000, b"mine")
        another = family.fork(parent)
        assert another.load(0x20000, 4) == b"mine"
        assert file.bytes[:4] == bytes(4)
        family.end(child)
        family.end(another)
        assert {m[0] for m in mappable.mappings} == {parent.mm}

    def test_what_arrives_while_it_is_filled(self, process_family: Family):
        """The file is cut off when the child knows of it, and has nothing yet."""
        file = FakeFile(64 * PAGE)
        mappable = FakeMappable(file)
        parent = process_family.first
        parent.map(0x10000, 0x14000, mappable=mappable)
        parent.store(0x10000, b"copy")
        parent.store(0x11000, b"stays")
        add_mapping = mappable.add_mapping

        def cut(space: MemoryManager, ar: AddrRange, offset: int, *, writable: bool) -> None:
            add_mapping(space, ar, offset, writable=writable)
            if space is not parent.mm:
                space.invalidate(AddrRange(0x10000, 0x11000), private=True)

        mappable.add_mapping = cut  # type: ignore[method-assign, assignment]
        child = process_family.fork(parent)
        mappable.add_mapping = add_mapping  # type: ignore[method-assign]
        assert child.mm.pmas.find(0x10000) is None
        assert child.load(0x10000, 4) == bytes(4)
        assert child.load(0x11000, 5) == b"stays"

    def test_one_that_refuses(self, process_family: Family):
        mappable = FakeMappable(FakeFile(64 * PAGE))
        other = FakeMappable(FakeFile(64 * PAGE))
        parent = process_family.first
        parent.map(0x10000, 0x14000, mappable=mappable)
        parent.map(0x20000, 0x24000, mappable=other)
        parent.store(START, b"x")

        def refuse(*_args: object, **_more: object) -> None:
            raise PermissionError(13, "no")

        other.add_mapping = refuse  # type: ignore[method-assign]
        before = parent.pmas()
        with pytest.raises(PermissionError):
            process_family.fork(parent)
        assert parent.pmas() == before
        assert {m[0] for m in mappable.mappings} == {parent.mm}
        del other.add_mapping


class TestProcesses:
    """Over page tables: frames are shared."""

    def test_nothing_is_copied_until_it_is_written(self, process_family: Family):
        parent = process_family.first
        for i in range(4):
            parent.store(START + i * HUGE, b"x")
        used_bytes = process_family.arena.statistics().used_bytes
        child = process_family.fork(parent)
        assert process_family.arena.statistics().used_bytes == used_bytes
        assert all(pma[2] for pma in parent.pmas() + child.pmas())
        assert [child.load(START + i * HUGE, 1) for i in range(4)] == [b"x"] * 4
        assert child.offset(START) == parent.offset(START)
        assert process_family.arena.statistics().used_bytes == used_bytes

    def test_a_child_begins_with_the_translations(self, process_family: Family):
        parent = process_family.first
        parent.store(START, b"x")
        child = process_family.fork(parent)
        assert child.space.is_mapped(START, READ)
        assert not child.space.is_mapped(START, READ_WRITE)
        assert not parent.space.is_mapped(START, READ_WRITE)

    def test_not_with_those_of_files(self, process_family: Family):
        parent = process_family.first
        mappable = FakeMappable(FakeFile(64 * PAGE))
        parent.map(0x10000, 0x14000, mappable=mappable, private=False)
        parent.store(0x10000, b"x")
        parent.store(START, b"x")
        child = process_family.fork(parent)
        assert not child.space.is_mapped(0x10000, READ)
        assert child.space.is_mapped(START, READ)
        assert child.space.n_shootdowns == 1

    def test_one_shootdown_where_translations_cannot_be_given(
        self, process_family: Family, monkeypatch: pytest.MonkeyPatch
    ):
        parent = process_family.first
        for i in range(4):
            parent.store(START + i * HUGE, b"x")
        parent.mm.mprotect(START + HUGE, HUGE, READ)
        monkeypatch.setattr(parent.space, "fork_into", lambda _child: False)
        before = parent.space.n_shootdowns
        child = process_family.fork(parent)
        assert parent.space.n_shootdowns == before + 1
        assert not child.space.pages
        assert child.load(START, 1) == b"x"

    def test_a_second_fork_needs_none(
        self, process_family: Family, monkeypatch: pytest.MonkeyPatch
    ):
        parent = process_family.first
        parent.store(START, b"x")
        monkeypatch.setattr(parent.space, "fork_into", lambda _child: False)
        process_family.fork(parent)
        before = parent.space.n_shootdowns
        process_family.fork(parent)
        assert parent.space.n_shootdowns == before

    def test_a_sole_owner_keeps_its_frames(self, process_family: Family):
        parent = process_family.first
        parent.store(START, b"x")
        offset = parent.offset(START)
        child = process_family.fork(parent)
        process_family.end(child)
        used_bytes = process_family.arena.statistics().used_bytes
        parent.store(START, b"y")
        assert parent.offset(START) == offset
        assert parent.mm.counters.cow_breaks == 0
        assert process_family.arena.statistics().used_bytes == used_bytes
        assert not any(pma[2] for pma in parent.pmas())

    def test_512_pmas(self, process_family: Family):
        """As many pmas as 1 GiB has windows, no two of which are one."""
        parent = process_family.first
        parent.map(0x100000, 0x100000 + 1024 * PAGE)
        for i in range(0, 1024, 2):
            parent.mm.populate(0x100000 + i * PAGE, PAGE)
        assert len(parent.mm.pmas) == 512
        child = process_family.fork(parent)
        assert len(child.mm.pmas) == 512


class TestFailures:
    """No child then, and the parent is as it was."""

    def test_no_frames_for_copies(self):
        with Family(Arena(4 * HUGE), walks_frames=True) as family:
            parent = family.first
            parent.map(START, START + 4 * HUGE)
            for i in range(3):
                parent.store(START + i * HUGE, b"here")
            before = parent.pmas(), dict(parent.space.pages), family.arena.statistics().used_bytes
            with pytest.raises(ArenaExhaustedError):
                family.fork(parent)
            assert before == (
                parent.pmas(), dict(parent.space.pages), family.arena.statistics().used_bytes,
            )  # fmt: skip
            parent.store(START, b"still")
            parent.mm.munmap(START + HUGE, 2 * HUGE)
            assert family.fork(parent).load(START, 5) == b"still"

    def test_no_tables(self, process_family: Family):
        parent = process_family.first
        parent.store(START, b"here")
        parent.space.fork_failure = ArenaExhaustedError(1, 2, 3)
        before = parent.pmas(), dict(parent.space.pages)
        with pytest.raises(ArenaExhaustedError):
            process_family.fork(parent)
        assert before == (parent.pmas(), dict(parent.space.pages))
        process_family.check()

    def test_no_references(self, process_family: Family, monkeypatch: pytest.MonkeyPatch):
        parent = process_family.first
        parent.store(START, b"here")

        def fail(_arena: Arena, _ranges: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(Arena, "inc_ref_many", fail)
            space = FakeAddressSpace(MAX)
            with pytest.raises(MemoryError):
                parent.mm.fork(space)
            assert not space.pages
        process_family.check()
        parent.store(START, b"more")

    def test_the_reservation_stays_the_callers(self):
        arena = Arena(2 * HUGE + MAX)
        reservation = arena.reserve(MAX, align_bytes=HUGE)
        assert reservation is not None
        with Family(arena) as family:
            parent = family.first
            parent.map(START, START + HUGE)
            parent.store(START, b"here")
            parent.space.fork_failure = ArenaExhaustedError(1, 2, 3)
            with pytest.raises(ArenaExhaustedError):
                parent.mm.fork(FakeAddressSpace(MAX), reservation)
            space = FakeAddressSpace(MAX)
            child = parent.mm.fork(space, reservation)
            space.on_fault = child.handle_user_fault
            space.store(START + 1, b"E")
            assert child.read(START, 4) == b"hEre"
            child.close()
            assert parent.load(START, 4) == b"here"
