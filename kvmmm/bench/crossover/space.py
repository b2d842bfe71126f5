"""An address space with page tables that no CPU uses: what `walk` walks, without a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import ANY_ACCESS
from kvmmm.pagetables.allocator import MemoryTableAllocator
from kvmmm.pagetables.pte import TABLE_BYTES, flags_of
from kvmmm.pagetables.tables import PageTables
from kvmmm.pagetables.walk import walk_of
from kvmmm.safemem.ffi import ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.arena import Arena
    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.platform.base import AddressSpace

_N_TABLES = 256
_FLAGS = tuple(flags_of(access, user=True) for access in range(ANY_ACCESS + 1))


class TableSpace:
    """An AddressSpace whose tables lie in the arena, where gpas are file offsets.

    Args:
        arena: Whose frames are mapped; of other files nothing is.
        max_addr: See `kvmmm.platform.base.AddressSpace`; the rest as well.

    Attributes:
        frames: Where the tables are.
    """

    map_unit_bytes = 0
    walks_frames = False
    map_quickly = None
    min_window_bytes = 2 << 20

    def __init__(self, arena: Arena, max_addr: int) -> None:
        self.max_addr = max_addr
        self._arena = arena
        self.frames = arena.allocate(_N_TABLES * TABLE_BYTES)
        # Not a view of the arena, which would have to be released before the arena is closed.
        hva = ffi.cast("char *", arena.hva + self.frames.start)
        tables = memoryview(ffi.buffer(hva, self.frames.length_bytes))
        allocator = MemoryTableAllocator(_N_TABLES, self.frames.start, tables)
        self._tables = PageTables(allocator, live=False)
        self.walk = walk_of(self._tables, 0, arena.capacity_bytes, arena.hva)

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Enter it into the tables."""
        if file is self._arena:
            self._tables.map(addr, fr.length_bytes, fr.start, _FLAGS[perms])

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Take it out of the tables."""
        for ar in ranges:
            self._tables.unmap(ar.start, ar.length_bytes)
        self._tables.recycle(zapped=True)

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a walk finds it."""
        return self.walk.find(addr, 1, access) is not None

    def fork_into(self, _child: AddressSpace) -> bool:
        """Not needed here."""
        return False

    def release(self) -> None:
        """Give the tables back."""
        self.walk.close()
        self._tables.release()
        self._arena.dec_ref(self.frames)
