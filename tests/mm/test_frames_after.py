"""What copies may do without asking, after each operation: never more than the pmas say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, NO_ACCESS, READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm.advice import MADV_DONTNEED
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mm.family import Process

START = 8 * HUGE
N_BYTES = 2 * HUGE
END = START + N_BYTES
HEAP = 32 * HUGE
RWRW = 15  # read and write, for everybody and for a debugger


@pytest.fixture(params=[False, True], ids=["tables", "memslots"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """[START, END) is written, a heap too; the table knows all of it."""
    with Family(Arena(64 << 20), walks_frames=request.param) as made:
        one = made.first
        one.map(START, END)
        one.mm.set_brk(HEAP)
        one.mm.brk(HEAP + HUGE)
        one.mm.copy_out(START, b"\x11" * N_BYTES)
        one.mm.copy_out(HEAP, b"\x22" * HUGE)
        assert bits_of(one, START, END) == {RWRW}
        yield made


def bits_of(one: Process, start: int, end: int) -> set[int]:
    """All that the table says of [start, end); 0 for pages that it says nothing of."""
    found = {bits for _, _, _, bits in one.mm.frames(start, end)}
    n_bytes = sum(e - s for s, e, _, _ in one.mm.frames(start, end))
    return found | ({0} if n_bytes < end - start else set())


MID = START + 16 * PAGE
SOME = 32 * PAGE


def _cow_by_copy(family: Family) -> set[int]:
    child = family.fork(family.first)
    family.first.mm.copy_in(START, bytearray(N_BYTES))
    child.mm.copy_in(START, bytearray(N_BYTES))
    # What is shared may be read; a debugger's write copies as well.
    if not family.walks_frames:
        assert bits_of(child, START, END) == bits_of(family.first, START, END) == {5}
    child.mm.copy_out(MID, b"child")
    family.check()
    return bits_of(family.first, MID, MID + SOME)


def _cow_by_fault(family: Family) -> set[int]:
    child = family.fork(family.first)
    child.mm.copy_in(START, bytearray(N_BYTES))
    child.store(MID, b"child")
    family.check()
    assert child.mm.read(MID, 5) == b"child"
    assert family.first.mm.read(MID, 5) == b"\x11" * 5
    return bits_of(child, MID, MID + PAGE)


def _sole_owner(family: Family) -> set[int]:
    """Whose relatives are gone has its frames for itself again, without a copy."""
    one = family.first
    child = family.fork(one)
    one.mm.copy_in(START, bytearray(N_BYTES))
    family.end(child)
    offset = one.offset(START)
    one.mm.copy_out(START, b"again")
    assert one.offset(START) == offset
    return bits_of(one, START, START + PAGE)


def _mremap_moves(family: Family) -> set[int]:
    one = family.first
    moved = one.mm.mremap(MID, SOME, 2 * SOME, may_move=True)
    start = moved.start if isinstance(moved, AddrRange) else moved
    assert start != MID
    assert one.mm.read(start, SOME) == b"\x11" * SOME
    assert bits_of(one, start, start + SOME) == {RWRW}
    return bits_of(one, MID, MID + SOME)


def _invalidate(family: Family) -> set[int]:
    """What a mappable takes back; a private copy stays."""
    one = family.first
    shared = SharedMemory(family.arena, SOME)
    one.map(MID, MID + SOME, mappable=shared, private=False)
    one.mm.copy_out(MID, b"shared")
    assert bits_of(one, MID, MID + SOME) == {RWRW}
    one.mm.invalidate(AddrRange(MID, MID + SOME), private=False)
    return bits_of(one, MID, MID + SOME)


def _foreign(family: Family) -> set[int]:
    """Frames of somebody else's file are not in it: it may be cut short."""
    one = family.first
    mappable = FakeMappable(FakeFile(SOME))
    one.map(MID, MID + SOME, mappable=mappable, private=False)
    one.mm.copy_out(MID, b"y" * SOME)
    assert one.mm.read(MID, SOME) == b"y" * SOME
    return bits_of(one, MID, MID + SOME)


def _pin(family: Family) -> set[int]:
    with family.first.mm.pin_frames(MID, SOME, READ_WRITE):
        family.check()
        family.fork(family.first)
        # What is pinned is not shared with a child.
        family.first.mm.copy_out(MID, b"pinned")
        family.check()
        return bits_of(family.first, MID, MID + SOME)


def _close(family: Family) -> set[int]:
    child = family.fork(family.first)
    child.mm.copy_in(START, bytearray(N_BYTES))
    child.mm.close()
    found = bits_of(child, START, END)
    assert child.mm.frames(0, child.mm.max_addr) == []
    family.end(child)
    return found


def _by(call: Callable[[Any], object]) -> Callable[[Family], set[int]]:
    def act(family: Family) -> set[int]:
        call(family.first.mm)
        return bits_of(family.first, MID, MID + SOME)

    return act


def _brk(family: Family) -> set[int]:
    family.first.mm.brk(HEAP + SOME)
    assert bits_of(family.first, HEAP, HEAP + SOME) == {RWRW}
    return bits_of(family.first, HEAP + SOME, HEAP + HUGE)


# What the table may say afterwards where the operation was, and nothing else.
OPERATIONS: dict[str, tuple[Callable[[Family], set[int]], set[int]]] = {
    "munmap": (_by(lambda mm: mm.munmap(MID, SOME)), {0}),
    "mmap over it": (
        _by(lambda mm: mm.mmap(SOME, READ, addr=MID, fixed=True, replace=True)), {0},
    ),
    "mprotect to nothing": (_by(lambda mm: mm.mprotect(MID, SOME, NO_ACCESS)), {0}),
    "mprotect to read": (_by(lambda mm: mm.mprotect(MID, SOME, READ)), {0}),
    "mprotect to more": (_by(lambda mm: mm.mprotect(MID, SOME, ANY_ACCESS)), {RWRW}),
    "mprotect to execute": (_by(lambda mm: mm.mprotect(MID, SOME, EXECUTE)), {0}),
    "mremap smaller": (_by(lambda mm: mm.mremap(MID, 2 * SOME, PAGE)), {0, RWRW}),
    "mremap moves": (_mremap_moves, {0}),
    "madvise DONTNEED": (_by(lambda mm: mm.madvise(MID, SOME, MADV_DONTNEED)), {0}),
    "fork": (_by(lambda _: None), {RWRW}),
    "copy on write by copy": (_cow_by_copy, {5, RWRW}),
    "copy on write by fault": (_cow_by_fault, {0, 5, RWRW}),
    "sole owner": (_sole_owner, {RWRW}),
    "invalidate": (_invalidate, {0}),
    "a foreign file": (_foreign, {0}),
    "brk": (_brk, {0}),
    "pin": (_pin, {0, 5, RWRW}),
    "close": (_close, {0}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_after(family: Family, name: str):
    act, allowed = OPERATIONS[name]
    found = act(family)
    assert found <= allowed
    family.check()


def test_a_fork_takes_it_from_the_parent_where_frames_are_shared(family: Family):
    one = family.first
    one.mm.mprotect(MID, SOME, READ)
    one.mm.read(MID, SOME)
    assert bits_of(one, MID, MID + SOME) == {READ | 3 << 2}  # a debugger may write
    child = family.fork(one)
    if not family.walks_frames:
        assert one.mm.frames(0, one.mm.max_addr) == []
    one.mm.copy_out(MID, b"mine", ignore_permissions=True)
    child.mm.copy_out(MID, b"hers", ignore_permissions=True)
    assert (one.mm.read(MID, 4), child.mm.read(MID, 4)) == (b"mine", b"hers")
    family.check()


def test_a_miss_fills_16_mib_at_most():
    with Family(Arena(128 << 20)) as family:
        one = family.first
        one.map(START, START + (64 << 20))
        one.mm.populate(START, 64 << 20)
        assert one.mm.frames(0, one.mm.max_addr) == []
        at = START + (20 << 20)
        one.mm.read(at, 1)
        (start, end, _, _), *others = one.mm.frames(0, one.mm.max_addr)
        assert not others
        assert start <= at < end
        assert end - start <= 16 << 20
        # A longer copy fills what it needs at once.
        one.mm.read(START, 64 << 20)
        assert bits_of(one, START, START + (64 << 20)) == {RWRW}
