"""Strings in guest memory: up to the NUL, and no page further."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmm.errors import GuestBusError, GuestFaultError, StringTooLongError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE
from tests.fakes import FakeFile, FakeMappable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

PAGE = 4096
START = 0x100000
END = START + 4 * PAGE


@pytest.fixture
def setup(make: Callable[..., Setup]) -> Setup:
    """[START, END) read-write, and nothing behind."""
    setup = make()
    setup.map(START, END)
    return setup


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, PAGE - 1, PAGE, 2 * PAGE + 5])
@pytest.mark.parametrize("offset", [0, 3, PAGE - 1, PAGE - 256])
def test_a_string(setup: Setup, length: int, offset: int):
    text = b"x" * length
    setup.mm.copy_out(START + offset, text + b"\0y")
    assert setup.mm.read_string(START + offset, 4 * PAGE) == text


def test_the_nul_may_be_the_last_byte_that_there_is(setup: Setup):
    setup.mm.copy_out(END - 4, b"end\0")
    assert setup.mm.read_string(END - 4) == b"end"
    assert setup.mm.read_string(END - 1) == b""


def test_no_page_behind_the_nul_is_touched(make: Callable[..., Setup]):
    setup = make(eager_bytes=0)
    mappable = FakeMappable(FakeFile(4 * PAGE))
    mappable.file.bytes[:] = b"-" * PAGE + b"\0" + b"-" * (3 * PAGE - 1)
    setup.map(START, END, READ, mappable=mappable)
    assert setup.mm.read_string(START + PAGE - 3) == b"---"
    assert [(required.start, required.end) for required, _, _ in mappable.calls] == [
        (0, PAGE),
        (PAGE, 2 * PAGE),
    ]


def test_the_nul_counts(setup: Setup):
    setup.mm.copy_out(START, b"four\0")
    assert setup.mm.read_string(START, 5) == b"four"
    with pytest.raises(StringTooLongError) as caught:
        setup.mm.read_string(START, 4)
    assert (caught.value.addr, caught.value.prefix) == (START, b"four")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_nothing_may_be_read(setup: Setup):
    with pytest.raises(StringTooLongError) as caught:
        setup.mm.read_string(END, 0)
    assert caught.value.prefix == b""
    with pytest.raises(ValueError, match="-1"):
        setup.mm.read_string(START, -1)


def test_too_long_over_pages(setup: Setup):
    text = bytes(1 + i % 255 for i in range(3 * PAGE))
    setup.mm.copy_out(START + 7, text)
    with pytest.raises(StringTooLongError) as caught:
        setup.mm.read_string(START + 7, 2 * PAGE + 100)
    assert caught.value.prefix == text[: 2 * PAGE + 100]


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("length", [0, 5, 300, PAGE + 300])
def test_a_fault_before_any_nul(setup: Setup, forbidden: bool, length: int):
    setup.mm.copy_out(START, b"z" * 4 * PAGE)
    if forbidden:
        setup.mm.mprotect(END - PAGE, PAGE, NO_ACCESS)
    else:
        setup.mm.munmap(END - PAGE, PAGE)
    stop = END - PAGE
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.read_string(stop - length, 2 * PAGE)
    error = caught.value
    assert (error.addr, error.done, error.mapped) == (stop, length, forbidden)
    assert error.prefix == b"z" * length
    if forbidden:
        with pytest.raises(StringTooLongError):
            setup.mm.read_string(stop - length, PAGE, ignore_permissions=True)


def test_its_file_ends(setup: Setup):
    mappable = FakeMappable(FakeFile(PAGE))
    mappable.file.bytes[:] = b"f" * PAGE
    setup.map(START, START + 2 * PAGE, READ, mappable=mappable)
    with pytest.raises(GuestBusError) as caught:
        setup.mm.read_string(START + PAGE - 9)
    assert (caught.value.addr, caught.value.done) == (START + PAGE, 9)
    assert caught.value.prefix == b"f" * 9


class TestTheEndOfAllMemory:
    MAX = 256 << 20

    @pytest.fixture
    def setup(self, make: Callable[..., Setup]) -> Setup:
        setup = make(max_addr=self.MAX)
        setup.map(self.MAX - PAGE, self.MAX)
        return setup

    def test_a_string_before_it(self, setup: Setup):
        setup.mm.copy_out(self.MAX - 3, b"ab\0")
        assert setup.mm.read_string(self.MAX - 3) == b"ab"

    def test_none(self, setup: Setup):
        setup.mm.copy_out(self.MAX - 2, b"ab")
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.read_string(self.MAX - 2)
        assert (caught.value.addr, caught.value.prefix) == (self.MAX, b"ab")

    @pytest.mark.parametrize("addr", [MAX, MAX + 1, (1 << 64) - 1])
    def test_behind_it(self, setup: Setup, addr: int):
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.read_string(addr)
        assert (caught.value.addr, caught.value.done) == (addr, 0)


def test_decoded(setup: Setup):
    setup.mm.copy_out(START, "größe".encode() + b"\0")
    assert setup.mm.read_string(START, encoding="utf-8") == "größe"
    with pytest.raises(UnicodeDecodeError):
        setup.mm.read_string(START, encoding="ascii")


def test_the_page_is_taken_away_while_it_is_read(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    """What a second look finds is what counts."""
    setup.mm.copy_out(START, b"abc\0")
    real = type(setup.mm).read

    def failing(_mm: object, addr: int, _n_bytes: int) -> bytes:
        monkeypatch.setattr(type(setup.mm), "read", real)
        raise GuestFaultError(addr + 1, READ, mapped=True, done=1)

    monkeypatch.setattr(type(setup.mm), "read", failing)
    assert setup.mm.read_string(START) == b"abc"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_as_a_slow_model_does(setup: Setup, data: st.DataObject):
    """Byte by byte; the last page cannot be read."""
    setup.map(START, END, READ_WRITE)
    content = bytearray(b"q" * 3 * PAGE)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = 0
    setup.mm.copy_out(START, content)
    setup.mm.mprotect(END - PAGE, PAGE, NO_ACCESS)
    offset = data.draw(st.integers(0, len(content)))
    max_bytes = data.draw(st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([0, 1, 256, PAGE])))
    rest = bytes(content[offset : offset + max_bytes])
    if 0 in rest:
        assert setup.mm.read_string(START + offset, max_bytes) == rest[: rest.index(0)]
    elif len(rest) == max_bytes:
        with pytest.raises(StringTooLongError) as too_long:
            setup.mm.read_string(START + offset, max_bytes)
        assert too_long.value.prefix == rest
    else:
        with pytest.raises(GuestFaultError) as fault:
            setup.mm.read_string(START + offset, max_bytes)
        assert (fault.value.prefix, fault.value.addr) == (rest, END - PAGE)
