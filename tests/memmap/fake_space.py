"""A space that only remembers what it was told to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange


class FakeSpace:
    def __init__(self) -> None:
        self.invalidated: list[tuple[int, int]] = []
        self.private: list[bool] = []

    def invalidate(self, ar: AddrRange, *, private: bool) -> None:
        self.invalidated.append((ar.start, ar.end))
        self.private.append(private)
