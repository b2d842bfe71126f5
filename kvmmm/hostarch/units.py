"""Sizes and durations as people write them: `64M`, `1.5GiB`, `10s`, `250ms`."""

from __future__ import annotations

import re
from functools import lru_cache

_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m|h)?\s*")
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}

_LONGEST_S = 30 * 365 * 86400


@lru_cache(maxsize=64)
def parse_bytes(size: int | str) -> int:
    """Return a size in bytes; suffixes are powers of two.

    Raises:
        ValueError: Not a size, or not above zero.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(f"{size!r} is no size: write a number and K, M, G or T, such as 64M")
        whole, _, fraction = match[1].partition(".")
        scaled: int = int(whole + fraction) << _SHIFT[match[2].upper()]  # exact, unlike a float
        n_bytes = scaled // int(10 ** len(fraction))
    else:
        n_bytes = int(size)
    if not 0 < n_bytes < 1 << 64:
        raise ValueError(f"a size lies above zero and below 16 EiB: not {str(size)[:40]}")
    return n_bytes


def parse_duration_ns(duration: float | str) -> int:
    """Return a duration in nanoseconds; a bare number means seconds.

    Raises:
        ValueError: Not a duration, or not above zero.
    """
    if isinstance(duration, str):
        match = _DURATION.fullmatch(duration)
        if match is None:
            raise ValueError(
                f"{duration!r} is no duration: write a number and ns, us, ms, s, m or h: 10s"
            )
        seconds = float(match[1]) * _NS[match[2] or "s"] / 10**9
    else:
        seconds = float(duration)
    if not 0 < seconds < _LONGEST_S or seconds < 1e-9:
        raise ValueError(f"a duration lies above zero and below 30 years: not {str(duration)[:40]}")
    return round(seconds * 10**9)


def format_bytes(n_bytes: int) -> str:
    """Return a size with the largest unit that keeps at most one decimal: `64 MiB`, `1.5 KiB`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.95:  # what rounds to 1024 belongs to the next unit
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " TiB"
