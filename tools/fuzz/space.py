"""An address space without a CPU: real page tables in plain memory, or none at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import access_of, flags_of
from kvmmm.pagetables.walk import walk_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.arena import Arena
    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.safemem.ffi import PageWalk

_WINDOW_BYTES = 1 << 40
_N_TABLES = 512


class Windows:
    """Where files lie in guest-physical memory, and the tables, in the arena: one for a family."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._tables = arena.allocate(_N_TABLES * PAGE_BYTES)
        self.allocator = MemoryTableAllocator(
            _N_TABLES, _WINDOW_BYTES + self._tables.start,
            arena.view[self._tables.start : self._tables.end],
        )  # fmt: skip
        self._bases: dict[Any, int] = {arena: _WINDOW_BYTES}

    def base_of(self, file: File) -> int:
        """Return the guest-physical address of a file's offset 0."""
        return self._bases.setdefault(file, _WINDOW_BYTES * (len(self._bases) + 1))

    def walk_of(self, tables: PageTables) -> PageWalk:
        """Return what finds the arena's frames by `tables`."""
        arena = self.arena
        return walk_of(tables, _WINDOW_BYTES, arena.capacity_bytes, arena.hva)

    def close(self) -> None:
        """Give back what the tables were in; all of them were released."""
        for view in self.allocator._views.values():  # noqa: SLF001 - who else would
            view.release()
        self.arena.dec_ref(self._tables)


class BareSpace:
    """Forgets at once what it is told to map: a cache may."""

    min_window_bytes = 2 << 20
    map_unit_bytes = 0
    walks_frames = False
    map_quickly = None
    walk: Any = None

    def __init__(self, max_addr: int) -> None:
        self.max_addr = max_addr

    def new(self) -> BareSpace:
        """Return another one, for a child."""
        return BareSpace(self.max_addr)

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """See `AddressSpace`."""

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """See `AddressSpace`."""

    def is_mapped(self, addr: int, access: int) -> bool:
        """See `AddressSpace`."""
        return bool(addr < 0 and access)

    def fork_into(self, child: Any) -> bool:  # noqa: ANN401
        """See `AddressSpace`."""
        return child is self

    def release(self) -> None:
        """See `AddressSpace`."""


class TableSpace(BareSpace):
    """Page tables as a guest's, that nobody but a walk in software ever uses."""

    def __init__(self, max_addr: int, windows: Windows) -> None:
        super().__init__(max_addr)
        self._windows = windows
        self._tables = PageTables(windows.allocator, giant_pages=True)
        self.walk = windows.walk_of(self._tables)

    def new(self) -> TableSpace:
        """Return another one, for a child."""
        return TableSpace(self.max_addr, self._windows)

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """See `AddressSpace`."""
        gpa = self._windows.base_of(file) + fr.start
        self._tables.map(addr, fr.length_bytes, gpa, flags_of(perms, user=True))
        self._recycle()

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """See `AddressSpace`. A space that was released has nothing to unmap."""
        for ar in ranges if self._tables.n_tables else ():
            if ar:
                self._unmap(ar.start, ar.end - ar.start)
        self._recycle()

    def _unmap(self, start: int, length_bytes: int) -> None:
        try:
            self._tables.unmap(start, length_bytes)
        except ArenaExhaustedError:
            # No page to cut a superpage or a shared table: then all of it goes.
            self._tables.unmap(0, 1 << 47)

    def is_mapped(self, addr: int, access: int) -> bool:
        """See `AddressSpace`."""
        found = self._tables.lookup(addr) if addr < self.max_addr else None
        return found is not None and not access & ~access_of(found.flags)

    def fork_into(self, child: Any) -> bool:  # noqa: ANN401
        """See `AddressSpace`."""
        self._tables.fork_into(child._tables)  # noqa: SLF001 - our own kind
        self._recycle()
        return True

    def _recycle(self) -> None:
        self.walk.drain()
        if self._tables.n_tables:
            self._tables.recycle(zapped=True)

    def release(self) -> None:
        """See `AddressSpace`."""
        self.walk.close()
        self._tables.release()
