"""Address spaces and CPUs to drive a memory manager with: a fake one here, real ones in `machines`.

What a CPU does is load and store bytes in ascending order and fetch instructions; where it is
refused, the error that the memory manager answered its fault with comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.arena import Arena
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.memmap.file import File
    from kvmmm.mm import MemoryManager

CODE = b"\xe6\xb0"
"""Out 0xb0, al: what a CPU can fetch and run anywhere, and it ends there."""


ARENA_BYTES = 128 << 20
"""Four spaces need less; it is `World.hoarding` that leaves them a few pages."""


class Backend:
    """One kind of address space, any number of them over one arena, and a CPU for each or for all.

    Attributes:
        hoods: First pages of the neighbourhoods in which rules work, a dozen pages each.
        max_addr: Exclusive end of addresses.
        is_torn: A store over a page boundary that is refused at its first page may have been made
            on its second one.
        is_atomic: A store of 1, 2, 4 or 8 bytes that is refused has stored nothing.
        has_exact_faults: A fault's address is that of the first byte that cannot be accessed; else
            its page is.
        may_evict: There is room for few translations: those of one call may drop others.
    """

    hoods: Sequence[int] = ()
    is_torn = is_atomic = may_evict = False
    has_exact_faults = True
    arena: Arena
    max_addr: int

    def new_space(self) -> Any:
        """Return an empty address space."""
        raise NotImplementedError

    def attach(self, mm: MemoryManager) -> None:
        """Have faults of the mm's space served by it."""
        raise NotImplementedError

    def detach(self, mm: MemoryManager) -> None:
        """Have no CPU use the mm's space any more."""

    def load(self, mm: MemoryManager, addr: int, n_bytes: int) -> bytes:
        """Read as a CPU does."""
        raise NotImplementedError

    def store(self, mm: MemoryManager, addr: int, data: bytes) -> None:
        """Write as a CPU does."""
        raise NotImplementedError

    def fetch(self, mm: MemoryManager, addr: int) -> None:
        """Run what is at `addr`, which is `CODE`, unless this is refused."""
        raise NotImplementedError

    def forget(self, mm: MemoryManager, ranges: Sequence[AddrRange]) -> None:
        """Drop translations: they are a cache."""
        with mm.active_lock:
            mm.address_space.unmap(ranges)

    def reservation(self) -> Any:
        """Return a home for an mm's frames, or None."""
        return None

    def check(self, mm: MemoryManager) -> None:
        """Check what only this kind of space can tell."""

    def own_bytes(self) -> int:
        """Bytes of the arena that are ours, not an mm's."""
        return 0

    def close(self) -> None:
        """Release everything; all mms are closed."""
        self.arena.close()


class FakeSpace(FakeAddressSpace):
    """The fake, with its CPU; files that may fault are read and written as their rules say."""

    def load(self, addr: int, length_bytes: int, access: int = READ) -> bytes:
        found = b""
        for file, fo, n_bytes in self._runs(addr, length_bytes, access):
            part = bytearray(n_bytes)
            assert file.read_into(fo, memoryview(part)) == n_bytes, "a frame that is gone"
            found += part
        return found

    def store(self, addr: int, data: bytes) -> None:
        done = 0
        for file, fo, n_bytes in self._runs(addr, len(data), WRITE):
            part = memoryview(data)[done : done + n_bytes]
            assert file.write_from(fo, part) == n_bytes, "a frame that is gone"
            done += n_bytes

    def _runs(self, addr: int, length_bytes: int, access: int) -> Iterator[tuple[File, int, int]]:
        at, end = addr, addr + length_bytes
        while at < end:
            page = page_down(at)
            if not self.is_mapped(page, access):
                assert self.on_fault is not None
                self.on_fault(at, access)
                # One fault must do: a CPU that faults again and again makes no progress.
                assert self.is_mapped(page, access), f"{at:#x} still forbids {access}"
            file, offset, _ = self.pages[page]
            stop = min(page + PAGE_BYTES, end)
            yield file, offset + at - page, stop - at
            at = stop


class FakeBackend(Backend):
    """Without KVM: a million steps in an hour."""

    max_addr = 2 << 30
    # In a window, where placing begins, over a window's edge, over 1 GiB, and at the very end.
    hoods = (0, 16, 506, 1020, (1 << 18) - 6, (1 << 19) - 12)

    def __init__(
        self, *, walks_frames: bool = False, map_unit_pages: int = 0, has_home: bool = False
    ) -> None:
        self._walks_frames = walks_frames
        self._map_unit_pages = map_unit_pages
        self._has_home = has_home
        self.arena = Arena(ARENA_BYTES + (self.max_addr if has_home else 0))

    def new_space(self) -> FakeSpace:
        return FakeSpace(
            self.max_addr, map_unit_bytes=self._map_unit_pages * PAGE_BYTES,
            walks_frames=self._walks_frames,
        )  # fmt: skip

    def reservation(self) -> Any:
        # One of them is at home.
        if not self._has_home:
            return None
        self._has_home = False
        return self.arena.reserve(self.max_addr, align_bytes=2 << 20)

    def attach(self, mm: MemoryManager) -> None:
        _space(mm).on_fault = mm.handle_user_fault

    def detach(self, mm: MemoryManager) -> None:
        _space(mm).on_fault = None

    def load(self, mm: MemoryManager, addr: int, n_bytes: int) -> bytes:
        return _space(mm).load(addr, n_bytes)

    def store(self, mm: MemoryManager, addr: int, data: bytes) -> None:
        _space(mm).store(addr, data)

    def fetch(self, mm: MemoryManager, addr: int) -> None:
        assert _space(mm).load(addr, len(CODE), EXECUTE) == CODE

    def check(self, mm: MemoryManager) -> None:
        """No translation but to the pma's frame, none that allows more."""
        pmas = iter(mm.pmas)
        start = end = 0
        for page, (file, offset, perms) in sorted(_space(mm).pages.items()):
            while end <= page:
                found = next(pmas, None)
                assert found is not None, f"a translation at {page:#x}"
                start, end, pma = found
            assert start <= page, f"a translation at {page:#x}"
            assert pma.file is file
            assert page + pma.delta == offset
            assert not perms & ~pma.effective_perms, f"{page:#x} allows {perms}"


def _space(mm: MemoryManager) -> FakeSpace:
    space = mm.address_space
    assert isinstance(space, FakeSpace)
    return space
