"""PageUsage: where searches look, and what reservations and counts mean."""

from __future__ import annotations

import pytest

from kvmmm.arena.usage import PageUsage, Reservation
from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
HUGE = 1 << 21
CAPACITY = 4 * HUGE


@pytest.fixture
def usage():
    usage = PageUsage(CAPACITY)
    yield usage
    usage.check_invariants()


def allocate(usage: PageUsage, pages: int, align: int = PAGE, phase: int = 0) -> int:
    start = usage.free.find_fit(pages * PAGE, align, phase)
    assert start is not None
    usage.take(start, start + pages * PAGE)
    return start


def test_first_fit_with_a_phase(usage: PageUsage):
    assert allocate(usage, 3) == 0
    assert allocate(usage, 1, HUGE, 5 * PAGE) == 5 * PAGE
    assert allocate(usage, 1, HUGE, 5 * PAGE) == HUGE + 5 * PAGE
    assert allocate(usage, 2) == 3 * PAGE
    assert allocate(usage, HUGE // PAGE, HUGE) == 2 * HUGE
    assert allocate(usage, 1, 4 * PAGE, 7 * PAGE) == 7 * PAGE


def test_phase_may_be_any_address(usage: PageUsage):
    assert usage.free.find_fit(PAGE, HUGE, (1 << 40) + 9 * PAGE) == 9 * PAGE


def test_freed_pages_below_are_found_again(usage: PageUsage):
    starts = [allocate(usage, 4) for _ in range(8)]
    usage.drop_reference(starts[2], starts[2] + 4 * PAGE)
    assert allocate(usage, 4) == starts[2]
    assert allocate(usage, 4) == starts[7] + 4 * PAGE


def test_search_returns_to_the_bottom(usage: PageUsage):
    for frame in range(4):
        assert allocate(usage, 1, HUGE, 0) == frame * HUGE
    assert usage.free.find_fit(PAGE, HUGE, 0) is None
    usage.drop_reference(HUGE, HUGE + PAGE)
    assert allocate(usage, 1, HUGE, 0) == HUGE


def test_no_fit_in_pieces(usage: PageUsage):
    for frame in range(4):
        usage.take(frame * HUGE, frame * HUGE + PAGE)
    assert usage.free.find_fit(HUGE, PAGE, 0) is None
    assert usage.free.find_fit(HUGE - PAGE, PAGE, 0) == PAGE
    assert usage.free.largest_bytes == HUGE - PAGE


def test_full_and_empty(usage: PageUsage):
    usage.take(0, CAPACITY)
    assert (usage.free_bytes, usage.free.largest_bytes) == (0, 0)
    assert usage.free.find_fit(PAGE, PAGE, 0) is None
    usage.drop_reference(0, CAPACITY)
    assert (usage.free_bytes, usage.used_bytes, usage.peak_used_bytes) == (CAPACITY, 0, CAPACITY)


def test_many_kinds_of_search_keep_few_hints(usage: PageUsage):
    for pages in range(1, 200):
        assert usage.free.find_fit(pages * PAGE, PAGE, 0) is not None
    assert len(usage.free.hints) <= 64


def test_reservation_gets_back_only_its_own(usage: PageUsage):
    usage.take(0, 4 * PAGE)
    first = usage.reserve(4 * PAGE, 8 * PAGE)
    usage.take(8 * PAGE, 9 * PAGE)
    second = usage.reserve(9 * PAGE, 12 * PAGE)
    assert usage.take_reserved(first, 6 * PAGE, 8 * PAGE)
    assert usage.take_reserved(second, 9 * PAGE, 10 * PAGE)
    assert usage.reserved_bytes == 4 * PAGE
    usage.drop_reference(6 * PAGE, 10 * PAGE)  # both ends, and the free page between
    assert usage.reserved_bytes == 7 * PAGE
    assert usage.free.covers(8 * PAGE, 9 * PAGE)
    assert not usage.free.covers(7 * PAGE, 8 * PAGE)


def test_used_pages_outlive_their_reservation(usage: PageUsage):
    reservation = usage.reserve(0, 4 * PAGE)
    usage.take_reserved(reservation, PAGE, 2 * PAGE)
    usage.unreserve(reservation)
    assert (usage.reserved_bytes, usage.used_bytes) == (0, PAGE)
    usage.drop_reference(PAGE, 2 * PAGE)
    assert usage.free.covers(0, CAPACITY)


def test_only_the_holder_takes_reserved_pages(usage: PageUsage):
    reservation = usage.reserve(0, 4 * PAGE)
    with pytest.raises(StateError, match="no reservation"):
        usage.take_reserved(Reservation(0, 4 * PAGE), 0, PAGE)
    with pytest.raises(RangeError, match="not inside"):
        usage.take_reserved(reservation, 3 * PAGE, 5 * PAGE)
    assert usage.take_reserved(reservation, 0, PAGE)
    assert not usage.take_reserved(reservation, 0, 2 * PAGE)
    usage.unreserve(reservation)
    with pytest.raises(StateError):
        usage.unreserve(reservation)


def test_counts(usage: PageUsage):
    usage.take(0, 4 * PAGE)
    usage.add_references([FileRange(PAGE, 2 * PAGE), FileRange(2 * PAGE, 3 * PAGE)])
    assert [usage.ref_count(fo) for fo in range(0, 5 * PAGE, PAGE)] == [1, 2, 2, 1, 0]
    assert usage.ref_counts(0, 8 * PAGE) == [
        (0, PAGE, 1), (PAGE, 3 * PAGE, 2), (3 * PAGE, 4 * PAGE, 1),
    ]  # fmt: skip
    assert usage.ref_counts(2 * PAGE, 3 * PAGE) == [(2 * PAGE, 3 * PAGE, 2)]
    assert usage.last_references(0, 4 * PAGE) == [(0, PAGE), (3 * PAGE, 4 * PAGE)]
    usage.drop_reference(0, 4 * PAGE)
    assert [usage.ref_count(fo) for fo in range(0, 5 * PAGE, PAGE)] == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("start", [3 * PAGE, 4 * PAGE])
def test_pages_not_in_use_have_no_count(usage: PageUsage, start: int):
    usage.take(0, 4 * PAGE)
    for ask in (
        lambda: usage.add_references([FileRange(0, PAGE), FileRange(start, 6 * PAGE)]),
        lambda: usage.last_references(start, 6 * PAGE),
        lambda: usage.first_shared(start, 6 * PAGE),
    ):
        with pytest.raises(StateError, match="offset 0x4000 is not in use"):
            ask()
    assert usage.ref_count(0) == 1
    assert usage.ref_count(3 * PAGE) == 1


def test_damage_is_found(usage: PageUsage):
    usage.used_bytes += PAGE
    with pytest.raises(AssertionError, match="4096 used"):
        usage.check_invariants()
    usage.used_bytes -= PAGE
