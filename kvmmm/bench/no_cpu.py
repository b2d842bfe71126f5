"""An address space that no CPU uses: what is measured over it is the memory manager alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.platform.base import AddressSpace


class NoCpu:
    """An AddressSpace that keeps nothing.

    Args:
        max_addr: See `kvmmm.platform.base.AddressSpace`; the rest as well.
    """

    map_unit_bytes = 0
    walks_frames = False
    map_quickly = None
    walk = None
    min_window_bytes = 2 << 20

    def __init__(self, max_addr: int) -> None:
        self.max_addr = max_addr

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Do nothing."""

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Do nothing."""

    def is_mapped(self, _addr: int, _access: int) -> bool:
        """Nothing is."""
        return False

    def fork_into(self, _child: AddressSpace) -> bool:
        """Not needed here."""
        return False

    def release(self) -> None:
        """Do nothing."""
