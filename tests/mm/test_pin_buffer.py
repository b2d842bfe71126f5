"""mm.pin: guest memory itself as one buffer, for as long as anybody holds it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import (
    ArenaExhaustedError,
    GuestBusError,
    GuestFaultError,
    MmError,
    RangeError,
    SyscallError,
)
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm import pin
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


def n_mappings() -> int:
    return len(Path("/proc/self/maps").read_bytes().splitlines())


def test_exactly_these_bytes(family: Family):
    one = family.first
    one.store(START + PAGE - 3, b"abcdef")
    with one.mm.pin(START + PAGE - 3, 6) as view:
        assert type(view) is memoryview
        assert (view.nbytes, view.format, view.contiguous, view.readonly) == (6, "B", True, False)
        assert view == b"abcdef"
        one.store(START + PAGE, b"D")
        assert view == b"abcDef"
        view[2:] = b"1234"
        assert one.load(START + PAGE - 3, 6) == b"ab1234"
        assert one.mm.read(START + PAGE - 3, 6) == b"ab1234"
        family.check()
    assert not one.mm.pins
    family.check()


def test_scattered_frames_lie_side_by_side(family: Family):
    one = family.first
    # Each copy on write takes its own frame, and never that of its neighbour.
    child = family.fork(one)
    for page in (5, 3, 4, 0, 2, 1):
        child.store(START + page * PAGE, bytes([0x61 + page]) * PAGE)
        one.store(START + page * PAGE, b"other")
    family.check()
    offsets = [child.offset(START + page * PAGE) for page in range(6)]
    with child.mm.pin(START + 1, 6 * PAGE - 2) as view:
        assert view == b"".join(bytes([0x61 + page]) * PAGE for page in range(6))[1:-1]
        view[:] = bytes(i * 11 & 0xFF for i in range(len(view)))
        assert child.mm.read(START + 1, len(view)) == view
    assert [child.offset(START + page * PAGE) for page in range(6)] == offsets


def test_pieces_in_any_order(family: Family):
    """mremap turns the guest's order around; the buffer is the guest's."""
    one = family.first
    one.store(START, b"A" * PAGE + b"B" * PAGE + b"C" * PAGE)
    there = START + 5 * HUGE
    one.mm.mmap(4 * PAGE, READ_WRITE, addr=there, fixed=True)
    for i in range(3):
        one.mm.mremap(START + i * PAGE, PAGE, PAGE, may_move=True, new_addr=there + (2 - i) * PAGE)
    with one.mm.pin(there, 4 * PAGE) as view:
        assert bytes(view) == b"C" * PAGE + b"B" * PAGE + b"A" * PAGE + bytes(PAGE)


def test_read_only(family: Family):
    one = family.first
    one.store(START, b"data")
    one.mm.mprotect(START, PAGE, READ)
    with pytest.raises(GuestFaultError) as caught:
        one.mm.pin(START, 4)
    assert (caught.value.addr, caught.value.mapped) == (START, True)
    with one.mm.pin(START, 4, writable=False) as view:
        assert view.readonly
        assert view == b"data"
        with pytest.raises(TypeError):
            view[0] = 1
        one.mm.mprotect(START, PAGE, READ_WRITE)
        one.store(START, b"DATA")
        assert view == b"DATA"


def test_a_range_or_an_address(family: Family):
    one = family.first
    with one.mm.pin(AddrRange(START + 1, START + 9)) as view:
        assert len(view) == 8
    mm: Any = one.mm
    for args in ((START,), (AddrRange(START, START + 1), 1)):
        with pytest.raises(TypeError):
            mm.pin(*args)
    with pytest.raises(RangeError):
        one.mm.pin(AddrRange(START, START))
    for addr, length in ((START, 0), (START, -1), (-PAGE, PAGE), ((1 << 64) - 1, 2)):
        with pytest.raises(RangeError):
            one.mm.pin(addr, length)


@pytest.mark.parametrize("at", [0, 5, PAGE, 2 * PAGE - 1])
def test_all_or_nothing(family: Family, at: int):
    one = family.first
    end = START + 4 * HUGE
    with pytest.raises(GuestFaultError) as caught:
        one.mm.pin(end - at, at + 1)
    assert (caught.value.addr, caught.value.done, caught.value.mapped) == (end, 0, False)
    assert not one.mm.pins
    family.check()


def test_behind_a_files_end(family: Family):
    one = family.first
    one.map(0x10000, 0x14000, mappable=FakeMappable(FakeFile(2 * PAGE)))
    with pytest.raises(GuestBusError) as caught:
        one.mm.pin(0x11000, 2 * PAGE)
    assert caught.value.addr == 0x12000
    assert not one.mm.pins


def test_no_memory_left(family: Family):
    one = family.first
    hoard = family.arena.allocate(family.arena.statistics().largest_free_bytes)
    with pytest.raises(ArenaExhaustedError):
        one.mm.pin(START, PAGE)
    assert not one.mm.pins
    family.arena.dec_ref(hoard)


class TestHowLongItLives:
    def test_until_the_last_buffer(self, family: Family):
        one = family.first
        before = n_mappings()
        view = one.mm.pin(START, 4 * PAGE)
        parts = [view[:PAGE], view[PAGE:].cast("Q")]
        view.release()
        assert family.arena.ref_count(one.offset(START)) == 2
        parts[1][0] = 7
        parts.pop(0).release()
        assert len(one.mm.pins) == 1
        del parts[0]
        assert not one.mm.pins
        assert family.arena.ref_count(one.offset(START)) == 1
        assert n_mappings() == before
        assert one.mm.read_int(START + PAGE, 8) == 7

    def test_longer_than_the_mapping(self, family: Family):
        one = family.first
        one.store(START, b"kept")
        used_bytes = family.arena.statistics().used_bytes
        with one.mm.pin(START, 4) as view:
            one.mm.munmap(START, 4 * HUGE)
            assert family.arena.statistics().used_bytes == PAGE
            one.map(START, START + HUGE)
            one.store(START, b"else")
            assert view == b"kept"
            view[:] = b"more"
            assert one.load(START, 4) == b"else"
        assert family.arena.statistics().used_bytes <= used_bytes

    def test_longer_than_all_of_it(self):
        family = Family(Arena(64 << 20))
        one = family.first
        one.map(START, START + HUGE)
        one.store(START, b"kept")
        view = one.mm.pin(START, 4)
        one.mm.close()
        assert view == b"kept"
        family.arena.close()
        view[:2] = b"KE"
        assert view == b"KEpt"
        view.release()
        assert not one.mm.pins

    def test_a_file_in_memory_is_somebody_elses(self, family: Family):
        """The same frames for every process that maps them."""
        one = family.first
        memory = SharedMemory(family.arena, HUGE)
        one.map(0x200000, 0x400000, mappable=memory, private=False)
        two = family.fork(one)
        with one.mm.pin(0x200000 + 5, 3) as view:
            two.store(0x200005, b"two")
            assert view == b"two"

    def test_a_fork_gives_copies(self, family: Family):
        one = family.first
        one.store(START, b"both" * 2048)
        with one.mm.pin(START, 2 * PAGE) as view:
            two = family.fork(one)
            two.store(START, b"TWO!")
            assert bytes(view[:8]) == b"bothboth"
            view[:4] = b"one!"
            one.store(START + PAGE, b"ONE!")
            assert bytes(view[PAGE : PAGE + 4]) == b"ONE!"
            assert two.load(START, 8) == b"TWO!both"
            assert two.load(START + PAGE, 4) == b"both"
            family.check()


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Iterator[HostFile]:
        path = tmp_path / "file"
        path.write_bytes(b"file" * PAGE)
        with HostFile.open(path, writable=True) as file:
            yield file

    def test_that_could_be_cut_short(self, file: HostFile):
        with Family(Arena(64 << 20)) as family:
            one = family.first
            one.map(START, START + 4 * PAGE, mappable=file, private=False)
            with pytest.raises(MmError) as caught:
                one.mm.pin(START + 5, 10)
            error = caught.value
            assert (error.errno, error.addr) == (errno.EOPNOTSUPP, START)
            assert "cut short" in str(error)
            assert not one.mm.pins
            assert file.ref_count(0) == 1
            with one.mm.pin_frames(START, PAGE, READ) as frames:
                assert frames.ranges[0][1] is file

    def test_private_copies(self, file: HostFile):
        with Family(Arena(64 << 20)) as family:
            one = family.first
            one.map(START, START + 4 * PAGE, mappable=file)
            with one.mm.pin(START + 4, 4) as view:
                file.truncate(0)
                assert view == b"file"
                view[:] = b"mine"

    def test_without_a_descriptor(self, family: Family):
        one = family.first
        one.map(0x10000, 0x14000, mappable=FakeMappable(FakeFile(4 * PAGE)), private=False)
        with pytest.raises(MmError) as caught:
            one.mm.pin(0x10000, PAGE)
        assert caught.value.errno == errno.EOPNOTSUPP


def test_the_host_has_had_enough(family: Family, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object) -> object:
        raise OSError(errno.ENOMEM, "no more")

    monkeypatch.setattr(pin, "PinnedWindow", refuse)
    with pytest.raises(SyscallError) as caught:
        family.first.mm.pin(START, PAGE)
    assert caught.value.errno == errno.ENOMEM
    assert "1 pieces" in str(caught.value)
    assert not family.first.mm.pins
    monkeypatch.setattr(pin, "PinnedWindow", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        family.first.mm.pin(START, PAGE)
    assert not family.first.mm.pins
