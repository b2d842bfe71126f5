"""Sizes, durations, addresses as people type them."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.cli.parameter import ADDRESS, DURATION, SIZE


@pytest.mark.parametrize(
    ("text", "address"),
    [("0x200000", 0x200000), ("2M", 0x200000), ("4096", 4096), (" 0X10 ", 16), ("0", 0),
     ("1_000", None),
     ("0x_", None), ("-1", None), ("0x10000000000000000", None), ("", None), ("1e5", None)],
)  # fmt: skip
def test_addresses(text: str, address: int | None):
    if address is None:
        with pytest.raises(click.BadParameter, match="write it as 0x200000 or 2M"):
            ADDRESS.convert(text, None, None)
    else:
        assert ADDRESS.convert(text, None, None) == address


@given(st.integers(0, 2**64 - 1))
def test_every_address_can_be_typed(address: int):
    assert ADDRESS.convert(hex(address), None, None) == address
    assert ADDRESS.convert(str(address), None, None) == address


def test_sizes_and_durations():
    assert SIZE.convert("64M", None, None) == 64 << 20
    assert DURATION.convert("250ms", None, None) == 250_000_000
    assert DURATION.convert("10", None, None) == 10 * 10**9
