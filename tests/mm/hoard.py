"""`Hoard`: whoever holds all that is free in an arena, and gives it back page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from kvmmm.arena import Arena
    from kvmmm.hostarch.ranges import FileRange

PAGE = 4096


class Hoard:
    """All that is free in an arena, and what of it is given back; a context manager gives all."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.held: list[FileRange] = []

    def take_all(self) -> None:
        while largest := self.arena.statistics().largest_free_bytes:
            self.held.append(self.arena.allocate(largest))

    def give(self, n_pages: int) -> None:
        for _ in range(n_pages):
            fr = self.held.pop()
            page = type(fr)(fr.end - PAGE, fr.end)
            if fr.start < page.start:
                self.held.append(type(fr)(fr.start, page.start))
            self.arena.dec_ref(page)

    def give_all(self) -> None:
        while self.held:
            self.arena.dec_ref(self.held.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.give_all()
