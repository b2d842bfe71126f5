"""Residency states: how memory gets there before an operation is timed, and how that is known.

    linear  the arena's own mapping has page-table entries: MADV_DONTNEED, /proc/self/pagemap
    mirror  the window has mappings, and entries: MirrorWindow.clear, .find, pagemap
    absent  no pma: munmap, mm.pmas, mm.frames

What was made cold is made warm again afterwards (linear) or stays empty (mirror), so that each cell
finds memory as every other one does. All of it happens outside of the timed region. A state that is
not there is an error; no figure comes of it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.crossover.geometry import START
from kvmmm.bench.crossover.plan import COLD, LINEAR_COLD, MIRROR_COLD
from kvmmm.bench.crossover.pool import GroundError
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down, page_up
from kvmmm.safemem.ffi import lib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.bench.crossover.ground import Ground
    from kvmmm.mm import MemoryManager

_C = cast("Any", lib)
MIRROR = "mirror"
"""The variant that goes through the mirror."""
OUTSIDE = frozenset({"file_io"})
"""Variants that need no entries of this process at all."""


class Pagemap:
    """/proc/self/pagemap, which says of each page whether it has a page-table entry."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

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
        self._fd = pagemap.fd
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
        n_present = self._linear("pagemap", _C.KVMMM_CROSS_COUNT, addr, n_bytes)
        if n_present != wanted:
            raise GroundError(f"{n_present} of {n_pages} pages are in the linear mapping")
        mirror = self.mm.mirror
        assert mirror is not None  # noqa: S101 - both address spaces have one
        if self.is_mirror_cold:
            if mirror.n_resident_pages:
                raise GroundError(f"{mirror.n_resident_pages} pages are in the mirror")
            return
        found = mirror.find(addr, n_bytes, READ_WRITE)
        if found is None or found[1] != n_bytes:
            raise GroundError("not all of it is in the mirror")
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
        if n_faults is None or variant in OUTSIDE:
            return
        if is_mirrored or not self.is_linear_cold:
            # What a cold mirror is given has its entries at once, but for a few pages.
            if n_faults and not (is_mirrored and self.is_mirror_cold):
                raise GroundError(f"{variant} took {n_faults} page faults in resident memory")
        elif not n_faults and variant != "process_vm":  # the kernel's own look-ups are not counted
            raise GroundError(f"{variant} took no page fault in memory without entries")

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
