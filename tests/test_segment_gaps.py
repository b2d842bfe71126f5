"""SegmentSet: the search for a large gap, and what each block keeps for it.

Scenarios of gVisor's pkg/segment/test.
"""

from __future__ import annotations

import random

import pytest

from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.safemem.ffi import ffi
from kvmmm.segment import SegmentSet

N = 8000
LARGE = 7  # gVisor's minGapLength


def shuffled(n: int) -> list[int]:
    order = list(range(n))
    random.Random(n).shuffle(order)
    return order


def fill_caches(s: SegmentSet[int]) -> None:
    # Longer than every gap but the outermost: looks at the longest gap of each block.
    assert s.find_large_gap(0, 40 * N, 40 * N, align_bytes=1) is None


def units(n: int, step: int = 1) -> SegmentSet[int]:
    s: SegmentSet[int] = SegmentSet()
    for i in range(n):
        s.insert(i * step, i * step + 1, i)
    return s


def check_max_gaps(s: SegmentSet[int]) -> None:
    # check_invariants compares what is kept with what it should be; after that, all is kept again.
    s.check_invariants()
    if s:
        fill_caches(s)
        s.check_invariants()


def test_max_gap_add_random():
    s: SegmentSet[int] = SegmentSet()
    for start in shuffled(N):
        s.insert(start, start + 1, start)
        check_max_gaps(s)


def test_max_gap_add_random_with_random_interval():
    s: SegmentSet[int] = SegmentSet()
    lengths = random.Random(1)
    for start in shuffled(N):
        s.insert(start * 10, start * 10 + lengths.randrange(1, 11), start)
        check_max_gaps(s)


def test_max_gap_remove_random():
    s = units(N)
    for start in shuffled(N):
        s.remove(start, start + 1)
        check_max_gaps(s)


def test_max_gap_remove_half_random():
    s = units(N)
    for start in shuffled(N)[: N // 2]:
        s.remove(start, start + 1)
        check_max_gaps(s)


def half_of_random() -> SegmentSet[int]:
    s = units(N)
    for start in shuffled(N)[: N - N // 8]:
        s.remove(start, start + 1)
    return s


def test_next_large_enough_gap():
    s = half_of_random()
    found = []
    at: int | None = 0
    while (at := s.find_large_gap(at or 0, N, LARGE, align_bytes=1)) is not None:
        found.append(at)
        gap = s.find_gap(at)
        assert gap is not None
        at = gap[1]
    assert found == [start for start, end in s.gaps(0, N) if end - start >= LARGE]
    assert len(found) > 50


def test_prev_large_enough_gap():
    s = half_of_random()
    found = []
    end = N
    while (at := s.find_large_gap(0, end, LARGE, align_bytes=1, top_down=True)) is not None:
        found.append(at + LARGE)
        gap = s.find_gap(at)
        assert gap is not None
        end = gap[0]
    assert found[::-1] == [end for start, end in s.gaps(0, N) if end - start >= LARGE]


def test_add_sequential_adjacent():
    s = units(N)
    assert all(s.prev_segment(i) == (i - 1, i, i - 1) for i in range(1, N))
    assert all(s.next_segment(i + 1) == (i + 1, i + 2, i + 1) for i in range(N - 1))
    assert list(s.gaps()) == [(N, ADDRESS_LIMIT)]
    assert s.prev_segment(0) is s.next_segment(N) is None


def test_add_sequential_non_adjacent():
    s = units(N, step=2)
    assert all(s.find_gap(2 * i + 1) == (2 * i + 1, 2 * i + 2) for i in range(N - 1))
    assert list(s.gaps(0, 2 * N)) == [(2 * i + 1, 2 * i + 2) for i in range(N)]


def test_large_gap_of_an_empty_set():
    s: SegmentSet[int] = SegmentSet()
    assert s.find_large_gap(0, ADDRESS_LIMIT, ADDRESS_LIMIT) == 0
    assert s.find_large_gap(0, ADDRESS_LIMIT, ADDRESS_LIMIT + 1) is None
    assert s.find_large_gap(1, ADDRESS_LIMIT, 0x1000) == 0x1000
    assert s.find_large_gap(0, ADDRESS_LIMIT, 1, top_down=True) == ADDRESS_LIMIT - 0x1000
    assert s.find_large_gap(0x1001, 0x2FFF, 0x1000) is None
    assert s.find_large_gap(0x2000, 0x2000, 1) is None
    assert s.find_large_gap(ADDRESS_LIMIT - 5, ADDRESS_LIMIT, 4) is None  # aligning would wrap


@pytest.mark.parametrize(
    ("length", "align", "why"),
    [(0, 4096, "above zero"), (-1, 4096, "above zero"), (1, 3, "power of two"), (1, 0, "power")],
)
def test_large_gap_refuses(length: int, align: int, why: str):
    s: SegmentSet[int] = SegmentSet()
    with pytest.raises(ValueError, match=why):
        s.find_large_gap(0, 100, length, align_bytes=align)


@pytest.mark.parametrize("word", [0, 1])
def test_damage_is_found(word: int):
    s = units(10)
    words = ffi.cast("uint64_t *", id(s)) + 2  # behind the object's header: the two counters
    words[word] += 1
    with pytest.raises(AssertionError, match="counters"):
        s.check_invariants()
    words[word] -= 1
    s.check_invariants()


def test_damaged_block_is_found():
    s = units(10, step=2)
    fill_caches(s)
    words = ffi.cast("uint64_t *", id(s)) + 2
    firsts, blocks, max_gaps = (ffi.cast("uint64_t *", words[i]) for i in (5, 6, 7))
    starts = ffi.cast("uint64_t *", blocks[0])
    for array, i, why in ((firsts, 0, "first address"), (starts, 5, "order"), (max_gaps, 0, "gap")):
        kept = array[i]
        array[i] = 999
        with pytest.raises(AssertionError, match=f"block at 0x.*{why}"):
            s.check_invariants()
        array[i] = kept
        s.check_invariants()
