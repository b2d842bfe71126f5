"""mm[addr] and mm[start:end]."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError, RangeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

PAGE = 4096
START = 0x100000
END = START + 4 * PAGE


@pytest.fixture
def setup(make: Callable[..., Setup]) -> Setup:
    setup = make()
    setup.map(START, END)
    return setup


def test_bytes_and_ranges(setup: Setup):
    mm = setup.mm
    mm[START + PAGE - 2 : START + PAGE + 2] = b"abcd"
    assert mm[START + PAGE - 2 : START + PAGE + 2] == b"abcd"
    assert mm[START + PAGE] == ord("c")
    mm[START + PAGE] = 0xFF
    assert mm[START + PAGE - 1 : START + PAGE + 2] == b"b\xffd"
    assert isinstance(mm[START:END], bytes)
    assert len(mm[START:END]) == 4 * PAGE


def test_nothing(setup: Setup):
    assert setup.mm[START:START] == b""
    setup.mm[START:START] = b""
    assert setup.mm[0:0] == b""


class Number:
    def __index__(self) -> int:
        return START


def test_numbers_of_any_kind(setup: Setup):
    mm: Any = setup.mm
    mm[Number()] = True
    assert mm[Number()] == 1
    assert mm[Number() : START + 1] == b"\1"


@pytest.mark.parametrize(
    "value", [bytearray(b"wxyz"), memoryview(b"wxyz"), array.array("H", [1, 2])]
)
def test_any_buffer(setup: Setup, value: Any):
    setup.mm[START : START + 4] = value
    assert setup.mm[START : START + 4] == bytes(value)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        (-1, RangeError),
        (slice(-4, START), RangeError),
        (slice(START, -1), RangeError),
        (slice(-2, -1), RangeError),
        (slice(START + 1, START), RangeError),
        (slice(None, START), TypeError),
        (slice(START, None), TypeError),
        (slice(None, None), TypeError),
        (slice(START, START + 4, 1), TypeError),
        (slice(START, START + 4, -1), TypeError),
        ("0", TypeError),
        (1.0, TypeError),
        (None, TypeError),
        ((START, END), TypeError),
        (slice(1.0, 2), TypeError),
        (slice("a", "b"), TypeError),
    ],
)
def test_what_is_no_place(setup: Setup, where: Any, error: type[Exception]):
    mm: Any = setup.mm
    with pytest.raises(error):
        mm[where]
    with pytest.raises(error):
        mm[where] = b"1234" if isinstance(where, slice) else 1


@pytest.mark.parametrize(
    ("where", "value", "error"),
    [
        (slice(START, START + 4), b"123", ValueError),
        (slice(START, START + 4), b"12345", ValueError),
        (slice(START, START + 4), "1234", TypeError),
        (slice(START, START + 4), 1, TypeError),
        (slice(START, START + 2), memoryview(b"1234")[::2], (TypeError, ValueError, BufferError)),
        (START, 256, ValueError),
        (START, -1, ValueError),
        (START, b"1", TypeError),
        (START, 1.0, TypeError),
    ],
)
def test_what_is_no_value(
    setup: Setup, where: Any, value: Any, error: type[Exception] | tuple[type[Exception], ...]
):
    mm: Any = setup.mm
    mm[START : START + 6] = b"kept.."
    with pytest.raises(error):
        mm[where] = value
    assert mm[START : START + 6] == b"kept.."


def test_faults(setup: Setup):
    mm = setup.mm
    for call, done in (
        (lambda: mm[END - 3 : END + 3], 3),
        (lambda: mm.__setitem__(slice(END - 3, END + 3), b"x" * 6), 3),
        (lambda: mm[END], 0),
        (lambda: mm.__setitem__(END, 1), 0),
    ):
        with pytest.raises(GuestFaultError) as caught:
            call()
        assert (caught.value.addr, caught.value.done) == (END, done)
    assert mm[END - 4 : END] == b"\0xxx"


def test_beyond_all_addresses(setup: Setup):
    for where in (1 << 64, setup.mm.max_addr):
        with pytest.raises(GuestFaultError) as caught:
            setup.mm[where]
        assert caught.value.addr >= setup.mm.max_addr
    with pytest.raises(GuestFaultError):
        setup.mm[START : 1 << 65]


def test_memory_is_no_sequence(setup: Setup):
    """It has no length to iterate over."""
    mm: Any = setup.mm
    for call in (lambda: list(mm), lambda: 5 in mm, lambda: len(mm), lambda: reversed(mm)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises((TypeError, AttributeError)):
        del mm[START]


def test_it_holds_no_pointer(setup: Setup):
    """What was read stays what it was, and the arena can be closed: the fixture does."""
    before = setup.mm[START : START + 4]
    setup.mm[START : START + 4] = b"new!"
    assert before == bytes(4)
