"""Arenas that begin with something: the same as allocating it, for less."""

from __future__ import annotations

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, RangeError
from kvmmm.hostarch.ranges import FileRange
from tests.arena.test_arena import HUGE, PAGE, descriptors


def test_what_it_begins_with_is_like_what_is_asked_for_later():
    with (
        Arena(4 * HUGE, used_bytes=HUGE, reserved_bytes=2 * HUGE) as born,
        Arena(4 * HUGE) as asked,
    ):
        first = asked.allocate(HUGE)
        reservation = asked.reserve(2 * HUGE)
        assert born.first == first
        assert born.reservation == reservation
        assert reservation is not None
        for arena, held in ((born, born.reservation), (asked, reservation)):
            fr = arena.allocate(PAGE, at=HUGE, reservation=held)
            facts = arena.statistics()
            assert (facts.used_bytes, facts.reserved_bytes) == (HUGE + PAGE, 2 * HUGE - PAGE)
            assert facts.free_bytes == HUGE
            assert arena.ref_count(0) == arena.ref_count(fr.start) == 1
            with pytest.raises(ArenaExhaustedError):
                arena.allocate(2 * HUGE)
            arena.dec_ref(first)
            arena.dec_ref(fr)
            arena.unreserve(held)
            assert arena.allocate(4 * HUGE) == FileRange(0, 4 * HUGE)


@pytest.mark.parametrize(
    ("used", "reserved", "error"),
    [(1, 0, RangeError), (-HUGE, 0, RangeError), (HUGE, 2 * HUGE, ArenaExhaustedError)],
)
def test_no_arena_begins_with_more_than_it_holds(used: int, reserved: int, error: type[Exception]):
    before = descriptors()
    with pytest.raises(error):
        Arena(2 * HUGE, used_bytes=used, reserved_bytes=reserved)
    assert descriptors() == before
