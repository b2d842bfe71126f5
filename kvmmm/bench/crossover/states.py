"""Residency states: how memory gets there before an operation is timed, and how that is known.

    linear  the arena's own mapping has page-table entries: MADV_DONTNEED, /proc/self/pagemap
    mirror  the window has mappings, and entries: MirrorWindow.clear, .find, pagemap
    absent  no pma, no frame: munmap, mm.pmas, mm.frames, SEEK_DATA (ground.py)
    2 MiB   both mappings have such entries, where they can: the PAGEMAP_SCAN ioctl

What was made cold is made warm again afterwards (linear) or stays empty (mirror), so that each cell
finds memory as every other one does. All of it happens outside of the timed region. A state that is
not there is an error; no figure comes of it.

Cold is what is mapped. Where it is mapped, every mechanism has looked up before, whichever is timed
then: to make the state and to verify it asks the frame table, and not to ask the others, too, would
be to time their cache misses alone.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.plan import COLD, LINEAR_COLD, MIRROR_COLD
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, page_down, page_up
from kvmmm.safemem.ffi import address_of, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.bench.crossover.ground import Ground
    from kvmmm.mm import MemoryManager

_C = cast("Any", lib)
MIRROR = "mirror"
"""The variant that goes through the mirror."""
OUTSIDE = frozenset({"file_io"})
"""Variants that need no entries of this process at all."""


_PAGEMAP_SCAN = 0xC0606610
_SCAN = struct.Struct("12Q")  # struct pm_scan_arg
_REGIONS = 64
_IS_HUGE = 1 << 6


class Pagemap:
    """/proc/self/pagemap, which says of each page whether it has a page-table entry.

    Attributes:
        fd: It.
        can_scan: Whether the kernel says which entries are of 2 MiB (Linux 6.7).
    """

    def __init__(self) -> None:
        self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = ffi.new("uint64_t[]", 3 * _REGIONS)
        self.can_scan = False
        with suppress(OSError):
            self.huge_bytes(page_down(address_of(self._regions)), PAGE_BYTES)
            self.can_scan = True

    def huge_bytes(self, hva: int, n_bytes: int) -> int:
        """Return how much of a range has entries of 2 MiB.

        Raises:
            OSError: The kernel cannot say it.
        """
        start, end, found = page_down(hva), page_up(hva + n_bytes), 0
        while start < end:
            scan = bytearray(_SCAN.pack(
                _SCAN.size, 0, start, end, 0, address_of(self._regions), _REGIONS, 0,
                0, _IS_HUGE, 0, _IS_HUGE,
            ))  # fmt: skip
            n = fcntl.ioctl(self.fd, _PAGEMAP_SCAN, scan)
            found += sum(self._regions[3 * i + 1] - self._regions[3 * i] for i in range(n))
            start = _SCAN.unpack(scan)[4]
        return found

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


def _checked(what: str, answer: int) -> int:
    if answer < 0:
        raise GroundError(f"{what}: {os.strerror(-answer)}")
    return answer


class State:
    """One residency state of one ground.

    Args:
        ground: The memory.
        residency: Every one but `absent`.
        pagemap: For looking.

    Attributes:
        mm: The address space that has this state, or is brought into it.
    """

    def __init__(self, ground: Ground, residency: str, pagemap: Pagemap) -> None:
        self._ground = ground
        self._pagemap = pagemap
        self._fd = pagemap.fd
        is_huge = ground.pool.page_bytes == HUGE_PAGE_BYTES and pagemap.can_scan
        segment_bytes = ground.geometry.segment_bytes
        self._huge_linear = is_huge
        self._huge_mirror = is_huge and segment_bytes % HUGE_PAGE_BYTES == 0
        self.is_linear_cold = residency in {LINEAR_COLD, COLD}
        self.is_mirror_cold = residency in {MIRROR_COLD, COLD}
        self.mm: MemoryManager = ground.cold() if self.is_mirror_cold else ground.warm()

    @property
    def is_cold(self) -> bool:
        """Whether it must be brought about anew for each operation."""
        return self.is_linear_cold or self.is_mirror_cold

    @contextmanager
    def prepared(self, addr: int, n_bytes: int) -> Iterator[None]:
        """Bring [addr, addr + n_bytes) into the state and verify it; undo it in the end.

        Raises:
            GroundError: It is not in that state.
        """
        if self.is_linear_cold:
            self._linear("drop", _C.KVMMM_CROSS_DROP, addr, n_bytes)
        try:
            self.verify(addr, n_bytes)
            for finder in (self.mm.walk, self.mm.mirror):
                if finder is not None:
                    finder.find(addr, n_bytes, READ_WRITE)
            yield
        finally:
            if self.is_mirror_cold:
                self._empty_mirror(addr, n_bytes)
            if self.is_linear_cold:
                self._linear("populate", _C.KVMMM_CROSS_POPULATE, addr, n_bytes)

    def verify(self, addr: int, n_bytes: int) -> None:
        """Make sure that a range is in the state.

        Raises:
            GroundError: It is not.
        """
        n_pages = (page_up(addr + n_bytes) - page_down(addr)) // PAGE_BYTES
        wanted = 0 if self.is_linear_cold else n_pages
        self._verify_linear(addr, n_bytes, wanted)
        if self._huge_linear and not self.is_linear_cold:
            for fo, length_bytes in self._ground.pieces(addr, n_bytes):
                self._verify_huge("linear mapping", self._ground.pool.arena.hva + fo, length_bytes)
        mirror = self.mm.mirror
        assert mirror is not None  # noqa: S101 - both address spaces have one
        if self.is_mirror_cold:
            if mirror.n_resident_pages:
                raise GroundError(f"{mirror.n_resident_pages} pages are in the mirror")
            return
        n_missing = self._ground.geometry.length_bytes // PAGE_BYTES - mirror.n_resident_pages
        if n_missing:
            raise GroundError(f"{n_missing} pages are not in the mirror")
        found = mirror.find(addr, n_bytes, READ_WRITE)
        if found is None or found[1] != n_bytes:
            raise GroundError("not all of it is in the mirror")
        if self._huge_mirror:
            self._verify_huge("mirror", found[0], n_bytes)
        n_present = _checked("pagemap", _C.kvmmm_cross_present(self._fd, found[0], n_bytes))
        if n_present != n_pages:
            raise GroundError(f"{n_present} of {n_pages} pages of the mirror are present")

    def verify_after(self, variant: str, addr: int, n_bytes: int, n_faults: int | None) -> None:
        """Make sure that an operation by `variant` had to pay for what was cold, and for no more.

        Args:
            variant: Which.
            addr: Where.
            n_bytes: How much.
            n_faults: Page faults that it took; None if that is not known.

        Raises:
            GroundError: It did not go that way.
        """
        mirror = self.mm.mirror
        assert mirror is not None  # noqa: S101 - as above
        is_mirrored = variant == MIRROR
        if self.is_mirror_cold:
            found = mirror.find(addr, n_bytes, READ_WRITE)
            if (found is not None and found[1] == n_bytes) != is_mirrored:
                raise GroundError(f"{variant} left {mirror.n_resident_pages} pages in the mirror")
        passes_by = is_mirrored or variant in OUTSIDE
        if self.is_linear_cold:
            n_pages = (page_up(addr + n_bytes) - page_down(addr)) // PAGE_BYTES
            self._verify_linear(addr, n_bytes, 0 if passes_by else n_pages, f"after {variant} ")
        if n_faults is None or variant in OUTSIDE:
            return
        if is_mirrored or not self.is_linear_cold:
            # What a cold mirror is given has its entries at once, but for a few pages.
            if n_faults and not (is_mirrored and self.is_mirror_cold):
                raise GroundError(f"{variant} took {n_faults} page faults in resident memory")
        elif not n_faults and variant != "process_vm":  # the kernel's own look-ups are not counted
            raise GroundError(f"{variant} took no page fault in memory without entries")

    def _verify_linear(self, addr: int, n_bytes: int, n_wanted: int, when: str = "") -> None:
        n_present = self._linear("pagemap", _C.KVMMM_CROSS_COUNT, addr, n_bytes)
        if n_present != n_wanted:
            n_pages = (page_up(addr + n_bytes) - page_down(addr)) // PAGE_BYTES
            raise GroundError(f"{when}{n_present} of {n_pages} pages are in the linear mapping")

    def _verify_huge(self, where: str, hva: int, n_bytes: int) -> None:
        wanted = page_up(hva + n_bytes) - page_down(hva)
        if (got := self._pagemap.huge_bytes(hva, n_bytes)) != wanted:
            raise GroundError(f"{got} of {wanted} bytes of the {where} are in 2 MiB pages")

    def mend(self) -> None:
        """Make all entries that there should be, after a page fault where none should have been."""
        length_bytes = self._ground.geometry.length_bytes
        self._linear("populate", _C.KVMMM_CROSS_POPULATE, START, length_bytes)
        if not self.is_mirror_cold and self.mm.mirror is not None:
            self.mm.mirror.populate(START, START + length_bytes)

    def _linear(self, what: str, action: int, addr: int, n_bytes: int) -> int:
        return _checked(what, _C.kvmmm_cross_linear(id(self.mm), action, self._fd, addr, n_bytes))

    def _empty_mirror(self, addr: int, n_bytes: int) -> None:
        n = self._ground.geometry.segment_bytes
        low = START + (addr - START) // n * n
        high = START + -(-(addr + n_bytes - START) // n) * n
        assert self.mm.mirror is not None  # noqa: S101 - as above
        self.mm.mirror.clear(low, high)
