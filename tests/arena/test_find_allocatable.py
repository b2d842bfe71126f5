"""Where an allocation goes, upwards and downwards.

Our counterpart of a chunk is the whole arena: it neither grows nor has kinds, and what is freed is
punched at once, so nothing lies waste or is being released.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.arena import Arena
from kvmmm.arena.free_space import FreeSpace
from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.ranges import FileRange

PAGE = 4096
H = 1 << 21
C = 64 * H
UNITS = [PAGE, H]


def place(
    length: int, unit: int, *, down: bool, used: list[tuple[int, int]], capacity: int = C
) -> int:
    with Arena(capacity, debug=False) as arena:
        for start, end in used:
            arena.allocate(end - start, at=start)
        fr = arena.allocate(length, align_bytes=unit, top_down=down)
        assert fr.length_bytes == length
        return fr.start


@pytest.mark.parametrize(
    ("length", "unit", "up", "down"),
    [
        (PAGE, PAGE, 0, C - PAGE),
        (2 * PAGE, PAGE, 0, C - 2 * PAGE),
        (H, H, 0, C - H),
        (2 * H, H, 0, C - 2 * H),
    ],
)
def test_initial(length: int, unit: int, up: int, down: int):
    assert place(length, unit, down=False, used=[]) == up
    assert place(length, unit, down=True, used=[]) == down


@pytest.mark.parametrize("u", UNITS)
def test_begin_and_end(u: int):
    assert place(u, u, down=False, used=[(u, 2 * u)]) == 0
    assert place(u, u, down=True, used=[(C - 2 * u, C - u)]) == C - u


@pytest.mark.parametrize("u", UNITS)
def test_extend_has_no_counterpart(u: int):
    for down in (False, True):
        with pytest.raises(ArenaExhaustedError):
            place(2 * C + u, u, down=down, used=[(C // 2 - u, C // 2)])


@pytest.mark.parametrize("u", UNITS)
def test_gaps(u: int):
    bottom = [(0, u), (2 * u, 3 * u)]
    assert place(u, u, down=False, used=bottom) == u
    assert place(2 * u, u, down=False, used=bottom) == 3 * u
    top = [(C - u, C), (C - 3 * u, C - 2 * u)]
    assert place(u, u, down=True, used=top) == C - 2 * u
    assert place(2 * u, u, down=True, used=top) == C - 5 * u


@pytest.mark.parametrize("u", UNITS)
def test_used_pages_are_skipped_and_freed_ones_reused(u: int):
    assert place(u, u, down=False, used=[(0, u)]) == u
    assert place(u, u, down=True, used=[(C - u, C)]) == C - 2 * u
    with Arena(C, debug=False) as arena:
        for edge in (0, C - u):
            arena.dec_ref(arena.allocate(u, at=edge))
        assert arena.allocate(u, align_bytes=u).start == 0
        assert arena.allocate(u, align_bytes=u, top_down=True).start == C - u


def test_downward_faults_get_neighbours():
    with Arena(C, debug=False) as arena:
        starts = [arena.allocate(H, align_bytes=H, top_down=True).start for _ in range(4)]
        assert starts == [C - H, C - 2 * H, C - 3 * H, C - 4 * H]
        arena.dec_ref(FileRange(C - 2 * H, C - H))
        assert arena.allocate(H, align_bytes=H, top_down=True).start == C - 2 * H
        assert arena.allocate(H, align_bytes=H, top_down=True).start == C - 5 * H


def test_a_full_turn_downwards():
    with Arena(4 * H, debug=False) as arena:
        for _ in range(4):
            arena.allocate(PAGE, align_bytes=H, phase_bytes=5 * PAGE, top_down=True)
        with pytest.raises(ArenaExhaustedError):
            arena.allocate(PAGE, align_bytes=H, phase_bytes=5 * PAGE, top_down=True)
        arena.dec_ref(FileRange(3 * H + 5 * PAGE, 3 * H + 6 * PAGE))
        fr = arena.allocate(PAGE, align_bytes=H, phase_bytes=5 * PAGE, top_down=True)
        assert fr.start == 3 * H + 5 * PAGE


def test_many_kinds_of_search_keep_few_hints():
    free = FreeSpace(0, C)
    for pages in range(1, 200):
        assert free.find_fit_down(pages * PAGE, PAGE, 0) is not None
    assert len(free._hints_down) <= 64


N = 64


@settings(max_examples=300, deadline=None)
@given(
    used=st.sets(st.integers(0, N - 1)),
    searches=st.lists(
        st.tuples(
            st.integers(1, 12), st.sampled_from([1, 2, 8, 16]), st.integers(0, 15), st.booleans()
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_model(used: set[int], searches: list[tuple[int, int, int, bool]]):
    """The first search of a kind finds the lowest or highest fit, each finds one if there is."""
    free = FreeSpace(0, N * PAGE)
    for page in used:
        free.ranges.remove(page * PAGE, (page + 1) * PAGE)
    kinds = set()
    for length, align, phase, down in searches:
        fits = [
            start
            for start in range(phase % align, N - length + 1, align)
            if used.isdisjoint(range(start, start + length))
        ]
        find = free.find_fit_down if down else free.find_fit
        fo = find(length * PAGE, align * PAGE, phase * PAGE)
        assert (fo is None) == (not fits)
        if fo is not None:
            assert fo // PAGE in fits
            if (length, align, down) not in kinds:
                assert fo // PAGE == (fits[-1] if down else fits[0])
            kinds.add((length, align, down))
