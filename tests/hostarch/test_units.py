from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.hostarch.units import format_bytes, parse_bytes, parse_duration_ns

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [
        (8192, 8192),
        ("4096", 4096),
        ("1B", 1),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("64 MiB", 64 << 20),
        (" 1.5GiB ", 3 << 29),
        ("2K", 2048),
        ("1T", 1 << 40),
        ("0.5K", 512),
    ],
)
def test_parse_bytes(size: int | str, n_bytes: int):
    assert parse_bytes(size) == n_bytes


@pytest.mark.parametrize("size", ["", "M", "64X", "-1", "1e3", "1.M", "64 M B", "0x10", "1,5M"])
def test_no_size(size: str):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [0, -4096, "0K", "0M", "0.1"])
def test_size_not_above_zero(size: int | str):
    with pytest.raises(ValueError, match="above zero"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("duration", "ns"),
    [
        ("10s", 10 * 10**9),
        ("250ms", 250 * 10**6),
        ("5us", 5000),
        ("7ns", 7),
        ("1.5 m", 90 * 10**9),
        ("1h", 3600 * 10**9),
        ("2", 2 * 10**9),
        (3, 3 * 10**9),
        (0.25, 250 * 10**6),
    ],
)
def test_parse_duration(duration: float | str, ns: int):
    assert parse_duration_ns(duration) == ns


@pytest.mark.parametrize("duration", ["", "s", "10S", "1 day", "-1s", "1e3s"])
def test_no_duration(duration: str):
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration_ns(duration)


@pytest.mark.parametrize("duration", [0, -1, "0s", "0.1ns", 1e-10])
def test_duration_not_above_zero(duration: float | str):
    with pytest.raises(ValueError, match="above zero"):
        parse_duration_ns(duration)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5 TiB"),
        (5000 << 40, "5000 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_format_bytes(n_bytes: int, text: str):
    assert format_bytes(n_bytes) == text


@given(st.integers(1, 1 << 50))
def test_format_is_what_parse_reads(n_bytes: int):
    back = parse_bytes(format_bytes(n_bytes))
    assert abs(back - n_bytes) <= n_bytes * 0.05


@pytest.mark.parametrize("parse", [parse_bytes, parse_duration_ns])
def test_absurd_numbers_are_refused_like_any_other(parse: Callable[[str], int]):
    with pytest.raises(ValueError, match=r"is no|lies above zero"):
        parse("9" * 400)


def test_infinity_is_no_duration():
    with pytest.raises(ValueError, match="lies above zero"):
        parse_duration_ns(float("inf"))


def test_sizes_are_exact_and_round_up_to_the_next_unit():
    assert parse_bytes("9007199254740993") == 9007199254740993
    assert format_bytes(1048575) == "1 MiB"
