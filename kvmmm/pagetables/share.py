"""Tables that several page tables link: who counts them, and where they go in the end.

All spaces of a VM take tables from one allocator, and what is common to them is kept there: how
many links lead to a table, and tables whose space is gone while KVM may still remember them.

A table that is shared is never written. Whoever wants to change something below it makes a copy of
his own; the last one does so as well, since at first he cannot know that he is the last.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvmmm.pagetables.pte import PTE_ADDRESS_MASK, PTE_P, PTE_PS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LINK_BITS = PTE_P | PTE_PS


def links(entries: Sequence[int], level: int) -> Iterator[int]:
    """Yield the gpas of the tables that a table's entries link to."""
    if level > 1:
        for entry in entries:
            if entry & _LINK_BITS == PTE_P:
                yield entry & PTE_ADDRESS_MASK


class TableShares:
    """What the spaces on one allocator have in common.

    Attributes:
        lock: Held for every change of the two others. Nothing else is taken under it.
        counts: By gpa, how many links lead to a table; only those with more than one.
        orphans: gpas of released spaces' tables that wait until KVM was made to forget them.
    """

    __slots__ = ("counts", "lock", "orphans")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[int, int] = {}
        self.orphans: list[int] = []

    def add_locked(self, gpa: int) -> None:
        """Count one more link to a table that has at least one."""
        self.counts[gpa] = self.counts.get(gpa, 1) + 1

    def drop_locked(self, gpa: int) -> bool:
        """Count one link less; return whether it was the last."""
        n_links = self.counts.pop(gpa, 1) - 1
        if n_links > 1:
            self.counts[gpa] = n_links
        return not n_links
