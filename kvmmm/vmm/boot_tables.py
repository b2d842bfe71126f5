"""The boot page tables: what the vmas make of them, at first and whenever the vmas have changed.

    vmas ──► TableImage, in memory of ours ──► what differs ──► the system area, where CPUs walk

A guest kernel may write to its tables, so they are never read back: an image says what they should
hold. And only what differs is written, so that what the guest has put there itself stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import StateError
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.pagetables import PageTables, TableShares
from kvmmm.safemem.ffi import address_of, ffi

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmmm.mm import MemoryManager
    from kvmmm.platform.kvm.vm import Vm
    from kvmmm.vmm.system_area import SystemArea

    Part = tuple[int, int, int]  # [start, end), mapped one to one, and the flags of its leaves

_WORDS = PAGE_BYTES // 8
_EMPTY_TABLE = memoryview(bytes(PAGE_BYTES)).cast("Q")


class TableImage:
    """Page tables that map addresses to themselves, as bytes. Immutable.

    Attributes:
        first_gpa: Guest-physical address of the first table, the root.
        end_gpa: Where the room for tables ends.
        content: The tables, one after the other.
        free: gpas of those among them that are in use no more.
    """

    __slots__ = ("content", "end_gpa", "first_gpa", "free", "giant_pages")

    def __init__(
        self, first_gpa: int, end_gpa: int, *, giant_pages: bool, content: bytes = b"",
        free: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.first_gpa = first_gpa
        self.end_gpa = end_gpa
        self.giant_pages = giant_pages
        self.content = content
        self.free = free

    @property
    def n_tables(self) -> int:
        """Tables in use."""
        return len(self.content) // PAGE_BYTES - len(self.free)

    def mapping(self, parts: Sequence[Part]) -> TableImage:
        """Return tables that map `parts`.

        They differ from this image in as little as can be: a table that is still needed stays where
        it is, since tables of the guest's own may lead to it. What lies between the parts stays as
        it is, too: without a slot nobody gets there, and an EPT violation tells more than a #PF.
        Only when there is no room for that, tables are laid out anew, for these parts alone.

        Args:
            parts: Disjoint.

        Raises:
            StateError: There is no room at all.
        """
        if self.content:
            try:
                return self._edited(parts)
            except StateError:
                pass
        new = TableImage(self.first_gpa, self.end_gpa, giant_pages=self.giant_pages)
        return new._edited(parts)

    def _edited(self, parts: Sequence[Part]) -> TableImage:
        buffer = bytearray(self.end_gpa - self.first_gpa)
        buffer[: len(self.content)] = self.content
        room = TableRoom(self, memoryview(buffer), address_of(ffi.from_buffer(buffer)))
        if self.content:
            tables = room.adopt(self)
        else:
            tables = PageTables(room, giant_pages=self.giant_pages, live=False)
        for start, end, flags in parts:
            tables.map(start, end - start, start, flags)
        tables.recycle(zapped=True)  # nobody walks them here
        return TableImage(
            self.first_gpa, self.end_gpa, giant_pages=self.giant_pages,
            content=bytes(buffer[: room.used_bytes]), free=tuple(room.free_gpas),
        )  # fmt: skip

    def changes_to(self, new: TableImage) -> Iterator[tuple[int, bytes]]:
        """Yield what differs in `new`, as (offset, bytes): single entries, or a whole new table."""
        was_free = {gpa - self.first_gpa for gpa in self.free}
        is_free = {gpa - self.first_gpa for gpa in new.free}
        for offset in range(0, len(new.content), PAGE_BYTES):
            after = new.content[offset : offset + PAGE_BYTES]
            if offset in is_free:
                continue  # whatever it holds
            if offset in was_free or offset >= len(self.content):
                yield offset, after
                continue
            before = self.content[offset : offset + PAGE_BYTES]
            if before != after:
                for at in range(0, PAGE_BYTES, 8):
                    if before[at : at + 8] != after[at : at + 8]:
                        yield offset + at, after[at : at + 8]


class TableRoom:
    """Memory for tables, where an image's lie already: a pagetables.TableAllocator.

    Args:
        image: What lies there.
        view: The memory; format "B".
        hva: Its host address.

    Attributes:
        table_hva_delta: See pagetables.TableAllocator.
        shares: Likewise.
        free_gpas: Tables in it that are in use no more.
    """

    __slots__ = (
        "_end_gpa", "_first_gpa", "_next_gpa", "_words", "free_gpas", "shares", "table_hva_delta",
    )  # fmt: skip

    def __init__(self, image: TableImage, view: memoryview, hva: int) -> None:
        self._first_gpa = image.first_gpa
        self._end_gpa = image.end_gpa
        self._next_gpa = image.first_gpa + len(image.content)
        self._words = view.cast("Q")
        self.free_gpas = list(image.free)
        self.shares = TableShares()
        self.table_hva_delta = (hva - image.first_gpa) % (1 << 64)

    @property
    def used_bytes(self) -> int:
        """Length of what has ever been used of it."""
        return self._next_gpa - self._first_gpa

    def adopt(self, image: TableImage) -> PageTables:
        """Return the tables of the image that lies here."""
        return PageTables.adopt(
            self, image.first_gpa, image.n_tables, giant_pages=image.giant_pages, live=False
        )

    def allocate(self) -> tuple[int, memoryview]:
        """Return a zeroed table: its guest-physical address, and its 512 entries.

        Raises:
            StateError: There is none left.
        """
        if self.free_gpas:
            gpa = self.free_gpas.pop()
        elif self._next_gpa < self._end_gpa:
            gpa = self._next_gpa
            self._next_gpa += PAGE_BYTES
        else:
            raise StateError("the system area has no page left for page tables")
        entries = self.entries(gpa)
        entries[:] = _EMPTY_TABLE
        return gpa, entries

    def entries(self, gpa: int) -> memoryview:
        """Return the 512 entries of a table."""
        first = (gpa - self._first_gpa) >> 3
        return self._words[first : first + _WORDS]

    def free(self, gpa: int) -> None:
        """Take a table back."""
        self.free_gpas.append(gpa)


class BootTables:
    """Keeps the tables in the system area in step with the vmas.

    Thread-safe: `refresh` may be called from anywhere that holds no lock of the mm's.

    Attributes:
        generation: Of the vmas that the tables show; -1 before the first time.
    """

    __slots__ = ("_area", "_mm", "_vm", "generation")

    def __init__(self, vm: Vm, mm: MemoryManager, area: SystemArea) -> None:
        self._vm = vm
        self._mm = mm
        self._area = area
        self.generation = -1

    def refresh(self) -> bool:
        """Have the tables show the vmas as they are now; when it returns every CPU sees them.

        Returns:
            Whether anything in them has changed.

        Raises:
            StateError: There is no room for so many tables. They are as they were.
            IoctlError: KVM refused the shootdown.
        """
        mm, area = self._mm, self._area
        if self.generation == mm.generation:
            return False
        with mm.mapping_lock:
            ranges = [(start, end, vma.perms) for start, end, vma in mm.vmas]
            if area.image is None:
                area.build_tables(ranges)
                has_changed = True
            else:
                image = area.image_of(ranges)
                changes = list(area.image.changes_to(image))
                has_changed = bool(changes)
                if changes:
                    # Slots are changed under active_lock.
                    with mm.active_lock, self._vm.paused():
                        area.change_tables(image, changes)
                        self._shoot_down()
            self.generation = mm.generation
        return has_changed

    def _shoot_down(self) -> None:
        # A slot that goes and comes: KVM drops every translation. The area's own, since every CPU
        # is outside KVM_RUN anyway, and neither a number nor an address has to be free for it.
        slots = self._vm.memslots
        slot = slots.find(self._area.start)
        if slot is not None:
            slots.remove(slot)
            slots.add(slot.gpa, slot.length_bytes, slot.hva, slot.flags)
