"""What may differ between mechanisms: all of it, each by name.

Where a copy from a Reader goes through the address space, its bytes go through a buffer, because a
Reader is asked once at most, and a copy that faults is tried again. So the source is read before
anybody knows whether the destination can be written. A Writer is called after the copy either way.

Source: gVisor mm.CopyOutFrom, mm.CopyInTo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm import IOOpts, MemoryManager
from tests.copies.streams import Broken, RefusalError, Sink, Source
from tests.model.backends import FakeBackend
from tests.model.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

START, END = 16 * PAGE, 17 * PAGE
DATA = b"0123456789abcdef"
DIRECT, BUFFERED = IOOpts(mechanism="internal"), IOOpts(mechanism="mirror")
BOTH = pytest.mark.parametrize("opts", [DIRECT, BUFFERED], ids=["direct", "buffered"])


@pytest.fixture
def mm() -> Iterator[MemoryManager]:
    """One page, and a hole behind it."""
    backend = FakeBackend()
    mm = MemoryManager(backend.arena, backend.new_space())
    mm.mmap(PAGE, addr=START, fixed=True)
    yield mm
    mm.close()
    backend.close()


def of(*ranges: tuple[int, int]) -> AddrRangeSeq:
    return AddrRangeSeq(AddrRange(start, end) for start, end in ranges)


# ---- what differs ----


def test_a_source_is_read_before_it_is_known_that_the_destination_is_bad(mm: MemoryManager):
    bad = of((END, END + 16))
    for opts, consumed in ((DIRECT, 0), (BUFFERED, 16)):
        src = Source(DATA)
        with pytest.raises(GuestFaultError) as caught:
            mm.copy_out_from(bad, src, opts=opts)
        assert (caught.value.addr, caught.value.done) == (END, 0)
        assert src.position == consumed


def test_more_of_a_source_is_read_than_can_be_written(mm: MemoryManager):
    half = of((END - 6, END + 10))
    for opts, consumed in ((DIRECT, 6), (BUFFERED, 16)):
        src = Source(DATA)
        with pytest.raises(GuestFaultError) as caught:
            mm.copy_out_from(half, src, opts=opts)
        assert (caught.value.addr, caught.value.done) == (END, 6)
        assert src.position == consumed
        assert mm.read(END - 6, 6) == DATA[:6]


def test_a_source_may_refuse_before_a_bad_destination_does(mm: MemoryManager):
    bad = of((END, END + 16))
    with pytest.raises(GuestFaultError):
        mm.copy_out_from(bad, Broken(), opts=DIRECT)
    with pytest.raises(RefusalError):
        mm.copy_out_from(bad, Broken(), opts=BUFFERED)


class Interrupted(Source):
    """A Reader that gives all it has, and then fails all the same."""

    def read_to_blocks(self, dsts: object) -> int:
        super().read_to_blocks(dsts)  # type: ignore[arg-type]
        raise RefusalError


def test_what_a_source_gave_before_it_failed(mm: MemoryManager):
    """An exception tells no count: directly the bytes are there already, in a buffer they end."""
    for opts, there in ((DIRECT, DATA), (BUFFERED, bytes(16))):
        mm.zero_out(START, PAGE)
        with pytest.raises(RefusalError):
            mm.copy_out_from(of((START, START + 16)), Interrupted(DATA), opts=opts)
        assert mm.read(START, 16) == there


# ---- what does not ----


@BOTH
def test_nobody_is_asked_about_a_range_that_no_address_space_has(mm: MemoryManager, opts: IOOpts):
    src = Source(DATA)
    for beyond in ((START, START + 4), (mm.max_addr, mm.max_addr + 4)), ((1 << 63, 1 << 63),):
        with pytest.raises(GuestFaultError):
            mm.copy_out_from(of(*beyond), src, opts=opts)
    assert src.position == 0
    assert mm.read(START, 4) == bytes(4)


@BOTH
def test_nobody_is_asked_about_nothing(mm: MemoryManager, opts: IOOpts):
    nothing = of((END, END), (0, 0))
    assert mm.copy_out_from(nothing, Broken(), opts=opts) == 0
    assert mm.copy_in_to(nothing, Broken(), opts=opts) == 0


@BOTH
def test_a_source_that_has_less_than_can_be_written(mm: MemoryManager, opts: IOOpts):
    """It ended before the hole: nothing is wrong."""
    assert mm.copy_out_from(of((END - 6, END + 10)), Source(DATA[:5]), opts=opts) == 5


@BOTH
def test_a_source_with_exactly_what_can_be_written(mm: MemoryManager, opts: IOOpts):
    """Nobody knows whether it has more: it was not asked, directly."""
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_out_from(of((END - 6, END + 10)), Source(DATA[:6]), opts=opts)
    assert (caught.value.addr, caught.value.done) == (END, 6)
    assert mm.read(END - 6, 6) == DATA[:6]


@BOTH
def test_a_writer_with_room_for_exactly_what_can_be_read(mm: MemoryManager, opts: IOOpts):
    mm.copy_out(END - 6, DATA[:6])
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_in_to(of((END - 6, END + 10)), sink := Sink(6), opts=opts)
    assert (caught.value.addr, caught.value.done) == (END, 6)
    assert sink.data == DATA[:6]


@BOTH
def test_a_writer_is_not_called_when_nothing_can_be_read(mm: MemoryManager, opts: IOOpts):
    with pytest.raises(GuestFaultError):
        mm.copy_in_to(of((END, END + 16)), Broken(), opts=opts)


@BOTH
def test_the_error_of_a_writer_comes_before_that_of_the_copy(mm: MemoryManager, opts: IOOpts):
    with pytest.raises(RefusalError):
        mm.copy_in_to(of((END - 6, END + 10)), Broken(), opts=opts)


@BOTH
def test_a_writer_that_takes_less_than_can_be_read(mm: MemoryManager, opts: IOOpts):
    mm.copy_out(END - 6, DATA[:6])
    sink = Sink(5)
    assert mm.copy_in_to(of((END - 6, END + 10)), sink, opts=opts) == 5
    assert sink.data == DATA[:5]
    with pytest.raises(GuestFaultError) as caught:
        mm.copy_in_to(of((END - 6, END + 10)), sink := Sink(16), opts=opts)
    assert (caught.value.addr, caught.value.done) == (END, 6)
    assert sink.data[:6] == DATA[:6]
