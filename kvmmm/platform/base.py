"""The interfaces between the memory manager and a platform.

    mm ──map_file(addr, file, fr, perms)──► AddressSpace ──► a memslot, or a page-table entry
    mm ──unmap(ar)───────────────────────►

An `AddressSpace` is a pure cache of the mm's pmas: it may be emptied at any time and is filled
again on the next fault. Source: gVisor pkg/sentry/platform, AddressSpace; pkg/sentry/memmap, File.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange, FileRange


class File(Protocol):
    """What can back guest memory: frames in a file that this process has mapped."""

    @property
    def hva(self) -> int:
        """Host address of offset 0 of its linear mapping. For platforms only."""

    def inc_ref(self, fr: FileRange) -> None:
        """Take one more reference on every page of `fr`."""

    def dec_ref(self, fr: FileRange) -> None:
        """Drop one reference on every page of `fr`."""

    def view_of(self, fr: FileRange) -> memoryview:
        """Return the bytes of `fr`, writable."""


class AddressSpace(Protocol):
    """Translations that a CPU uses, from mm addresses to frames of files."""

    @property
    def max_addr(self) -> int:
        """Exclusive end of what can be mapped."""

    @property
    def min_window_bytes(self) -> int:
        """The least that one fault should map: grows when translations become scarce."""

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Make [addr, addr + fr.length_bytes) reach `fr` with `perms`; replaces what was there.

        Preconditions:
            - `addr` and `fr` are page aligned, `fr` is not empty, `perms` is not zero.
            - The caller holds a reference on `fr` for as long as it is mapped.
        """

    def unmap(self, ar: AddrRange) -> None:
        """Remove every translation in `ar`; when it returns no CPU uses one of them.

        Raises:
            StateError: A CPU runs, and this kind of address space can only be changed when none
                does.
        """

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a CPU can make `access` to `addr` without a fault."""
