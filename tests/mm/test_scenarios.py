"""Scenarios of gVisor's mm_test.go, and TestCopyObject of its usermem; named after them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.mm.allocate import allocation_direction
from kvmmm.mm.layout import Layout
from tests.mm.family import MAX, Family

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm.pin import Pin
    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096


def real_usage(setup: Setup) -> int:
    return sum(end - start for start, end, _ in setup.mm.vmas)


def real_data(setup: Setup) -> int:
    return sum(
        end - start
        for start, end, vma in setup.mm.vmas
        if vma.private and vma.perms & WRITE and not vma.grows_down
    )


def test_usage_as_updates(make: Make):
    setup = make()
    ar = setup.mm.mmap(2 * PAGE, NO_ACCESS)
    assert setup.mm.usage_bytes == real_usage(setup) == 2 * PAGE
    setup.mm.munmap(ar.start, PAGE)
    assert setup.mm.usage_bytes == real_usage(setup) == PAGE


def test_data_as_updates(make: Make):
    setup = make()
    ar = setup.mm.mmap(3 * PAGE, WRITE)
    assert setup.mm.data_bytes == real_data(setup) == 3 * PAGE
    setup.mm.munmap(ar.start, PAGE)
    assert setup.mm.data_bytes == real_data(setup) == 2 * PAGE
    setup.mm.mprotect(ar.start + PAGE, PAGE, READ)
    assert setup.mm.data_bytes == real_data(setup) == PAGE
    setup.mm.mremap(ar.start + 2 * PAGE, PAGE, 2 * PAGE, may_move=True)
    assert setup.mm.data_bytes == real_data(setup) == 2 * PAGE


def test_brk_data_limit_updates(make: Make):
    setup = make()
    setup.mm.set_brk(1 << 20)
    setup.mm.limits.data_bytes = 0
    old = setup.mm.brk(0)
    assert setup.mm.brk(old + PAGE) == old


def test_io_after_unmap(make: Make):
    setup = make()
    ar = setup.mm.mmap(PAGE, READ)
    assert setup.mm.copy_in(ar.start, bytearray(1)) == 1
    setup.mm.munmap(ar.start, PAGE)
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.copy_in(ar.start, bytearray(1))
    assert (caught.value.done, caught.value.addr) == (0, ar.start)


def test_io_after_mprotect(make: Make):
    setup = make()
    ar = setup.mm.mmap(PAGE, READ_WRITE)
    assert setup.mm.copy_out(ar.start, b"a") == 1
    setup.mm.mprotect(ar.start, PAGE, READ)
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.copy_out(ar.start, b"b")
    assert caught.value.done == 0
    assert setup.mm.copy_out(ar.start, b"c", ignore_permissions=True) == 1
    assert setup.mm.read(ar.start, 1) == b"c"


def test_copy_object(make: Make):
    """Integers of all widths, signed and not, as one object."""
    setup = make()
    layout = struct.Struct("<bBhHiIqQ")
    numbers = tuple(
        value for bits in (8, 16, 32, 64) for value in (-(1 << bits - 1) + 1, (1 << bits) - 2)
    )
    addr = setup.mm.mmap(2 * PAGE, READ_WRITE).start + PAGE - 5  # over the end of a page
    assert setup.mm.copy_out(addr, layout.pack(*numbers)) == layout.size == 30
    found = bytearray(layout.size)
    assert setup.mm.copy_in(addr, found) == layout.size
    assert layout.unpack(found) == numbers


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize(("last_fault", "answer"), [(0, None), (123, None), (456, True)])
def test_get_allocation_direction(make: Make, top_down: bool, last_fault: int, answer: bool | None):
    mm = make(layout=Layout(0, MAX, top_down=top_down)).mm
    mm.last_fault = last_fault
    assert allocation_direction(mm, 123) is (top_down if answer is None else answer)


def test_get_allocation_direction_upwards(make: Make):
    mm = make(layout=Layout(0, MAX, top_down=True)).mm
    mm.last_fault = 100
    assert allocation_direction(mm, 123) is False


def held_by(pin: Pin) -> bytes:
    """What whoever holds the pin sees, by its file."""
    found = b""
    for _, file, fr in pin.ranges:
        with file.view_of(fr) as view:
            found += view
    return found


def test_pinned_pages_copied_on_fork():
    with Family(Arena(64 << 20)) as family:
        parent = family.first
        addr = parent.mm.mmap(3 * PAGE, READ_WRITE).start
        parent.mm.copy_out(addr, b"A" * 3 * PAGE)
        pin = parent.mm.pin_frames(addr + PAGE, PAGE, READ_WRITE)
        for before, after in ((b"A", b"B"), (b"B", b"C")):  # the second finds pmas split already
            child = family.fork(parent)
            parent.mm.copy_out(addr, after * 3 * PAGE)
            assert held_by(pin) == after * PAGE
            assert child.mm.read(addr, 3 * PAGE) == before * 3 * PAGE
            child.mm.copy_out(addr, b"z" * 3 * PAGE)
            assert held_by(pin) == after * PAGE
        pin.release()


def test_pin_unshares_copy_on_write_pages():
    with Family(Arena(64 << 20)) as family:
        parent = family.first
        addr = parent.mm.mmap(PAGE, READ_WRITE).start
        parent.mm.copy_out(addr, b"A" * PAGE)
        child = family.fork(parent)
        with parent.mm.pin_frames(addr, PAGE, READ) as pin:
            parent.mm.copy_out(addr, b"B" * PAGE)
            assert held_by(pin) == b"B" * PAGE
        assert child.mm.read(addr, PAGE) == b"A" * PAGE


def test_unpinned_pages_copy_on_write_after_fork():
    with Family(Arena(64 << 20)) as family:
        parent = family.first
        addr = parent.mm.mmap(PAGE, READ_WRITE).start
        parent.mm.copy_out(addr, b"A" * PAGE)
        parent.mm.pin_frames(addr, PAGE, READ_WRITE).release()
        family.fork(parent)
        found = parent.mm.pmas.find(addr)
        assert found is not None
        assert found[2].need_cow
