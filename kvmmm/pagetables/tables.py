"""`PageTables`: the translation of one guest address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from kvmmm.errors import StateError
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.pagetables.pte import (
    LEAF_FLAGS,
    LEVEL_SHIFTS,
    PDE_SPAN_BYTES,
    PDPTE_SPAN_BYTES,
    PTE_ADDRESS_MASK,
    PTE_SPAN_BYTES,
    PTE_W,
    ROOT_LEVEL,
)
from kvmmm.pagetables.ranges import canonical_spans, check_leaf, check_range
from kvmmm.pagetables.scan import MappedRun, Translation, leaves, merge_runs
from kvmmm.pagetables.tree import TableTree
from kvmmm.safemem.ffi import PageMapper, address_of, lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.pagetables.allocator import TableAllocator
    from kvmmm.safemem.ffi import PageWalk

_map, _unmap, _protect = lib.kvmmm_pt_map, lib.kvmmm_pt_unmap, lib.kvmmm_pt_protect
_lookup = lib.kvmmm_pt_lookup
_CHANGED, _INVALID = lib.KVMMM_PT_CHANGED, lib.KVMMM_PT_INVALID


class PageTables(TableTree):
    """The page tables below one root, a PML4.

    The caller serialises all calls; vCPUs may use the tables meanwhile (package comment).

    Invariants:
        - Those of the package comment.
        - A call that raises RangeError or ValueError has changed nothing.

    Lifetime: `release` gives every page back. The allocator must outlive it.

    Attributes:
        root_gpa: Guest-physical address of the PML4: what belongs into CR3. Every edit may change
            it, also one that raises ArenaExhaustedError. CPUs on the old one go on with the old
            translations: whoever must see the edit, or must not go on, has to load the new one.
        n_tables: Tables reachable now, the root and shared ones included; 0 once released.
    """

    __slots__ = ("_fixed",)

    def __init__(
        self,
        allocator: TableAllocator,
        *,
        giant_pages: bool = False,
        max_leaf_bytes: int = PDPTE_SPAN_BYTES,
        fixed: Mapping[int, int] | None = None,
        live: bool = True,
    ) -> None:
        """Allocate an empty root.

        Args:
            allocator: Where tables come from.
            giant_pages: Whether 1 GiB leaves may be used. Only where the CPU has them
                (CPUID.80000001H:EDX.Page1GB): a bit is reserved, and faults, otherwise.
            max_leaf_bytes: No larger leaves than this: 4 KiB, 2 MiB or 1 GiB.
            fixed: PML4 entries, by slot (0 to 511), that stand in every root: a kernel's half,
                say. Whatever they lead to is somebody else's: not walked, changed or freed here.
            live: Whether CPUs may walk the tables while they are edited. If not, everything is
                edited in place and the root stays (but for a fork).

        Raises:
            ArenaExhaustedError: There is no page for the root.
        """
        top_level = _top_level(giant_pages, max_leaf_bytes)
        root_gpa, entries = allocator.allocate()
        self._set_up(allocator, root_gpa, live=live)
        self._c.top_level = top_level
        self._fixed = dict(fixed or {})
        for slot, entry in self._fixed.items():
            entries[slot] = entry
            self._c.fixed[slot >> 6] |= 1 << (slot & 63)

    @classmethod
    def adopt(
        cls,
        allocator: TableAllocator,
        root_gpa: int,
        n_tables: int,
        *,
        giant_pages: bool = False,
        max_leaf_bytes: int = PDPTE_SPAN_BYTES,
        live: bool = True,
    ) -> Self:
        """Take over tables that stand in the allocator's pages already: a copy of others, say.

        Args:
            allocator: Whose pages they are; it counts them as allocated.
            root_gpa: Where the root is.
            n_tables: How many there are, the root included.
            giant_pages: As for the constructor; for later calls of `map`.
            max_leaf_bytes: As for the constructor; for later calls of `map`.
            live: As for the constructor.
        """
        adopted = cls.__new__(cls)
        adopted._set_up(allocator, root_gpa, live=live)  # noqa: SLF001 - our own
        adopted._c.top_level = _top_level(giant_pages, max_leaf_bytes)  # noqa: SLF001
        adopted._c.used = True  # noqa: SLF001
        adopted._fixed = {}  # noqa: SLF001
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
            RangeError: Unaligned, empty, not canonical, in a fixed slot, or `gpa` out of bounds.
            ArenaExhaustedError: No page for a table. A lower part of the range may be mapped by
                now, and what was there before may be gone: treat all of it as changed.
        """
        # One call of C in the usual case. All else stands behind it: this runs cold, after an exit.
        try:
            done = _map(self._c, gva, length_bytes, gpa, flags)
        except OverflowError:
            done = _INVALID
        if done > _CHANGED:
            self._complain_if(done, gva, length_bytes, gpa, flags)
            return self._finish(done)
        return done == _CHANGED

    def mapper(
        self, bases: dict[Any, int], flags: tuple[int, ...], gpa: int, length_bytes: int, hva: int,
        walk: PageWalk,
    ) -> PageMapper:  # fmt: skip
        """Return what edits leaves in tables that are there: one call of C, for faults.

        Args:
            bases: Where files lie: gpa of offset 0, by file. Read at each call.
            flags: Entry flags, by access bits.
            gpa: What it replaces must lie in [gpa, gpa + length_bytes), and is shot down there.
            length_bytes: See there; 0 to replace nothing.
            hva: Host address of the same frames.
            walk: Drained before what is replaced is let go.
        """
        return PageMapper(address_of(self._c), bases, flags, gpa, length_bytes, hva, walk)

    def unmap(self, gva: int, length_bytes: int) -> bool:
        """Remove every translation in [gva, gva + length_bytes).

        Tables that become empty, or are left to others, are unlinked at once and wait for
        `recycle`. Tables are needed only where a superpage or a shared table is cut: never for
        whole units of 512 GiB, so a caller who may remove more can always get his way.

        Args:
            gva: Guest-virtual, page-aligned.
            length_bytes: A multiple of 4 KiB, not 0.

        Returns:
            Whether anything was mapped there. Then the caller must shoot it down before the frames
            are used for something else, and before he calls `recycle`.

        Raises:
            RangeError: Unaligned, empty, not canonical, or in a fixed slot.
            ArenaExhaustedError: No page for a table. A lower part of the range may be gone; treat
                all of it as changed.
        """
        try:
            done = _unmap(self._c, gva, length_bytes)
        except OverflowError:
            done = _INVALID
        if done > _CHANGED:
            self._complain_if(done, gva, length_bytes)
            return self._finish(done)
        return done == _CHANGED

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
            RangeError: Unaligned, empty, not canonical, or in a fixed slot.
            ArenaExhaustedError: As in `unmap`.
        """
        try:
            done = _protect(self._c, gva, length_bytes, flags)
        except OverflowError:
            done = _INVALID
        if done > _CHANGED:
            self._complain_if(done, gva, length_bytes, 0, flags)
            return self._finish(done)
        return done == _CHANGED

    def lookup(self, gva: int) -> Translation | None:
        """Return what `gva`, guest-virtual, any byte, translates to; None where nothing is mapped.

        An address in the hole, or in a fixed slot, is never mapped: None.
        """
        try:
            found = _lookup(self._c, gva)
        except OverflowError:
            return None
        if not found:
            self._check_alive()
            return None
        # The level stands where the entry has bits that the CPU ignores.
        shift = LEVEL_SHIFTS[found >> 9 & 7]
        return Translation(
            gva & -1 << shift, found & PTE_ADDRESS_MASK, 1 << shift, found & LEAF_FLAGS
        )

    def mappings(
        self, start: int = 0, end: int = ADDRESS_LIMIT, *, include_fixed: bool = False
    ) -> Iterator[MappedRun]:
        """Yield what is mapped in [start, end), ascending, as runs that are as long as can be.

        Leaves at the ends are yielded whole, even if only a part lies inside. The tables must not
        be changed between two steps.

        Args:
            start: Guest-virtual.
            end: Guest-virtual, at most 2**64; the hole may lie in between.
            include_fixed: Also what lies in fixed slots, whose tables must then be the allocator's.
        """
        self._check_alive()
        root = self._allocator.entries(self.root_gpa)
        for low, high in canonical_spans(() if include_fixed else self._fixed):
            first, last = max(start, low), min(end, high)
            if first < last:
                yield from merge_runs(leaves(self._allocator, root, first, last))

    def is_empty(self, gva: int = 0, length_bytes: int = ADDRESS_LIMIT) -> bool:
        """Return whether nothing is mapped in [gva, gva + length_bytes), or anywhere."""
        return next(self.mappings(gva, gva + length_bytes), None) is None

    def fork_into(self, child: PageTables) -> int:
        """Let `child` map what is mapped here, and take W from both; tables are shared, not copied.

        Costs the same for any space. Both get a new root, but a child's that was never used stays.
        Until CPUs have loaded this one's new root, they can write as before.

        Args:
            child: Nothing is mapped by it. Same allocator, same fixed slots.

        Returns:
            How many links are shared now. With 0 nothing was mapped, and nothing is done.

        Raises:
            ValueError: The child is not empty, or not of this kind.
            ArenaExhaustedError: No pages for the roots; nothing is done.
        """
        self._check_alive()
        child._check_alive()
        if child._allocator is not self._allocator or child._fixed.keys() != self._fixed.keys():
            raise ValueError("a fork needs the same allocator and the same fixed slots")
        if child.n_tables != 1 or child is self:
            raise ValueError("a fork goes into page tables that map nothing")
        links = self._root_links()
        if not links:
            return 0
        root_gpa, root = self._allocator.allocate()
        if child._c.used:
            try:
                child._replace_root(*self._allocator.allocate())
            except BaseException:
                self._allocator.free(root_gpa)
                raise
        with self._shares.lock:
            for _, entry in links:
                self._shares.add_locked(entry & PTE_ADDRESS_MASK)
        for entries in (root, self._allocator.entries(child.root_gpa)):
            for slot, entry in links:
                entries[slot] = entry & ~PTE_W
        self._replace_root(root_gpa, root)
        child._c.used = True
        child.n_tables = self.n_tables
        return len(links)

    def _root_links(self) -> list[tuple[int, int]]:
        entries = self._allocator.entries(self.root_gpa).tolist()
        return [(i, e) for i, e in enumerate(entries) if e and i not in self._fixed]

    def _replace_root(self, gpa: int, entries: memoryview) -> None:
        for slot, entry in self._fixed.items():
            entries[slot] = entry
        self._replaced.append(self.root_gpa)
        self.root_gpa = self._c.root_gpa = gpa
        # Tables that were parked below ones that are shared now must not come back.
        self._unpark()

    @property
    def n_quarantined(self) -> int:
        """Pages that can be tables again only after a zap: what `recycle` would free."""
        return (
            len(self._stale) + len(self._parked) + len(self._replaced) + len(self._shares.orphans)
        )

    def recycle(self, *, zapped: bool) -> None:
        """Say that no CPU uses what earlier calls removed, and free what can be freed.

        Preconditions:
            - Since the last edit every CPU of this space has loaded `root_gpa`, and dropped what
              it cached of removed or changed translations.
            - With `zapped`: KVM has been made to drop all shadow pages since, or keeps none. From
              before that until this returns, no other space on the allocator called `recycle` or
              `release`.

        Args:
            zapped: See there. Without it nothing is freed: pages go on waiting (package comment).
        """
        self._settle()
        if zapped:
            self._unpark()
            self._settle()
            self._free_stale()

    def release(self, *, zapped: bool = False) -> None:
        """Give all pages back; nothing else may be called afterwards. Twice is allowed.

        Preconditions:
            - No CPU has `root_gpa`, or an earlier one of this space, in its CR3.

        Args:
            zapped: As for `recycle`, after the last CPU left. Otherwise the pages wait in the
                allocator's `shares` for the next `recycle` or `release`, of any space, that has it.
        """
        if not self.n_tables:
            return
        self._unpark()
        for _, entry in self._root_links():
            self._left.append((entry & PTE_ADDRESS_MASK, ROOT_LEVEL - 1))
        self._replaced.append(self.root_gpa)
        self._settle()
        self.n_tables = 0
        self._c.is_released = True
        if zapped:
            self._free_stale()
        else:
            with self._shares.lock:
                self._shares.orphans += self._stale
            self._stale.clear()

    def _check_alive(self) -> None:
        if not self.n_tables:
            raise StateError("these page tables were released")

    def _complain_if(
        self, done: int, gva: int, length_bytes: int, gpa: int = 0, flags: int = 0
    ) -> None:
        # What is wrong with arguments that C refused.
        if done == _INVALID:
            check_range(gva, length_bytes, self._fixed)
            self._check_alive()
            check_leaf(gpa, length_bytes, flags)


def _top_level(giant_pages: bool, max_leaf_bytes: int) -> int:
    # Of the largest leaves that may be made.
    if max_leaf_bytes not in {PTE_SPAN_BYTES, PDE_SPAN_BYTES, PDPTE_SPAN_BYTES}:
        raise ValueError(f"a leaf has 4 KiB, 2 MiB or 1 GiB, not {max_leaf_bytes} bytes")
    if not giant_pages:
        max_leaf_bytes = min(max_leaf_bytes, PDE_SPAN_BYTES)
    return LEVEL_SHIFTS.index(max_leaf_bytes.bit_length() - 1)
