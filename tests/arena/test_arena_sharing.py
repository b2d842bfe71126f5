"""Frames with several references, and arenas with several owners."""

from __future__ import annotations

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
HUGE = 1 << 21


@pytest.fixture
def arena():
    with Arena(HUGE, debug=False) as arena:
        arena.allocate(16 * PAGE)
        yield arena
        arena._usage.check_invariants()


def pages(start: int, end: int) -> FileRange:
    return FileRange(start * PAGE, end * PAGE)


def counts(arena: Arena, n_pages: int = 17) -> list[int]:
    return [arena.ref_count(page * PAGE) for page in range(n_pages)]


def test_many_at_once(arena: Arena):
    arena.inc_ref_many([pages(0, 2), pages(2, 4), pages(8, 9), pages(1, 3)])
    assert counts(arena) == [2, 3, 3, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 0]
    arena.inc_ref_many([])
    assert counts(arena)[:2] == [2, 3]


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (pages(15, 17), StateError),
        (pages(20, 21), StateError),
        (FileRange(5, PAGE), RangeError),
        (FileRange(PAGE, PAGE), RangeError),
        (pages(0, 513), RangeError),
    ],
)
def test_all_or_nothing(arena: Arena, last: FileRange, error: type[Exception]):
    with pytest.raises(error):
        arena.inc_ref_many([pages(0, 2), pages(4, 5), last])
    assert counts(arena) == [1] * 16 + [0]


def test_unique(arena: Arena):
    arena.inc_ref(pages(4, 6))
    assert arena.has_unique_ref(pages(0, 4))
    assert arena.has_unique_ref(pages(6, 16))
    assert not arena.has_unique_ref(pages(3, 5))
    assert not arena.has_unique_ref(pages(4, 5))
    assert arena.first_shared(pages(0, 16)) == 4 * PAGE
    assert arena.first_shared(pages(5, 16)) == 5 * PAGE
    assert arena.first_shared(pages(6, 16)) is None
    arena.dec_ref(pages(4, 6))
    assert arena.has_unique_ref(pages(0, 16))


def test_unique_pages_that_are_not_in_use(arena: Arena):
    for ask in (arena.has_unique_ref, arena.first_shared):
        with pytest.raises(StateError, match="0x10000 is not in use"):
            ask(pages(12, 20))
        with pytest.raises(RangeError):
            ask(pages(0, 513))


def test_last_owner_closes():
    arena = Arena(HUGE)
    second = arena.share()
    third = second.share()
    assert second is arena
    assert third is arena
    fr = arena.allocate(PAGE)
    for _ in range(2):
        arena.close()
        assert arena.fd >= 0
        assert arena.ref_count(fr.start) == 1
    view = arena.view_of(fr)
    with pytest.raises(StateError, match="stays open"):
        arena.close()
    view.release()
    arena.close()
    assert arena.fd == -1
    arena.close()
    with pytest.raises(StateError, match="closed"):
        arena.share()
