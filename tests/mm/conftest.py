"""A memory manager over an arena and a fake address space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.mm import MemoryManager
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HUGE = 2 << 20


class Setup:
    """One of each; `space.on_fault` is the memory manager."""

    def __init__(self, arena_bytes: int, max_addr: int, *, home: bool) -> None:
        self.arena = Arena(arena_bytes)
        self.space = FakeAddressSpace(max_addr)
        reservation = self.arena.reserve(max_addr, align_bytes=HUGE) if home else None
        self.mm = MemoryManager(self.arena, self.space, reservation)
        self.space.on_fault = self.mm.handle_user_fault

    def close(self) -> None:
        """Close; every frame must be free afterwards."""
        self.mm.close()
        facts = self.arena.statistics()
        self.arena.close()
        assert (facts.used_bytes, facts.reserved_bytes) == (0, 0)


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    """Make memory managers, closed at the end."""
    made: list[Setup] = []

    def build(
        arena_bytes: int = 64 << 20, max_addr: int = 256 << 20, *, home: bool = False
    ) -> Setup:
        made.append(Setup(arena_bytes, max_addr, home=home))
        return made[-1]

    yield build
    for one in made:
        one.close()
