from __future__ import annotations

import array
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import RangeError
from kvmmm.hostarch import addr
from kvmmm.hostarch.ranges import AddrRange

ADDRESSES = st.integers(0, addr.ADDRESS_LIMIT - 1)
ALIGNMENTS = st.integers(0, 40).map(lambda shift: 1 << shift)


def test_constants():
    assert addr.PAGE_BYTES == 4096 == addr.PAGE_MASK + 1
    assert addr.HUGE_PAGE_BYTES == 512 * addr.PAGE_BYTES
    assert addr.GIANT_PAGE_BYTES == 512 * addr.HUGE_PAGE_BYTES
    assert addr.ADDRESS_LIMIT == 2**64


@pytest.mark.parametrize(
    ("at", "down", "up"),
    [
        (0, 0, 0),
        (1, 0, 4096),
        (4095, 0, 4096),
        (4096, 4096, 4096),
        (4097, 4096, 8192),
        (2**64 - 1, 2**64 - 4096, 2**64),
    ],
)
def test_page_rounding(at: int, down: int, up: int):
    assert addr.page_down(at) == down
    assert addr.page_up(at) == up


@given(ADDRESSES, ALIGNMENTS)
def test_align(at: int, align: int):
    down, up = addr.align_down(at, align), addr.align_up(at, align)
    assert down % align == up % align == 0
    assert at - align < down <= at <= up < at + align


@given(ADDRESSES)
def test_pages_are_an_alignment(at: int):
    assert addr.page_down(at) == addr.align_down(at, addr.PAGE_BYTES)
    assert addr.page_up(at) == addr.align_up(at, addr.PAGE_BYTES)


@pytest.mark.parametrize(
    ("at", "rounded"),
    [
        (0, 0), (63, 64), (64, 64), (65, 128), (66, 128), (99, 128), (127, 128), (128, 128),
        (129, 192), (2**32 - 1, 2**32),
    ],
)  # fmt: skip
def test_cache_line_round_up(at: int, rounded: int):
    assert addr.align_up(at, 64) == rounded


@pytest.mark.parametrize("at", [2**64 - 2, 2**64 - 1])
def test_cache_line_round_up_wrap_around(at: int):
    """It does not wrap: it is the limit, which is no address, and which every check looks for."""
    assert addr.align_up(at, 64) == addr.ADDRESS_LIMIT
    with pytest.raises(RangeError):
        AddrRange.of_length(addr.align_up(at, 64), 1)


def test_endian_string():
    """Words that host and guest exchange are the host's own: both are little-endian."""
    assert sys.byteorder == "little"
    assert struct.pack("=I", 1) == struct.pack("<I", 1) == array.array("I", [1]).tobytes()
