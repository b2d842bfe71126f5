"""Copies between host and guest memory: all of it, or the first byte that could not be."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import EXECUTE, NO_ACCESS, READ, READ_WRITE, WRITE
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
START = 4 * HUGE
END = START + 3 * HUGE


@pytest.fixture
def setup(make: Make) -> Setup:
    """[START, END) read-write; its windows are several pmas."""
    setup = make()
    setup.map(START, END, READ_WRITE, "[memory]")
    return setup


def test_across_windows(setup: Setup):
    data = bytes(i * 7 & 0xFF for i in range(2 * HUGE))
    assert setup.mm.copy_out(START + 100, data) == len(data)
    out = bytearray(len(data))
    assert setup.mm.copy_in(START + 100, out) == len(data)
    assert out == data
    assert setup.mm.read(START + 100, len(data)) == data
    assert setup.mm.read(START, 100) == bytes(100)
    # A CPU sees the same bytes.
    assert setup.space.load(START + HUGE - 50, 100) == data[HUGE - 150 : HUGE - 50]


def test_the_guest_writes_and_the_host_reads(setup: Setup):
    setup.space.store(START + HUGE - 3, b"straddle")
    assert setup.mm.read(START + HUGE - 3, 8) == b"straddle"


def test_any_buffer_will_do(setup: Setup):
    import array

    numbers = array.array("I", [1, 2, 3])
    assert setup.mm.copy_out(START, memoryview(numbers)) == 12
    back = array.array("I", [0, 0, 0])
    assert setup.mm.copy_in(START, memoryview(back)) == 12
    assert back == numbers
    assert setup.mm.write(START, bytearray(b"abc")) == 3


def test_the_destination_must_be_writable(setup: Setup):
    with pytest.raises(TypeError):
        setup.mm.copy_in(START, memoryview(b"const"))


def test_nothing_is_nothing(setup: Setup):
    assert setup.mm.copy_in(0, bytearray()) == 0
    assert setup.mm.copy_out(0, b"") == 0
    assert setup.mm.read(END + 5, 0) == b""


def test_zero_out(setup: Setup):
    setup.mm.copy_out(START, b"\xff" * 3 * PAGE)
    assert setup.mm.zero_out(START + 10, 2 * PAGE) == 2 * PAGE
    data = setup.mm.read(START, 3 * PAGE)
    assert data == b"\xff" * 10 + bytes(2 * PAGE) + b"\xff" * (PAGE - 10)


@pytest.mark.parametrize("end_mapped", [False, True], ids=["hole", "forbidden"])
class TestRefused:
    """The last 10 bytes of a copy lie in a page that refuses."""

    AT = END - PAGE + 10 - 100

    @pytest.fixture
    def setup(self, setup: Setup, end_mapped: bool) -> Setup:
        if end_mapped:
            setup.mm.mprotect(END - PAGE, PAGE, NO_ACCESS)
        else:
            setup.mm.munmap(END - PAGE, PAGE)
        return setup

    def check(self, error: GuestFaultError, access: int, end_mapped: bool) -> None:
        assert (error.addr, error.done, error.mapped) == (END - PAGE, 90, end_mapped)
        assert error.access == access
        assert error.errno == errno.EFAULT
        assert isinstance(error, OSError)
        assert hex(END - PAGE) in str(error)
        assert "(90 bytes done)" in str(error)
        assert ("its mapping forbids it" if end_mapped else "nothing is mapped there") in str(error)

    def test_copy_in(self, setup: Setup, end_mapped: bool):
        setup.mm.copy_out(self.AT, bytes(range(90)))
        out = bytearray(b"." * 100)
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.copy_in(self.AT, out)
        self.check(caught.value, READ, end_mapped)
        assert out == bytes(range(90)) + b"." * 10

    def test_copy_out(self, setup: Setup, end_mapped: bool):
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.copy_out(self.AT, bytes(range(100)))
        self.check(caught.value, WRITE, end_mapped)
        assert setup.mm.read(self.AT, 90) == bytes(range(90))

    def test_zero_out(self, setup: Setup, end_mapped: bool):
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.zero_out(self.AT, 100)
        self.check(caught.value, WRITE, end_mapped)


@pytest.mark.parametrize("perms", [READ, EXECUTE, READ | EXECUTE])
def test_a_mapping_without_write_is_read_and_not_written(setup: Setup, perms: int):
    setup.mm.copy_out(START, b"kept")
    setup.mm.mprotect(START, END - START, perms)
    assert setup.mm.read(START, 4) == b"kept"  # x86: execute implies read
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.copy_out(START, b"lost")
    assert (caught.value.addr, caught.value.done, caught.value.mapped) == (START, 0, True)
    assert setup.mm.read(START, 4) == b"kept"


def test_a_debugger_ignores_permissions_but_not_holes(setup: Setup):
    setup.mm.mprotect(START, END - START, NO_ACCESS)
    assert setup.mm.copy_out(START, b"abc", ignore_permissions=True) == 3
    assert setup.mm.read(START, 3, ignore_permissions=True) == b"abc"
    with pytest.raises(GuestFaultError):
        setup.mm.read(END, 1, ignore_permissions=True)


@pytest.mark.parametrize("addr", [-1, 1 << 63, (1 << 64) - 4])
def test_addresses_out_of_this_world(setup: Setup, addr: int):
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.read(addr, 16)
    # What no register holds is said as the last address there is.
    first = max(addr, setup.mm.max_addr) if 0 <= addr < 1 << 64 else (1 << 64) - 1
    assert (caught.value.addr, caught.value.mapped) == (first, False)


def test_exhausted_in_the_middle_says_where(make: Make):
    setup = make(HUGE)
    setup.map(START, END, READ_WRITE)
    with pytest.raises(ArenaExhaustedError) as caught:
        setup.mm.copy_out(START, bytes(HUGE + PAGE))
    notes = " ".join(caught.value.__notes__)
    assert hex(START + HUGE) in notes
    assert f"{HUGE} bytes" in notes


def test_a_copy_counts_no_fault(setup: Setup):
    setup.mm.copy_out(START, b"x")
    assert setup.mm.counters.faults == 0
    assert setup.mm.counters.allocated_bytes == HUGE


def test_no_view_stays_behind(setup: Setup):
    """After any copy the arena can be closed: the fixture does."""
    setup.mm.read(START, PAGE)
    with pytest.raises(GuestFaultError):
        setup.mm.copy_out(END - 1, b"ab")


class Stubborn(bytes):
    """Not a buffer that can be written."""


def test_a_failing_buffer_leaves_nothing_behind(setup: Setup):
    with pytest.raises(TypeError):
        setup.mm.copy_in(START, Stubborn(b"12345678"))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        setup.mm.copy_out(START, 7)
