"""Where table pages come from: the protocol, and an allocator in plain memory for tests and tools.

Tables must have guest-physical addresses and be reachable for the host at once. Only the platform
knows such memory, so it brings the allocator; nothing here knows an arena.
"""

from __future__ import annotations

from typing import Protocol

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.pagetables.pte import TABLE_BYTES
from kvmmm.pagetables.share import TableShares
from kvmmm.safemem.ffi import address_of, ffi


class TableAllocator(Protocol):
    """Hands out pages for tables.

    Several spaces may have one allocator in common (they must, if one is forked from the other):
    it serialises their calls itself.

    Attributes:
        table_hva_delta: Host address minus guest-physical address, the same for all its tables,
            modulo 2**64: C walks them.
        shares: A `TableShares` of its own, for `PageTables`.
    """

    @property
    def table_hva_delta(self) -> int:
        """See above. Constant."""

    @property
    def shares(self) -> TableShares:
        """See above. Constant."""

    def allocate(self) -> tuple[int, memoryview]:
        """Return a zeroed page: its gpa, and its 512 entries as a writable memoryview "Q".

        Raises:
            ArenaExhaustedError: There is none left.
        """

    def entries(self, gpa: int) -> memoryview:
        """Return the entries of the table at `gpa`.

        Raises:
            StateError: No table of this allocator lies there.
        """

    def free(self, gpa: int) -> None:
        """Take back the table at `gpa`. No CPU walks it any more; what it holds is undefined."""


class MemoryTableAllocator:
    """Tables in one plain buffer.

    Freed pages are filled with junk, so that a walk into one fails where it happens: the junk's
    P bit is set and its address belongs to no table.

    Invariants:
        - A page is either free or handed out, never both.

    Lifetime: the views that it handed out keep the buffer alive, and unresizable.
    """

    __slots__ = ("_capacity_bytes", "_free", "_live", "_views", "shares", "table_hva_delta")

    def __init__(
        self,
        capacity_tables: int = 1024,
        base_gpa: int = 0x1000_0000,
        buffer: bytearray | memoryview | None = None,
    ) -> None:
        """Make an allocator of `capacity_tables` pages.

        Args:
            capacity_tables: How many tables there can be at once.
            base_gpa: Guest-physical address of the first one; page-aligned.
            buffer: Zeroed memory for them, at least `capacity_tables` pages; None for fresh memory.
        """
        self._capacity_bytes = capacity_tables * TABLE_BYTES
        whole = memoryview(bytearray(self._capacity_bytes) if buffer is None else buffer)
        words = whole[: self._capacity_bytes].cast("B").cast("Q")
        self.table_hva_delta = (address_of(ffi.from_buffer(words)) - base_gpa) % (1 << 64)
        self.shares = TableShares()
        step = TABLE_BYTES // 8
        # Every page's entries by gpa. Immutable.
        self._views = {
            base_gpa + i * TABLE_BYTES: words[i * step : (i + 1) * step]
            for i in range(capacity_tables)
        }
        # gpas to hand out; the last one is next, so that addresses ascend.
        self._free = list(reversed(self._views))
        # What is handed out now.
        self._live: dict[int, memoryview] = {}

    @property
    def n_allocated(self) -> int:
        """Tables handed out and not freed."""
        return len(self._live)

    def allocate(self) -> tuple[int, memoryview]:
        """Return a zeroed page; see `TableAllocator.allocate`."""
        if not self._free:
            raise ArenaExhaustedError(TABLE_BYTES, 0, self._capacity_bytes)
        gpa = self._free.pop()
        entries = self._live[gpa] = self._views[gpa]
        if entries[0]:
            # Junk of an earlier life. A page that was never freed is zero as it is.
            entries.cast("B")[:] = bytes(TABLE_BYTES)
        return gpa, entries

    def entries(self, gpa: int) -> memoryview:
        """Return the entries of a table; see `TableAllocator.entries`."""
        try:
            return self._live[gpa]
        except KeyError:
            raise StateError(f"no page table lies at guest-physical address {gpa:#x}") from None

    def free(self, gpa: int) -> None:
        """Take a table back; see `TableAllocator.free`."""
        self.entries(gpa).cast("B")[:] = b"\xdb" * TABLE_BYTES
        del self._live[gpa]
        self._free.append(gpa)
