"""Stand-ins without KVM: an address space with a CPU on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down
from kvmmm.hostarch.ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.memmap.file import File


class FaultError(Exception):
    """What a CPU raises where it finds no translation, or one that forbids the access."""

    def __init__(self, addr: int, access: int) -> None:
        self.addr = addr
        self.access = access
        super().__init__(f"{addr:#x} {access}")


class FakeAddressSpace:
    """An AddressSpace in pure Python: one translation a page, and exactly the access it was given.

    `load` and `store` are what a CPU does: bytes in ascending order, page by page, and a fault
    at the first page that has no fitting translation. `on_fault` is asked to make it good, as a
    platform's exit handler would; without it the fault comes out.

    Attributes:
        pages: page address -> (file, offset in it, access bits).
        n_shootdowns: How often translations were removed.
    """

    walks_frames = False

    def __init__(
        self, max_addr: int, min_window_bytes: int = 2 << 20, map_unit_bytes: int = 0
    ) -> None:
        self.map_unit_bytes = map_unit_bytes
        self.n_shootdowns = 0
        self.max_addr = max_addr
        self.min_window_bytes = min_window_bytes
        self.pages: dict[int, tuple[File, int, int]] = {}
        self.on_fault: Callable[[int, int], None] | None = None

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        assert not addr % PAGE_BYTES
        assert fr.is_page_aligned
        assert fr
        assert perms
        assert addr + fr.length_bytes <= self.max_addr
        for offset in range(0, fr.length_bytes, PAGE_BYTES):
            self.pages[addr + offset] = file, fr.start + offset, perms

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        self.n_shootdowns += 1
        for ar in ranges:
            assert ar.is_page_aligned
            if len(self.pages) < ar.length_bytes // PAGE_BYTES:
                for page in [p for p in self.pages if p in ar]:
                    del self.pages[page]
            else:
                for page in range(ar.start, ar.end, PAGE_BYTES):
                    self.pages.pop(page, None)

    def fork_into(self, child: FakeAddressSpace) -> bool:
        assert not child.pages
        for page, (file, offset, perms) in self.pages.items():
            self.pages[page] = child.pages[page] = file, offset, perms & ~WRITE
        return True

    def release(self) -> None:
        self.pages.clear()

    def is_mapped(self, addr: int, access: int) -> bool:
        found = self.pages.get(page_down(addr))
        return found is not None and not access & ~found[2]

    def load(self, addr: int, length_bytes: int, access: int = READ) -> bytes:
        """Read as a CPU does; raises FaultError."""
        found = b""
        for frame, start, stop in self._pieces(addr, length_bytes, access):
            with frame as view:
                found += view[start:stop]
        return found

    def store(self, addr: int, data: bytes) -> None:
        """Write as a CPU does; raises FaultError, after the bytes before it have been written."""
        done = 0
        for frame, start, stop in self._pieces(addr, len(data), WRITE):
            with frame as view:
                view[start:stop] = data[done : done + stop - start]
            done += stop - start

    def _pieces(
        self, addr: int, length_bytes: int, access: int
    ) -> Iterator[tuple[memoryview, int, int]]:
        # (bytes of a page, start, stop); whoever gets the bytes releases them.
        at = addr
        while at < addr + length_bytes:
            page = page_down(at)
            if not self.is_mapped(page, access):
                if self.on_fault is None:
                    raise FaultError(at, access)
                self.on_fault(at, access)
                # One fault must do: a CPU that faults again and again makes no progress.
                assert self.is_mapped(page, access), f"{at:#x} still forbids {access}"
            file, offset, _ = self.pages[page]
            stop = min(page + PAGE_BYTES, addr + length_bytes)
            yield file.view_of(FileRange(offset, offset + PAGE_BYTES)), at - page, stop - page
            at = stop
