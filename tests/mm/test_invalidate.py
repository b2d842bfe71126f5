"""invalidate: a mappable takes back what it gave."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.ranges import AddrRange
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mm.family import Process

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        yield made


@pytest.fixture
def file() -> FakeFile:
    return FakeFile(64 * PAGE)


def test_frames_are_asked_for_again(family: Family, file: FakeFile):
    mappable = FakeMappable(file)
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=mappable, private=False)
    one.store(START, b"x" * 4 * PAGE)
    one.mm.invalidate(AddrRange(START + PAGE, START + 2 * PAGE), private=False)
    assert sorted(one.space.pages) == [START, START + 2 * PAGE, START + 3 * PAGE]
    assert file.references[PAGE] == 0
    mappable.delta = 32 * PAGE
    assert one.load(START + PAGE, 1) == b"\0"
    family.check()


def test_private_copies_stay_unless_the_file_was_cut(family: Family, file: FakeFile):
    one = family.first
    one.map(START, START + 8 * PAGE, 7, mappable=FakeMappable(file))
    one.load(START, 8 * PAGE)
    one.store(START + 2 * PAGE, b"mine")
    rss = one.mm.rss_bytes
    one.mm.invalidate(AddrRange(START, START + 4 * PAGE), private=False)
    assert one.mm.rss_bytes == rss - 3 * PAGE
    assert one.load(START + 2 * PAGE, 4) == b"mine"
    one.mm.invalidate(AddrRange(START, START + 8 * PAGE), private=True)
    assert one.mm.rss_bytes == 0
    assert one.mm.max_rss_bytes == rss
    assert not one.space.pages
    assert one.load(START + 2 * PAGE, 4) == bytes(4)


def test_the_file_is_cut(family: Family, file: FakeFile):
    mappable = FakeMappable(file)
    one = family.first
    one.map(START, START + 8 * PAGE, mappable=mappable, private=False)
    one.store(START, b"x" * 8 * PAGE)
    file.size_bytes = 3 * PAGE
    with mappable._mappings_lock:
        mappable._mappings.invalidate(3 * PAGE, 64 * PAGE, private=True)
    assert one.load(START + 2 * PAGE, PAGE) == b"x" * PAGE
    for access in (one.load, one.mm.read):
        with pytest.raises(GuestBusError):
            access(START + 3 * PAGE, 1)


def test_nothing_there_is_no_shootdown(family: Family):
    one = family.first
    one.map(START, START + HUGE)
    one.mm.invalidate(AddrRange(0, 256 << 20), private=True)
    assert one.space.n_shootdowns == 0


def test_translations_go_before_references(
    family: Family, file: FakeFile, monkeypatch: pytest.MonkeyPatch
):
    one = family.first
    one.map(START, START + 4 * PAGE, mappable=FakeMappable(file), private=False)
    one.load(START, 4 * PAGE)
    unmap = one.space.unmap
    seen = []

    def check(ranges: list[AddrRange]) -> None:
        seen.append([file.references[n * PAGE] for n in range(4)])
        unmap(ranges)

    monkeypatch.setattr(one.space, "unmap", check)
    one.mm.invalidate(AddrRange(START, START + 4 * PAGE), private=False)
    assert seen == [[1, 1, 1, 1]]
    assert not any(file.references.values())


class Work:
    """What threads repeat on one process until told to stop."""

    def __init__(self, one: Process, mappable: FakeMappable) -> None:
        self.one = one
        self.mappable = mappable
        self.stop = threading.Event()
        self.failures: list[BaseException] = []

    def repeat(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not self.stop.is_set():
                    work()
            except BaseException as e:
                self.failures.append(e)
                raise

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def take_back(self) -> None:
        with self.mappable._mappings_lock:
            self.mappable._mappings.invalidate(0, 8 * PAGE, private=True)

    def fault(self) -> None:
        for page in range(8):
            for base in (START, START + HUGE, START + 2 * HUGE):
                self.one.mm.handle_user_fault(base + page * PAGE, READ)
                self.one.mm.handle_user_fault(base + page * PAGE, WRITE)

    def copy(self) -> None:
        mm = self.one.mm
        mm.copy_out(START, b"x" * 8 * PAGE)
        mm.copy_out(START + HUGE, b"y" * 8 * PAGE)
        assert mm.read(START + HUGE, 8 * PAGE) == b"y" * 8 * PAGE
        mm.read(START + 2 * HUGE, 8 * PAGE)


def test_while_others_fault_copy_and_fork(file: FakeFile):
    """Threads of one family, and a file that is taken back all the time."""
    with Family(Arena(64 << 20)) as family:
        mappable = FakeMappable(file)
        mappable.reads_around = True
        one = family.first
        one.map(START, START + 8 * PAGE, mappable=mappable, private=False)
        one.map(START + HUGE, START + 2 * HUGE)
        one.map(START + 2 * HUGE, START + 2 * HUGE + 8 * PAGE, mappable=mappable)
        work = Work(one, mappable)
        threads = [work.repeat(each) for each in (work.take_back, work.fault, work.copy)]
        try:
            for _ in range(30):
                child = family.fork(one)
                child.mm.copy_out(START + HUGE, b"z" * 8 * PAGE)
                assert child.mm.read(START + HUGE, 8 * PAGE) == b"z" * 8 * PAGE
                family.end(child)
        finally:
            work.stop.set()
            for thread in threads:
                thread.join(timeout=30)
        assert not work.failures
        assert not any(thread.is_alive() for thread in threads)
