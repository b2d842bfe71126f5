"""No memory left, at any moment: an error, nothing broken, and on with it once some is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ
from tests.mm.family import HUGE, PAGE, Family, Process
from tests.mm.hoard import Hoard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(16 << 20)) as made:
        made.first.map(START, START + 4 * HUGE)
        yield made


@pytest.fixture
def hoard(family: Family) -> Iterator[Hoard]:
    with Hoard(family.arena) as made:
        yield made


def fault(one: Process) -> None:
    one.store(START + HUGE + 5, b"new")
    assert one.load(START + HUGE, 8) == b"\0\0\0\0\0new"


def copy(one: Process) -> None:
    one.mm.copy_out(START + HUGE - 1, b"new")
    assert one.load(START + HUGE - 1, 3) == b"new"


def populate(one: Process) -> None:
    one.mm.populate(START + HUGE, 2 * PAGE)
    assert one.space.is_mapped(START + HUGE + PAGE, READ)


def pin(one: Process) -> None:
    one.mm.pin_frames(START + HUGE, 1, READ).release()


def shared(one: Process) -> None:
    if next(one.mm.vmas.segments(0x10000, 0x20000), None) is None:
        one.map(0x10000, 0x20000, private=False)
    one.store(0x10000, b"new")


@pytest.mark.parametrize("work", [fault, copy, populate, pin, shared])
def test_nothing_is_left(family: Family, hoard: Hoard, work: Callable[[Process], None]):
    one = family.first
    one.store(START, b"old")
    hoard.take_all()
    with pytest.raises(ArenaExhaustedError):
        work(one)
    family.check()
    assert one.load(START, 3) == b"old"
    hoard.give(2)
    work(one)
    family.check()


@pytest.mark.parametrize("n_pages", [0, 1, 3])
def test_a_copy_on_write(family: Family, hoard: Hoard, n_pages: int):
    parent = family.first
    parent.store(START, b"x" * HUGE)
    child = family.fork(parent)
    hoard.take_all()
    hoard.give(n_pages)
    for i in range(n_pages):
        child.store(START + i * PAGE, b"y")
    with pytest.raises(ArenaExhaustedError):
        child.store(START + 10 * PAGE, b"y")
    family.check()
    assert child.load(START, HUGE)[::PAGE] == b"y" * n_pages + b"x" * (512 - n_pages)
    hoard.give(1)
    child.store(START + 10 * PAGE, b"y")
    assert parent.load(START, HUGE) == b"x" * HUGE


def test_the_parent_ends_and_the_child_goes_on_without_copies(family: Family, hoard: Hoard):
    parent = family.first
    parent.store(START, b"x" * HUGE)
    child = family.fork(parent)
    hoard.take_all()
    with pytest.raises(ArenaExhaustedError):
        child.store(START, b"y")
    family.end(parent)
    child.store(START, b"y")
    assert child.load(START, 2) == b"yx"


def test_no_page_for_a_table_leaves_the_frames(family: Family):
    """Some of it may be mapped; the guest tries again."""
    one = family.first
    one.space.map_failure = ArenaExhaustedError(PAGE, 0, 0)
    with pytest.raises(ArenaExhaustedError):
        one.store(START, b"x")
    assert one.mm.rss_bytes == HUGE
    family.check()
    one.store(START, b"x")
    c = one.mm.counters
    assert (c.pma_insertions, c.pma_hits, c.refused, c.faults) == (1, 1, 0, 2)


def test_at_every_step_of_a_long_story(hoard: Hoard, family: Family):
    """With n pages free, for every n: whatever fails changes nothing that a guest can see."""
    parent = family.first
    parent.mm.mprotect(START, HUGE, 7)  # copies are a page each there
    parent.store(START, b"x" * 6 * PAGE)
    pins = [parent.mm.pin_frames(START + 4 * PAGE, PAGE, READ)]
    for n_pages in range(9):
        child = None
        hoard.take_all()
        hoard.give(n_pages)
        n_done = 0
        try:
            child = family.fork(parent)
            for i in range(6):
                child.mm.copy_out(START + i * PAGE, b"y")
                n_done = i + 1
        except ArenaExhaustedError:
            assert n_done < 6
        family.check()
        assert parent.load(START, 6 * PAGE) == b"x" * 6 * PAGE
        if child is not None:
            # The child's copy of the pinned page is its own from the start.
            assert child.load(START, 6 * PAGE)[::PAGE] == b"y" * n_done + b"x" * (6 - n_done)
            family.end(child)
        hoard.give_all()
    assert n_done == 6
    for one in pins:
        one.release()
