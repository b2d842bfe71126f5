"""Worlds to begin with: of each kind, with options from domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.model.backends import FakeBackend
from tests.model.domains import Domain, OneOf
from tests.model.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.backends import Backend

FLAG = OneOf(False, True)
SELDOM = OneOf(False, False, False, True)
COMMON: dict[str, Domain] = {"top_down": FLAG, "eager_pages": OneOf(0, 0, 16)}
OPTIONS: dict[str, dict[str, Domain]] = {
    "fake": {"walks_frames": SELDOM, "map_unit_pages": OneOf(0, 16, 512), "has_home": SELDOM},
    "page tables": {
        "lazy_slots": SELDOM, "map_unit_pages": OneOf(512, 512, 16),
        "max_leaf_pages": OneOf(0, 0, 1, 512),
    },
    "memslots": {"max_memslots": OneOf(0, 12)},
}  # fmt: skip
"""By kind of address space, what its backend is made with; COMMON is the world's."""


def _backend(kind: str) -> Callable[..., Backend]:
    if kind == "fake":
        return FakeBackend
    from tests.model.machines import MemslotBackend, PageTableBackend

    return PageTableBackend if kind == "page tables" else MemslotBackend


def start(kind: str, **options: Any) -> World:
    """Return a world of that kind; `options` are those of OPTIONS and COMMON."""
    common = {name: options.pop(name) for name in COMMON}
    return World(_backend(kind)(**options), **common)
