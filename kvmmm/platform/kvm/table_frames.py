"""`TableFrames`: page tables of a VM's address spaces, in frames of its arena.

Which table may be used again, and when, is for `kvmmm.pagetables` to know: what comes back here can
be handed out at once.
"""

from __future__ import annotations

import threading
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables import TableShares

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.arena import Reservation
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.platform.kvm.guest_physical import GuestPhysical

_PIECE_BYTES = 16 * PAGE_BYTES
"""Frames are taken from the arena by so many at a time; a frame costs nothing until it is used."""
_STOCK_TABLES = 8
"""Kept back, so that something can always be unmapped: two paths of tables, and a root."""
_EMPTY_TABLE = memoryview(array("Q", [0]) * (PAGE_BYTES // 8))


class TableFrames:
    """Hands out pages for tables; a `pagetables.TableAllocator`, for all spaces of one VM.

    Thread-safe.

    Lifetime: `close` before the arena, after the VM.

    Attributes:
        table_hva_delta: Host address minus gpa, of every table.
        shares: What the spaces' tables have in common.
        n_tables: Tables handed out and not given back.
    """

    def __init__(self, physical: GuestPhysical) -> None:
        self._physical = physical
        self._arena = physical.arena
        self._base = physical.gpa_of(physical.arena, 0)
        self.table_hva_delta = (physical.arena.hva - self._base) % (1 << 64)
        self.shares = TableShares()
        self._lock = threading.Lock()
        self.n_tables = 0
        # Entries of every frame that was handed out ever, by gpa.
        self._views: dict[int, memoryview] = {}
        # gpas to hand out: used before, and to be cleared; never used. The last one is next.
        self._free: list[int] = []
        self._fresh: list[int] = []
        # How many are kept back now.
        self._n_kept = _STOCK_TABLES
        # What of the arena is ours, and what of the last reservation is not taken yet.
        self._ranges: list[FileRange] = []
        self._reservations: list[Reservation] = []
        self._next, self._stop = 0, 0
        # A tight arena is not filled by tables that nobody needs.
        self._chunk_bytes = HUGE_PAGE_BYTES
        while self._chunk_bytes > max(_PIECE_BYTES, self._arena.capacity_bytes >> 6):
            self._chunk_bytes >>= 1

    def allocate(self) -> tuple[int, memoryview]:
        """Return a zeroed page: its gpa, and its 512 entries.

        Raises:
            ArenaExhaustedError: There is none left.
        """
        with self._lock:
            if len(self._free) <= _STOCK_TABLES:
                self._fill_stock()
            if self._free:
                gpa = self._free.pop()
                view = self._views[gpa]
                view[:] = _EMPTY_TABLE
            else:
                gpa = self._fresh.pop()
                fo = gpa - self._base
                view = self._arena.view[fo : fo + PAGE_BYTES].cast("Q")
                self._views[gpa] = view
            self.n_tables += 1
            return gpa, view

    @contextmanager
    def urgent(self, *, last: bool = False) -> Iterator[None]:
        """Let the stock be used, `last`: all of it, for a removal, which must not fail."""
        self._n_kept = 0 if last else 1
        try:
            yield
        finally:
            self._n_kept = _STOCK_TABLES

    def entries(self, gpa: int) -> memoryview:
        """Return the entries of the table at `gpa`.

        Raises:
            StateError: None of ours lies there.
        """
        try:
            return self._views[gpa]
        except KeyError:
            raise StateError(f"no page table lies at guest-physical address {gpa:#x}") from None

    def free(self, gpa: int) -> None:
        """Take back a table that no CPU walks, and no KVM remembers."""
        with self._lock:
            self._free.append(gpa)
            self.n_tables -= 1

    def close(self) -> None:
        """Give all frames back to the arena. Idempotent.

        Preconditions:
            - The VM is closed, or nothing of it points to one of the tables.
        """
        with self._lock:
            for view in self._views.values():
                view.release()
            self._views.clear()
            self._free.clear()
            self._fresh.clear()
            while self._ranges:
                self._arena.dec_ref(self._ranges.pop())
            while self._reservations:
                self._arena.unreserve(self._reservations.pop())
            self._next = self._stop = 0

    # ---- called with the lock held ----

    def _fill_stock(self) -> None:
        try:
            while len(self._free) + len(self._fresh) <= _STOCK_TABLES:
                self._grow()
        except ArenaExhaustedError:
            if len(self._free) + len(self._fresh) <= self._n_kept:
                raise

    def _grow(self) -> None:
        """Add a piece of the reservation, or of a new one; a single page where nothing else is."""
        while self._next == self._stop and self._chunk_bytes >= _PIECE_BYTES:
            reservation = self._arena.reserve(self._chunk_bytes, align_bytes=self._chunk_bytes)
            if reservation is None:
                self._chunk_bytes >>= 1
                continue
            self._reservations.append(reservation)
            self._next, self._stop = reservation.start, reservation.end
        if self._next < self._stop:
            fr = self._arena.allocate(
                _PIECE_BYTES, at=self._next, reservation=self._reservations[-1]
            )
            self._next += _PIECE_BYTES
        else:
            fr = self._arena.allocate(PAGE_BYTES)
        self._ranges.append(fr)
        # Walked by a CPU: its slot is there before the table is.
        self._physical.ensure_slots(self._base + fr.start, fr.length_bytes)
        gpas = range(self._base + fr.start, self._base + fr.end, PAGE_BYTES)
        self._fresh[:0] = reversed(gpas)
