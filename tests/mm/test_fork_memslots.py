"""fork where a CPU may walk any frame: copies at once, and nothing is write-protected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.hostarch.access import READ_WRITE
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20), walks_frames=True) as made:
        made.first.map(START, START + 4 * HUGE, name="[memory]")
        yield made


def test_frames_are_copied_at_once(family: Family):
    parent = family.first
    parent.store(START, b"table")
    child = family.fork(parent)
    assert parent.space.is_mapped(START, READ_WRITE)
    assert not any(pma[2] for pma in parent.pmas() + child.pmas())
    assert parent.offset(START) != child.offset(START)
    child.mm.map_resident()
    assert child.space.is_mapped(START, READ_WRITE)
    assert child.mm.counters.faults == 0


def test_holes_stay_holes(family: Family):
    import os

    parent = family.first
    for addr in (START, START + HUGE + 5 * PAGE, START + 4 * HUGE - PAGE):
        parent.store(addr, b"some")
    blocks = os.fstat(family.arena.fd).st_blocks
    child = family.fork(parent)
    assert os.fstat(family.arena.fd).st_blocks == 2 * blocks
    for addr in (START, START + HUGE + 5 * PAGE, START + 4 * HUGE - PAGE):
        assert child.load(addr, 5) == b"some\0"


def test_pure_data_is_shared(family: Family):
    parent = family.first
    parent.map(START + HUGE, START + 2 * HUGE, pure_data=True)
    for addr in (START, START + HUGE, START + 2 * HUGE):
        parent.store(addr, b"here")
    child = family.fork(parent)
    family.check()
    assert child.offset(START + HUGE) == parent.offset(START + HUGE)
    assert child.offset(START) != parent.offset(START)
    child.store(START + HUGE, b"HERE")
    assert parent.load(START + HUGE, 4) == b"here"
    # Copied for a grandchild, whatever it shares already.
    grandchild = family.fork(child)
    assert grandchild.load(START + HUGE, 4) == b"HERE"


def test_what_was_shared_and_is_pure_no_more(family: Family):
    parent = family.first
    parent.map(START, START + HUGE, pure_data=True)
    parent.store(START, b"here")
    first = family.fork(parent)
    with parent.mm.mapping_lock:
        parent.mm.vmas.mutate(
            START, START + HUGE, lambda _s, _e, vma: vma.replaced(pure_data=False)
        )
    second = family.fork(parent)
    family.check()
    second.store(START, b"HERE")
    assert (parent.load(START, 4), first.load(START, 4)) == (b"here", b"here")


def test_no_room_in_one_piece(family: Family):
    """Copies take what there is: windows, then single pages."""
    parent = family.first
    for i in range(4):
        parent.store(START + i * HUGE, b"%d" % i)
    free_bytes = family.arena.statistics().free_bytes
    taken = [family.arena.allocate(PAGE) for _ in range(free_bytes // PAGE)]
    keep = taken[::2]
    for fr in taken[1::2]:
        family.arena.dec_ref(fr)
    child = family.fork(parent)
    for fr in keep:
        family.arena.dec_ref(fr)
    assert [child.load(START + i * HUGE, 1) for i in range(4)] == [b"0", b"1", b"2", b"3"]
