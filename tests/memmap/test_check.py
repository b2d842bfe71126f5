"""check_translations finds each broken promise."""

from __future__ import annotations

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import SyscallError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.check import check_translations
from kvmmm.memmap.file import Translation

PAGE = 4096
REQUIRED, OPTIONAL = FileRange(2 * PAGE, 4 * PAGE), FileRange(PAGE, 6 * PAGE)


@pytest.fixture
def arena():
    with Arena(1 << 21) as arena:
        yield arena


def answer(arena: Arena, *pieces: tuple[int, int, int], perms: int = READ) -> list[Translation]:
    return [Translation(s * PAGE, e * PAGE, arena, o * PAGE, perms) for s, e, o in pieces]


@pytest.mark.parametrize("pieces", [[(2, 4, 0)], [(1, 6, 0)], [(1, 3, 9), (3, 6, 4)]])
def test_kept(arena: Arena, pieces: list[tuple[int, int, int]]):
    check_translations(REQUIRED, OPTIONAL, READ, answer(arena, *pieces), None)
    part = answer(arena, (2, 3, 0))
    check_translations(REQUIRED, OPTIONAL, READ, part, SyscallError(5, "x"))
    check_translations(REQUIRED, OPTIONAL, READ, [], SyscallError(5, "x"))


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([(2, 3, 0)], "nor an error"),
        ([], "nor an error"),
        ([(2, 3, 0), (3.5, 4, 0)], "whole pages"),
        ([(2, 3, 0), (5, 6, 0)], "does not begin"),
        ([(0, 4, 0)], "not optional"),
        ([(1, 7, 0)], "not optional"),
        ([(2, 4, 0), (4, 5, 0)], "not required"),
        ([(3, 4, 0)], "comes first"),
        ([(2, 4, 511)], "leaves its file"),
    ],
)
def test_broken(arena: Arena, pieces: list[tuple[float, float, int]], why: str):
    found = [Translation(int(s * PAGE), int(e * PAGE), arena, o * PAGE, READ) for s, e, o in pieces]
    with pytest.raises(AssertionError, match=why):
        check_translations(REQUIRED, OPTIONAL, READ, found, None)


def test_permissions(arena: Arena):
    with pytest.raises(AssertionError, match="forbids"):
        check_translations(REQUIRED, OPTIONAL, WRITE, answer(arena, (2, 4, 0)), None)
    check_translations(REQUIRED, OPTIONAL, READ, answer(arena, (2, 4, 0), perms=READ_WRITE), None)
    check_translations(REQUIRED, OPTIONAL, READ, answer(arena, (2, 4, 0), perms=WRITE), None)
