"""Pins: frames that stay, and stay the guest's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestBusError, GuestFaultError, RangeError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.mm.pin import Pin

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        made.first.map(START, START + 4 * HUGE)
        yield made


def read(pin: Pin) -> bytes:
    """What whoever holds the pin sees."""
    found = b""
    for _, file, fr in pin.ranges:
        with file.view_of(fr) as view:
            found += view
    return found


def test_its_frames_are_those_of_the_guest(family: Family):
    one = family.first
    one.store(START + HUGE - 3, b"abcdef")
    with one.mm.pin_frames(START + HUGE - 3, 6, READ) as pin:
        assert pin.error is None
        assert [(ar.start, ar.end) for ar, _, _ in pin.ranges] == [
            (START + HUGE - PAGE, START + HUGE + PAGE)
        ]
        assert read(pin)[PAGE - 3 : PAGE + 3] == b"abcdef"
        one.store(START + HUGE, b"D")
        assert read(pin)[PAGE - 3 : PAGE + 3] == b"abcDef"
        family.check()
    pin.release()


def test_it_outlives_its_mapping_and_its_mm():
    with Family(Arena(64 << 20)) as family:
        one = family.first
        one.map(START, START + HUGE)
        one.store(START, b"kept")
        pin = one.mm.pin_frames(START, 1, READ)
        one.mm.munmap(START, HUGE)
        assert read(pin)[:4] == b"kept"
        assert family.arena.statistics().used_bytes == PAGE
        one.mm.close()
        assert read(pin)[:4] == b"kept"
        pin.release()


def test_the_tail_cannot_be_used(family: Family):
    one = family.first
    with one.mm.pin_frames(START + 4 * HUGE - 2 * PAGE, 4 * PAGE, WRITE) as pin:
        assert [ar.length_bytes for ar, _, _ in pin.ranges] == [2 * PAGE]
        assert isinstance(pin.error, GuestFaultError)
        assert pin.error.addr == START + 4 * HUGE
    one.mm.mprotect(START + PAGE, PAGE, READ)
    with one.mm.pin_frames(START, 3 * PAGE, WRITE) as pin:
        assert [ar.length_bytes for ar, _, _ in pin.ranges] == [PAGE]
        assert isinstance(pin.error, GuestFaultError)
        assert (pin.error.addr, pin.error.mapped) == (START + PAGE, True)


@pytest.mark.parametrize("perms", [None, NO_ACCESS])
def test_nothing_can_be_used(family: Family, perms: int | None):
    one = family.first
    if perms is None:
        one.mm.munmap(START, PAGE)
    else:
        one.mm.mprotect(START, PAGE, perms)
    with pytest.raises(GuestFaultError) as caught:
        one.mm.pin_frames(START + 5, 1, READ)
    assert (caught.value.addr, caught.value.mapped) == (START + 5, perms is not None)
    assert not one.mm.pins


def test_behind_a_files_end(family: Family):
    one = family.first
    one.map(0x10000, 0x14000, mappable=FakeMappable(FakeFile(2 * PAGE)))
    with one.mm.pin_frames(0x10000, 0x4000, READ) as pin:
        assert sum(ar.length_bytes for ar, _, _ in pin.ranges) == 2 * PAGE
        assert isinstance(pin.error, GuestBusError)
    with pytest.raises(GuestBusError) as caught:
        one.mm.pin_frames(0x12003, 4, READ)
    assert caught.value.addr == 0x12003


def test_malformed(family: Family):
    for addr, length in ((START, 0), (START, -1), (-PAGE, PAGE)):
        with pytest.raises(RangeError):
            family.first.mm.pin_frames(addr, length, READ)


def test_shared_file_pages_stay_the_files(family: Family):
    file = FakeFile(4 * PAGE)
    mappable = FakeMappable(file)
    one = family.first
    one.map(0x10000, 0x14000, mappable=mappable, private=False)
    with one.mm.pin_frames(0x11000, PAGE, READ_WRITE) as pin:
        assert pin.ranges[0][1] is file
        assert file.references[PAGE] == 2
        file.bytes[PAGE] = 0x41
        assert read(pin)[:1] == b"A"
    assert file.references[PAGE] == 1


def test_a_private_file_page_is_copied_even_for_reading(family: Family):
    file = FakeFile(4 * PAGE)
    file.bytes[:4] = b"file"
    one = family.first
    one.map(0x10000, 0x14000, READ, mappable=FakeMappable(file))
    with one.mm.pin_frames(0x10000, PAGE, READ) as pin:
        assert pin.ranges[0][1] is family.arena
        assert read(pin)[:4] == b"file"
        one.mm.mprotect(0x10000, PAGE, READ_WRITE)
        one.store(0x10000, b"mine")
        assert read(pin)[:4] == b"mine"
        family.check()


@pytest.mark.parametrize("walks_frames", [False, True])
def test_several_forks_of_pinned_pages(walks_frames: bool):
    with Family(Arena(64 << 20), walks_frames=walks_frames) as family:
        one = family.first
        one.map(START, START + HUGE)
        one.store(START, b"A" * 8 * PAGE)
        pins = [one.mm.pin_frames(START + i * PAGE, PAGE, READ_WRITE) for i in (1, 2, 5)]
        for letter in (b"B", b"C"):
            child = family.fork(one)
            family.check()
            before = one.load(START, 1)
            one.store(START, letter * 8 * PAGE)
            assert [read(pin) for pin in pins] == [letter * PAGE] * 3
            assert child.load(START, 8 * PAGE) == before * 8 * PAGE
            child.store(START, b"z" * 8 * PAGE)
            assert [read(pin) for pin in pins] == [letter * PAGE] * 3
            family.check()
        # The parent's pinned pages are written without a copy.
        assert not any(need_cow for start, _, need_cow in one.pmas() if start == START + 5 * PAGE)
        for pin in pins:
            pin.release()


def test_a_fork_without_room_for_pinned_pages():
    with Family(Arena(HUGE)) as family:
        one = family.first
        one.map(START, START + HUGE)
        one.store(START, b"A")
        with one.mm.pin_frames(START, PAGE, READ_WRITE):
            before = one.pmas(), dict(one.space.pages)
            with pytest.raises(ArenaExhaustedError):
                family.fork(one)
            assert before == (one.pmas(), dict(one.space.pages))
            family.check()
        family.fork(one)


def test_two_pins_of_one_page(family: Family):
    one = family.first
    one.store(START, b"x")
    first = one.mm.pin_frames(START, 1, READ)
    second = one.mm.pin_frames(START, 1, READ)
    family.check()
    assert family.arena.ref_count(one.offset(START)) == 3
    second.release()
    second.release()
    assert family.arena.ref_count(one.offset(START)) == 2
    first.release()
