"""Sizes and durations as people write them: `64M`, `1.5GiB`, `10s`, `250ms`."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m|h)?\s*")
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes; suffixes are powers of two.

    Raises:
        ValueError: Not a size, or not above zero.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise ValueError(f"{size!r} is no size: write a number and K, M, G or T, such as 64M")
        size = int(float(match[1]) * (1 << _SHIFT[match[2].upper()]))
    if size <= 0:
        raise ValueError(f"a size must be above zero, not {size}")
    return size


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
        duration_ns = int(float(match[1]) * _NS[match[2] or "s"])
    else:
        duration_ns = int(duration * 10**9)
    if duration_ns <= 0:
        raise ValueError(f"a duration must be above zero, not {duration}")
    return duration_ns


def format_bytes(n_bytes: int) -> str:
    """Return a size with the largest unit that keeps at most one decimal: `64 MiB`, `1.5 KiB`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " TiB"
