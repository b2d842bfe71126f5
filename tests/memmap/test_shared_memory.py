"""SharedMemory: frames that come when asked for, stay the same, and go with the last mapping."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError
from kvmmm.hostarch.access import ANY_ACCESS, READ, WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.memmap.check import check_translations
from kvmmm.memmap.shared_memory import SharedMemory
from tests.memmap.fake_space import FakeSpace

if TYPE_CHECKING:
    from kvmmm.memmap.file import Mappable, Translation

PAGE = 4096
HUGE = 1 << 21


@pytest.fixture
def arena():
    with Arena(8 * HUGE, debug=False) as arena:
        yield arena
        arena._usage.check_invariants()


def translate(
    memory: SharedMemory,
    required: tuple[int, int],
    optional: tuple[int, int] | None = None,
    access: int = READ,
) -> tuple[list[Translation], OSError | None]:
    needed, allowed = FileRange(*required), FileRange(*(optional or required))
    answer = memory.translate(needed, allowed, access)
    check_translations(needed, allowed, access, *answer)
    return answer


def frames(memory: SharedMemory, page: int) -> int:
    (found,), error = translate(memory, (page * PAGE, (page + 1) * PAGE))
    assert error is None
    return found.offset


def fill_up(arena: Arena, keep_pages: list[int]) -> None:
    """Use everything but single pages at these places."""
    start = 0
    for page in [*keep_pages, arena.capacity_bytes // PAGE]:
        if start < page * PAGE:
            arena.allocate(page * PAGE - start, at=start)
        start = (page + 1) * PAGE


def test_is_a_mappable(arena: Arena):
    memory: Mappable = SharedMemory(arena, PAGE)
    assert memory.name == "/dev/zero (deleted)"
    assert memory.max_shared_perms == ANY_ACCESS
    memory.msync(0, PAGE)


def test_windows(arena: Arena):
    memory = SharedMemory(arena, 5 * HUGE)
    assert memory.resident_bytes == 0
    (found,), error = translate(memory, (HUGE + PAGE, HUGE + 2 * PAGE), (0, 5 * HUGE), access=WRITE)
    assert error is None
    assert (found.start, found.end) == (HUGE, 2 * HUGE)
    assert found.offset % HUGE == 0
    assert found.file is arena
    assert found.perms == ANY_ACCESS
    assert memory.resident_bytes == arena.statistics().used_bytes == HUGE
    assert arena.ref_count(found.offset) == 1


def test_windows_are_clipped_to_what_is_optional_and_free(arena: Arena):
    memory = SharedMemory(arena, 5 * HUGE)
    optional = HUGE - 3 * PAGE, HUGE + 7 * PAGE
    (found,), _ = translate(memory, (HUGE, HUGE + PAGE), optional)
    assert (found.start, found.end) == (HUGE, HUGE + 7 * PAGE)
    (found,), _ = translate(memory, (HUGE - PAGE, HUGE), (0, 5 * HUGE))
    assert (found.start, found.end) == (0, HUGE)
    assert found.offset % HUGE == 0


def test_neighbours_lie_beside_one_another_upwards_and_downwards(arena: Arena):
    memory = SharedMemory(arena, 5 * HUGE)
    held = arena.allocate(2 * HUGE)
    translate(memory, (2 * HUGE, 2 * HUGE + PAGE), (0, 5 * HUGE))
    arena.dec_ref(held)
    for window in (3, 1):
        translate(memory, (window * HUGE, window * HUGE + PAGE), (0, 5 * HUGE))
    (found,), error = translate(memory, (HUGE, 4 * HUGE))
    assert error is None
    assert (found.start, found.end, found.offset) == (HUGE, 4 * HUGE, HUGE)


def test_everybody_gets_the_same_frames(arena: Arena):
    memory = SharedMemory(arena, 2 * HUGE)
    first = frames(memory, 7)
    arena.view[first] = 42
    assert frames(memory, 7) == first
    (found,), _ = translate(memory, (0, 2 * HUGE))
    assert found.offset == first - 7 * PAGE
    assert arena.view[found.offset + 7 * PAGE] == 42


def test_end(arena: Arena):
    memory = SharedMemory(arena, 3 * PAGE - 5)
    assert memory.length_bytes == 3 * PAGE
    found, error = translate(memory, (2 * PAGE, 4 * PAGE), (0, 10 * PAGE))
    assert [(t.start, t.end) for t in found] == [(0, 3 * PAGE)]
    assert error is not None
    assert error.errno == errno.EIO
    found, error = translate(memory, (3 * PAGE, 4 * PAGE), (0, 10 * PAGE))
    assert found == []
    assert error is not None
    assert error.errno == errno.EIO


def test_tight_arena_gives_less(arena: Arena):
    memory = SharedMemory(arena, 4 * HUGE)
    arena.allocate(6 * HUGE)
    arena.allocate(HUGE + 100 * PAGE)
    (found,), error = translate(memory, (0, 4 * PAGE), (0, 4 * HUGE))
    assert error is None
    assert (found.start, found.end) == (0, 64 << 10)  # no 2 MiB, nor 64 KiB in phase
    assert found.offset == 7 * HUGE + 100 * PAGE


def test_single_pages_in_the_end(arena: Arena):
    memory = SharedMemory(arena, HUGE)
    fill_up(arena, [3, 700, 2000])
    found, error = translate(memory, (PAGE, 6 * PAGE), (0, HUGE))
    assert [(t.start, t.end) for t in found] == [(i * PAGE, (i + 1) * PAGE) for i in (1, 2, 3)]
    assert sorted(t.offset for t in found) == [3 * PAGE, 700 * PAGE, 2000 * PAGE]
    assert isinstance(error, ArenaExhaustedError)
    assert error.errno == errno.ENOMEM
    found, error = translate(memory, (100 * PAGE, 101 * PAGE))
    assert found == []
    assert isinstance(error, ArenaExhaustedError)
    memory.close()
    assert arena.statistics().free_bytes == 3 * PAGE


def test_frames_go_with_the_last_mapping(arena: Arena):
    memory = SharedMemory(arena, 2 * HUGE)
    parent, child = FakeSpace(), FakeSpace()
    ar, half = (
        AddrRange(0x40000000, 0x40000000 + 2 * HUGE),
        AddrRange(0x40000000, 0x40000000 + HUGE),
    )
    memory.add_mapping(parent, ar, 0, writable=True)
    memory.add_mapping(child, ar, 0, writable=True)
    assert memory.is_mapped
    offset = frames(memory, 0)
    arena.inc_ref(FileRange(offset, offset + PAGE))  # a space's own
    memory.remove_mapping(parent, ar, 0, writable=True)
    memory.remove_mapping(child, half, 0, writable=True)
    assert frames(memory, 0) == offset  # kept, though nobody maps that part now
    with pytest.raises(StateError, match="still mapped"):
        memory.close()
    memory.remove_mapping(child, AddrRange(half.end, ar.end), HUGE, writable=True)
    assert not memory.is_mapped
    assert memory.resident_bytes == 0
    assert arena.ref_count(offset) == 1
    assert arena.statistics().used_bytes == PAGE
    arena.dec_ref(FileRange(offset, offset + PAGE))


def test_moving_a_mapping_keeps_the_frames(arena: Arena):
    memory = SharedMemory(arena, HUGE)
    space = FakeSpace()
    src, dst = AddrRange(0, HUGE), AddrRange(8 * HUGE, 9 * HUGE)
    memory.add_mapping(space, src, 0, writable=True)
    offset = frames(memory, 9)
    memory.copy_mapping(space, src, dst, 0, writable=True)
    memory.remove_mapping(space, src, 0, writable=True)
    assert frames(memory, 9) == offset
    memory.remove_mapping(space, dst, 0, writable=True)
    assert arena.statistics().used_bytes == 0


def test_close_without_mappings(arena: Arena):
    memory = SharedMemory(arena, HUGE)
    frames(memory, 0)
    memory.close()
    memory.close()
    assert arena.statistics().used_bytes == 0
    assert "SharedMemory 0x200000 bytes, 0x0 allocated" in repr(memory)
    with pytest.raises(RangeError):
        SharedMemory(arena, 0)


def test_threads_agree(arena: Arena):
    memory = SharedMemory(arena, 4 * HUGE)
    answers: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        mine.extend(frames(memory, page) for page in range(0, 2048, 64))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert len(set(answers[0])) == 32
    memory.close()


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 1100),
    taken=st.lists(st.tuples(st.integers(0, 1023), st.integers(1, 600)), max_size=8),
    asks=st.lists(
        st.tuples(
            st.integers(0, 1100), st.integers(1, 600), st.integers(0, 600), st.integers(0, 600)
        ),
        max_size=12,
    ),
)
def test_model(
    length: int, taken: list[tuple[int, int]], asks: list[tuple[int, int, int, int]]
) -> None:
    with Arena(2 * HUGE, debug=False) as arena:
        memory = SharedMemory(arena, length * PAGE)
        for start, pages in taken:
            try:
                arena.allocate(min(pages, 1024 - start) * PAGE, at=start * PAGE)
            except ArenaExhaustedError:
                continue
        taken_bytes = arena.statistics().used_bytes
        known: dict[int, int] = {}
        for start, pages, before, after in asks:
            required = start * PAGE, (start + pages) * PAGE
            optional = max(0, start - before) * PAGE, (start + pages + after) * PAGE
            found, error = translate(memory, required, optional)
            done = found[-1].end if found else required[0]
            if isinstance(error, ArenaExhaustedError):
                assert arena.statistics().free_bytes == 0
                assert done < length * PAGE
            elif error is not None:
                assert done >= length * PAGE or not found
            for t in found:
                for fo in range(t.start, t.end, PAGE):
                    frame = t.offset + fo - t.start
                    assert known.setdefault(fo, frame) == frame
                    assert arena.ref_count(frame) == 1
        assert len(set(known.values())) == len(known)
        assert memory.resident_bytes == arena.statistics().used_bytes - taken_bytes
        memory.close()
        assert arena.statistics().used_bytes == taken_bytes
