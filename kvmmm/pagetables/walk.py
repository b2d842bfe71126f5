"""`walk_of`: what finds host addresses by page tables, while others edit them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.safemem.ffi import PageWalk, address_of

if TYPE_CHECKING:
    from kvmmm.pagetables.tables import PageTables


def walk_of(tables: PageTables, gpa: int, length_bytes: int, hva: int) -> PageWalk:
    """Return a walk of `tables` that finds what a CPU in ring 3 would.

    It must be drained after edits, before frames or tables are freed that they took away, and
    closed before `tables` are released.

    Args:
        tables: What is walked: its lower half, but for fixed slots.
        gpa: Frames and tables in [gpa, gpa + length_bytes) are found; others are as if absent.
        length_bytes: See there; whole pages.
        hva: Host address of the same frames.
    """
    c = tables._c  # noqa: SLF001 - of this package
    return PageWalk(address_of(c), gpa, length_bytes, hva, c)
