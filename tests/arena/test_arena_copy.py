"""Frames that come filled: copies of other frames, of files, of bytes."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError, SyscallError
from kvmmm.hostarch.ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
HUGE = 1 << 21


@pytest.fixture
def arena():
    with Arena(4 * HUGE, debug=False) as arena:
        yield arena
        arena._usage.check_invariants()


class ShortFile:
    """A mapping of `length` pages over a file of which `there` pages are left."""

    def __init__(self, length: int, there: int) -> None:
        self.fd = os.memfd_create("short")
        os.ftruncate(self.fd, length * PAGE)
        self.mapping = mmap.mmap(self.fd, length * PAGE)
        self.mapping[: there * PAGE] = b"".join(bytes([i + 1]) * PAGE for i in range(there))
        os.ftruncate(self.fd, there * PAGE)

    def view_of(self, fr: FileRange) -> memoryview:
        return memoryview(self.mapping)[fr.start : fr.end]

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


@pytest.fixture
def short() -> Iterator[ShortFile]:
    file = ShortFile(8, 3)
    yield file
    file.close()


def test_copy_of_a_page(arena: Arena):
    src = arena.allocate(2 * PAGE)
    arena.view[src.start : src.end] = bytes(range(256)) * 32
    fr, n_bytes = arena.copy_from(arena, src.start + PAGE, PAGE)
    assert (fr, n_bytes) == (FileRange(2 * PAGE, 3 * PAGE), PAGE)
    assert arena.view[fr.start : fr.end] == arena.view[src.start + PAGE : src.end]
    assert arena.ref_count(fr.start) == 1
    arena.view[fr.start] = 99
    assert arena.view[src.start + PAGE] == 0


def test_copy_of_a_window(arena: Arena):
    src = arena.allocate(HUGE, align_bytes=HUGE)
    arena.view[src.start : src.end] = b"abcdefgh" * (HUGE // 8)
    fr, n_bytes = arena.copy_from(
        arena, src.start, HUGE, align_bytes=HUGE, phase_bytes=HUGE, top_down=True
    )
    assert (fr.start, n_bytes) == (3 * HUGE, HUGE)
    assert arena.view[fr.start : fr.end] == arena.view[src.start : src.end]


def test_copy_into_a_reservation(arena: Arena):
    reservation = arena.reserve(HUGE)
    assert reservation is not None
    src = arena.allocate(PAGE)
    arena.view[src.start] = 7
    fr, _ = arena.copy_from(
        arena, src.start, PAGE, at=reservation.start + PAGE, reservation=reservation
    )
    assert fr.start == reservation.start + PAGE
    assert arena.view[fr.start] == 7


def test_copy_from_another_arena(arena: Arena):
    with Arena(HUGE, debug=False) as other:
        src = other.allocate(PAGE)
        other.view[5] = 55
        fr, n_bytes = arena.copy_from(other, src.start, PAGE)
        assert n_bytes == PAGE
        assert arena.view[fr.start + 5] == 55


def test_junk_does_not_show_through():
    with Arena(HUGE, debug=True) as arena:
        arena.dec_ref(arena.allocate(2 * PAGE))
        fr, n_bytes = arena.allocate_and_write(memoryview(b"hello"))
        assert (fr, n_bytes) == (FileRange(0, PAGE), 5)
        assert arena.view[:8] == b"hello\0\0\0"
        assert arena.view[PAGE - 1] == 0


def test_source_that_ends_early(arena: Arena, short: ShortFile):
    fr, n_bytes = arena.copy_from(short, PAGE, 5 * PAGE)
    assert (fr, n_bytes) == (FileRange(0, 2 * PAGE), 2 * PAGE)
    assert arena.view[fr.start : fr.end] == b"\2" * PAGE + b"\3" * PAGE
    assert arena.statistics().used_bytes == 2 * PAGE
    assert os.fstat(arena.fd).st_blocks * 512 == 2 * PAGE


def test_source_that_is_not_there(arena: Arena, short: ShortFile):
    fr, n_bytes = arena.copy_from(short, 3 * PAGE, 2 * PAGE)
    assert (fr.length_bytes, n_bytes) == (0, 0)
    assert arena.statistics().used_bytes == 0


def test_bytes_that_end_early(arena: Arena, short: ShortFile):
    with short.view_of(FileRange(0, 8 * PAGE)) as view:
        fr, n_bytes = arena.allocate_and_write(view[100:])
    assert (fr.length_bytes, n_bytes) == (2 * PAGE, 2 * PAGE)
    assert arena.view[0] == 1
    assert arena.view[2 * PAGE - 100] == 3


def test_any_bytes(arena: Arena):
    wide = memoryview(bytes(range(200)) * 100).cast("I")
    fr, n_bytes = arena.allocate_and_write(wide, align_bytes=HUGE, phase_bytes=PAGE)
    assert (fr.start, fr.length_bytes, n_bytes) == (PAGE, 5 * PAGE, 20000)
    assert arena.view[fr.start : fr.start + 20000] == wide.cast("B")
    assert not any(arena.view[fr.start + 20000 : fr.end])


def test_refusals_change_nothing(arena: Arena, monkeypatch: pytest.MonkeyPatch):
    calls = [
        (RangeError, lambda: arena.allocate_and_write(memoryview(b""))),
        (RangeError, lambda: arena.copy_from(arena, 0, 100)),
        (RangeError, lambda: arena.copy_from(arena, 4 * HUGE, PAGE)),
        (RangeError, lambda: arena.copy_from(arena, -PAGE, PAGE)),
        (RangeError, lambda: arena.copy_from(arena, 0, PAGE, at=3)),
        (ArenaExhaustedError, lambda: arena.copy_from(arena, 0, PAGE, at=0)),
        (StateError, lambda: arena.copy_from(arena, 0, PAGE, at=0, reservation=foreign)),
    ]
    arena.allocate(PAGE)
    with Arena(HUGE, reserved_bytes=HUGE) as other:
        foreign = other.reservation
        for error, call in calls:
            with pytest.raises(error):
                call()

        def refuse(_fd: int, _data: memoryview, _fo: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            for call in (
                lambda: arena.copy_from(arena, 0, PAGE),
                lambda: arena.allocate_and_write(memoryview(b"x")),
            ):
                with pytest.raises(SyscallError, match="cannot copy 4 KiB") as e:
                    call()
                assert e.value.errno == errno.ENOSPC
    assert arena.statistics().used_bytes == PAGE


# As a File.


def test_moving_bytes(arena: Arena):
    assert not arena.may_fault
    assert arena.write_from(10, memoryview(b"hello")) == 5
    buffer = bytearray(7)
    assert arena.read_into(9, memoryview(buffer)) == 7
    assert buffer == b"\0hello\0"
    wide = memoryview(bytearray(8)).cast("I")
    assert arena.read_into(10, wide) == 8
    assert wide.cast("B") == b"hello\0\0\0"


def test_moving_bytes_stops_at_the_end(arena: Arena):
    end = 4 * HUGE
    buffer = bytearray(b"xxxx")
    assert arena.write_from(end - 2, memoryview(b"abcd")) == 2
    assert arena.read_into(end - 2, memoryview(buffer)) == 2
    assert buffer == b"abxx"
    for fo in (end, end + 1, 10 * end):
        assert arena.read_into(fo, memoryview(buffer)) == 0
        assert arena.write_from(fo, memoryview(buffer)) == 0
    for move in (arena.read_into, arena.write_from):
        with pytest.raises(RangeError):
            move(-1, memoryview(buffer))
