"""Names for anonymous memory."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import MmError
from tests.mm.conftest import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def setup(make: Make) -> Setup:
    setup = make()
    setup.map(0, 8 * PAGE)
    return setup


def names(setup: Setup) -> list[tuple[int, int, str]]:
    return [(s // PAGE, e // PAGE, v.name) for s, e, v in setup.mm.vmas]


@pytest.mark.parametrize(
    "name", ["\x1f", "tab\t", "\x7f", "ä", "a\\b", "`", "$HOME", "[", "]", "x" * 80]
)
def test_what_is_no_name(setup: Setup, name: str):
    setup.refuses(lambda: setup.mm.set_anon_name(0, PAGE, name), errno.EINVAL, "prctl")


@pytest.mark.parametrize(
    ("addr", "length"), [(1, PAGE), (-PAGE, PAGE), (0, -1), (0, TOP), (PAGE, TOP - PAGE)]
)
@pytest.mark.parametrize("name", ["fine", None])
def test_a_malformed_range(setup: Setup, addr: int, length: int, name: str | None):
    setup.refuses(lambda: setup.mm.set_anon_name(addr, length, name), errno.EINVAL)


def test_of_nothing(setup: Setup):
    before = setup.snapshot()
    setup.mm.set_anon_name(64 * PAGE, 0, "x")
    assert setup.snapshot() == before


def test_neighbours_of_different_names_stay_apart(setup: Setup):
    setup.mm.set_anon_name(2 * PAGE, 2 * PAGE - 1, "my heap")
    setup.mm.set_anon_name(4 * PAGE, PAGE, "")
    assert names(setup) == [(0, 2, ""), (2, 4, "[anon:my heap]"), (4, 5, "[anon:]"), (5, 8, "")]
    assert "[anon:my heap]" in setup.mm.maps()
    setup.mm.set_anon_name(0, 8 * PAGE, "x" * 79)
    assert len(setup.mm.vmas) == 1
    setup.mm.set_anon_name(0, 8 * PAGE, None)
    assert names(setup) == [(0, 8, "")]


def test_taking_a_name_away_leaves_those_of_mmap(setup: Setup):
    setup.map(8 * PAGE, 9 * PAGE, name="[memory]")
    setup.mm.set_anon_name(0, 9 * PAGE, None)
    assert names(setup) == [(0, 8, ""), (8, 9, "[memory]")]


def test_shared_memory(make: Make):
    setup = make()
    ar = setup.mm.mmap(PAGE, private=False)
    vma_name = setup.mm.vmas.find_value(ar.start).name
    setup.mm.set_anon_name(ar.start, PAGE, "ring")
    assert setup.mm.vmas.find_value(ar.start).name == "[anon_shmem:ring]"
    setup.mm.set_anon_name(ar.start, PAGE, None)
    assert setup.mm.vmas.find_value(ar.start).name == vma_name


class OtherMappable:
    """A file, so far as names are concerned."""

    def __init__(self, inner: Recorder) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def test_files_are_not_named(setup: Setup):
    file = OtherMappable(Recorder(setup.arena, PAGE))
    setup.map(8 * PAGE, 9 * PAGE, mappable=file)
    with pytest.raises(MmError) as caught:
        setup.mm.set_anon_name(7 * PAGE, 2 * PAGE, "x")
    assert (caught.value.errno, caught.value.addr) == (errno.EBADF, 8 * PAGE)
    assert names(setup) == [(0, 7, ""), (7, 8, "[anon:x]"), (8, 9, "recorder")]
    setup.check()


def test_a_hole_is_said_when_the_rest_is_named(setup: Setup):
    setup.mm.munmap(2 * PAGE, PAGE)
    with pytest.raises(MmError) as caught:
        setup.mm.set_anon_name(PAGE, 16 * PAGE, "x")
    assert (caught.value.errno, caught.value.addr) == (errno.ENOMEM, 2 * PAGE)
    assert names(setup) == [(0, 1, ""), (1, 2, "[anon:x]"), (3, 8, "[anon:x]")]
