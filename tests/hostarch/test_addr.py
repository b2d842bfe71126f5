from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.hostarch import addr

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
