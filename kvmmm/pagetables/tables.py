"""`PageTables`: the translation of one guest address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kvmmm.errors import RangeError, StateError
from kvmmm.hostarch.addr import ADDRESS_LIMIT, PAGE_MASK
from kvmmm.pagetables.edit import EditWalk, MapWalk, ProtectWalk, UnmapWalk
from kvmmm.pagetables.pte import (
    GPA_LIMIT,
    LEAF_FLAGS,
    LEVEL_SHIFTS,
    PDE_SPAN_BYTES,
    PDPTE_SPAN_BYTES,
    PTE_ADDRESS_MASK,
    PTE_P,
    PTE_PS,
    PTE_SPAN_BYTES,
    ROOT_LEVEL,
)
from kvmmm.pagetables.scan import MappedRun, Translation, leaves, merge_runs, translate
from kvmmm.pagetables.walker import nearest_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.pagetables.allocator import TableAllocator

LOWER_HALF_END = 0x0000_8000_0000_0000
UPPER_HALF_START = 0xFFFF_8000_0000_0000
"""Between these two lies the hole: no canonical addresses. Source: SDM Vol. 1 3.3.7.1."""


class PageTables:
    """The page tables below one root, a PML4.

    The caller serialises all calls; vCPUs may use the tables meanwhile (package comment).

    Invariants:
        - Those of the package comment.
        - A call that raises RangeError or ValueError has changed nothing.

    Lifetime: `release` gives every page back. The allocator must outlive it.

    Attributes:
        root_gpa: Guest-physical address of the PML4: what goes into CR3. Immutable.
        n_tables: Tables reachable now, the root included.
    """

    _root: memoryview | None
    __slots__ = ("_allocator", "_retired", "_root", "_top_leaf_level", "n_tables", "root_gpa")

    def __init__(
        self,
        allocator: TableAllocator,
        *,
        giant_pages: bool = False,
        max_leaf_bytes: int = PDPTE_SPAN_BYTES,
    ) -> None:
        """Allocate an empty root.

        Args:
            allocator: Where tables come from.
            giant_pages: Whether 1 GiB leaves may be used. Only where the CPU has them
                (CPUID.80000001H:EDX.Page1GB): a bit is reserved, and faults, otherwise.
            max_leaf_bytes: No larger leaves than this: 4 KiB, 2 MiB or 1 GiB.

        Raises:
            ArenaExhaustedError: There is no page for the root.
        """
        self._set_up(allocator, giant_pages, max_leaf_bytes)
        self.root_gpa, self._root = allocator.allocate()
        self.n_tables = 1

    def _set_up(self, allocator: TableAllocator, giant_pages: bool, max_leaf_bytes: int) -> None:
        if max_leaf_bytes not in {PTE_SPAN_BYTES, PDE_SPAN_BYTES, PDPTE_SPAN_BYTES}:
            raise ValueError(f"a leaf has 4 KiB, 2 MiB or 1 GiB, not {max_leaf_bytes} bytes")
        self._allocator = allocator
        # Level of the largest leaves that may be made. Immutable.
        self._top_leaf_level = LEVEL_SHIFTS.index(max_leaf_bytes.bit_length() - 1)
        if not giant_pages and max_leaf_bytes == PDPTE_SPAN_BYTES:
            self._top_leaf_level = 2
        # gpas of tables that are unlinked, and may still be walked.
        self._retired: list[int] = []
        self.root_gpa = 0
        # The root's entries; None once released.
        self._root = None
        self.n_tables = 0

    @classmethod
    def adopt(
        cls,
        allocator: TableAllocator,
        root_gpa: int,
        n_tables: int,
        *,
        giant_pages: bool = False,
        max_leaf_bytes: int = PDPTE_SPAN_BYTES,
    ) -> Self:
        """Take over tables that stand in the allocator's pages already: a copy of others, say.

        Args:
            allocator: Whose pages they are; it counts them as allocated.
            root_gpa: Where the root is.
            n_tables: How many there are, the root included.
            giant_pages: As for the constructor; for later calls of `map`.
            max_leaf_bytes: As for the constructor; for later calls of `map`.
        """
        adopted = cls.__new__(cls)
        adopted._set_up(allocator, giant_pages, max_leaf_bytes)  # noqa: SLF001 - our own
        adopted.root_gpa = root_gpa
        adopted._root = allocator.entries(root_gpa)  # noqa: SLF001
        adopted.n_tables = n_tables
        return adopted

    def map(self, gva: int, length_bytes: int, gpa: int, flags: int) -> bool:
        """Map [gva, gva + length_bytes) to [gpa, gpa + length_bytes), whatever was there before.

        Leaves are as large as the alignment of both addresses allows, except where smaller ones lie
        already: those are replaced one by one. Remapping a part of a superpage splits it.

        Preconditions:
            - The frames exist for the CPU (their memslot is there), since the vCPU may use them
              before this returns.

        Args:
            gva: Guest-virtual, page-aligned.
            length_bytes: A multiple of 4 KiB, not 0.
            gpa: Guest-physical, page-aligned, at most 2**52 with the length.
            flags: As `pte.flags_of` makes them; without P, this is `unmap`.

        Returns:
            Whether a page that was present has another frame or other flags now: then a CPU may go
            on using the old translation until the caller has shot it down.

        Raises:
            RangeError: Unaligned, empty, not canonical, or `gpa` out of bounds.
            ArenaExhaustedError: No page for a table. A lower part of the range may be mapped by
                now, and what was there before may be gone: treat all of it as changed.
        """
        if not flags & PTE_P:
            return self.unmap(gva, length_bytes)
        root = self._check(gva, length_bytes)
        if gpa & PAGE_MASK or not 0 <= gpa <= GPA_LIMIT - length_bytes:
            raise RangeError(gpa, gpa + length_bytes, "no page-aligned guest-physical range")
        if flags & ~LEAF_FLAGS:
            raise ValueError(f"flags {flags:#x} hold bits that are no flags of a leaf")
        # A leaf of some size fits where both addresses agree modulo that size: one answer for all.
        delta = gpa - gva
        level = self._top_leaf_level
        while delta & ((1 << LEVEL_SHIFTS[level]) - 1):
            level -= 1
        return self._edit(
            MapWalk(self._allocator, level, delta, flags), root, gva, gva + length_bytes
        )

    def unmap(self, gva: int, length_bytes: int) -> bool:
        """Remove every translation in [gva, gva + length_bytes).

        Tables that become empty are unlinked at once and wait for `recycle`.

        Args:
            gva: Guest-virtual, page-aligned.
            length_bytes: A multiple of 4 KiB, not 0.

        Returns:
            Whether anything was mapped there. Then the caller must shoot it down before the frames
            are used for something else, and before he calls `recycle`.

        Raises:
            RangeError: Unaligned, empty or not canonical.
            ArenaExhaustedError: No page to split a superpage. A lower part of the range may be
                gone; treat all of it as changed.
        """
        root = self._check(gva, length_bytes)
        walk = UnmapWalk(self._allocator)
        try:
            # From the root: a table that becomes empty is unlinked on the way back up.
            walk.walk(root, ROOT_LEVEL, gva, gva + length_bytes)
        finally:
            self.n_tables += walk.n_new_tables - len(walk.retired)
            self._retired += walk.retired
        return walk.changed

    def protect(self, gva: int, length_bytes: int, flags: int) -> bool:
        """Give what is mapped in [gva, gva + length_bytes) other flags; absent pages stay absent.

        Args:
            gva: Guest-virtual, page-aligned.
            length_bytes: A multiple of 4 KiB, not 0.
            flags: As `pte.flags_of` makes them; without P, this is `unmap`.

        Returns:
            Whether the flags of a present page changed. If any permission was taken away, the
            caller must shoot the old translation down; where some were only added, a CPU that knows
            the old ones faults and looks again.

        Raises:
            RangeError: Unaligned, empty or not canonical.
            ArenaExhaustedError: As in `unmap`.
        """
        if not flags & PTE_P:
            return self.unmap(gva, length_bytes)
        root = self._check(gva, length_bytes)
        if flags & ~LEAF_FLAGS:
            raise ValueError(f"flags {flags:#x} hold bits that are no flags of a leaf")
        return self._edit(ProtectWalk(self._allocator, flags), root, gva, gva + length_bytes)

    def recycle(self) -> None:
        """Give retired tables back to the allocator.

        Preconditions:
            - Since the last `unmap`, every CPU has dropped what it cached of these tables.
        """
        while self._retired:
            self._allocator.free(self._retired.pop())

    def lookup(self, gva: int) -> Translation | None:
        """Return what `gva`, guest-virtual, any byte, translates to; None where nothing is mapped.

        An address in the hole is never mapped: None.
        """
        if not (0 <= gva < LOWER_HALF_END or UPPER_HALF_START <= gva < ADDRESS_LIMIT):
            return None
        return translate(self._allocator, self._live_root(), gva)

    def mappings(self, start: int = 0, end: int = ADDRESS_LIMIT) -> Iterator[MappedRun]:
        """Yield what is mapped in [start, end), ascending, as runs that are as long as can be.

        Leaves at the ends are yielded whole, even if only a part lies inside. The tables must not
        be changed between two steps.

        Args:
            start: Guest-virtual.
            end: Guest-virtual, at most 2**64; the hole may lie in between.
        """
        root = self._live_root()
        for low, high in ((0, LOWER_HALF_END), (UPPER_HALF_START, ADDRESS_LIMIT)):
            first, last = max(start, low), min(end, high)
            if first < last:
                yield from merge_runs(leaves(self._allocator, root, first, last))

    def is_empty(self, gva: int = 0, length_bytes: int = ADDRESS_LIMIT) -> bool:
        """Return whether nothing is mapped in [gva, gva + length_bytes), or anywhere."""
        return next(self.mappings(gva, gva + length_bytes), None) is None

    def release(self) -> None:
        """Give all pages back; nothing else may be called afterwards. Twice is allowed.

        Preconditions:
            - No CPU has `root_gpa` in its CR3.
        """
        if self._root is None:
            return
        self.recycle()
        self._release_below(self._root, ROOT_LEVEL)
        self._root = None
        self.n_tables = 0
        self._allocator.free(self.root_gpa)

    def _release_below(self, entries: memoryview, level: int) -> None:
        for entry in entries.tolist():
            if entry & (PTE_P | PTE_PS) == PTE_P:
                gpa = entry & PTE_ADDRESS_MASK
                if level > 2:
                    self._release_below(self._allocator.entries(gpa), level - 1)
                self._allocator.free(gpa)

    def _edit(self, walk: EditWalk, root: memoryview, gva: int, end: int) -> bool:
        try:
            entries, level = nearest_table(self._allocator, root, gva, end)
            walk.walk(entries, level, gva, end)
        finally:
            self.n_tables += walk.n_new_tables
        return walk.changed

    def _live_root(self) -> memoryview:
        if self._root is None:
            raise StateError("these page tables were released")
        return self._root

    def _check(self, gva: int, length_bytes: int) -> memoryview:
        # Everything about the range that can be wrong, before anything is changed.
        end = gva + length_bytes
        if (
            (gva | length_bytes) & PAGE_MASK
            or length_bytes <= 0
            or not (
                (gva >= 0 and end <= LOWER_HALF_END)
                or (gva >= UPPER_HALF_START and end <= ADDRESS_LIMIT)
            )
        ):
            raise _range_error(gva, length_bytes)
        return self._live_root() if self._root is None else self._root


def _range_error(gva: int, length_bytes: int) -> RangeError:
    end = gva + length_bytes
    if (gva | length_bytes) & PAGE_MASK:
        return RangeError(gva, end, "page tables map whole 4 KiB pages: align both ends")
    if length_bytes <= 0:
        return RangeError(gva, end, "the range is empty")
    return RangeError(
        gva,
        end,
        f"not canonical: stay in [0x0, {LOWER_HALF_END:#x}) "
        f"or in [{UPPER_HALF_START:#x}, {ADDRESS_LIMIT:#x})",
    )
