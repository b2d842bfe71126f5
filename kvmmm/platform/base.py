"""The interface between the memory manager and a platform.

    mm ──map_file(addr, file, fr, perms)──► AddressSpace ──► a memslot, or page-table entries
    mm ──unmap([ar, ...])─────────────────►

An `AddressSpace` is a pure cache of the mm's pmas: it may be emptied at any time and is filled
again on the next fault. Source: gVisor pkg/sentry/platform, AddressSpace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.safemem.ffi import PageWalk


class AddressSpace(Protocol):
    """Translations that a CPU uses, from mm addresses to frames of files.

    Called with the mm's active_lock held; several vCPUs may use the translations meanwhile.
    """

    @property
    def max_addr(self) -> int:
        """Exclusive end of what can be mapped."""

    @property
    def min_window_bytes(self) -> int:
        """The least that one fault should back: grows when translations become scarce."""

    @property
    def map_unit_bytes(self) -> int:
        """A fault maps the aligned unit of that length around it; 0: all of the pma."""

    @property
    def walks_frames(self) -> bool:
        """Whether a CPU may walk or push to frames that it was given here.

        So with memslots, where a guest kernel keeps its own tables and stacks: such frames must
        never be write-protected, and a fork has to copy them.
        """

    @property
    def walk(self) -> PageWalk | None:
        """What finds host addresses by the guest's own page tables; None where there are none."""

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Make [addr, addr + fr.length_bytes) reach `fr` with `perms`; replaces what was there.

        When it returns, no CPU uses a translation that was replaced by another frame or by fewer
        permissions.

        Preconditions:
            - `addr` and `fr` are page aligned, `fr` is not empty, `perms` is not zero.
            - The caller holds a reference on `fr` for as long as it is mapped.

        Raises:
            ArenaExhaustedError: No page for a table; some of it may be mapped.
        """

    @property
    def map_quickly(self) -> Callable[[int, int, File, int, int], bool] | None:
        """`map_quickly(addr, length_bytes, file, fo, perms)`: what most faults need of `map_file`.

        It maps where nothing is mapped yet and that is simple, and returns True; otherwise it does
        nothing. None where there is no quicker way than `map_file`.
        """

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Remove every translation in `ranges`; when it returns no CPU uses one of them.

        One call is one shootdown, whatever the number of ranges. It may remove more.

        Raises:
            ArenaExhaustedError: Never: where there is no page to split a superpage, all of the
                superpage goes.
        """

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a CPU can make `access` to `addr` without a fault."""

    def fork_into(self, child: AddressSpace) -> bool:
        """Give `child`, empty so far, this space's translations, and take WRITE from both.

        When it returns, no CPU can write through either without a fault. Whoever calls it unmaps
        from the child what the child has no right to.

        Returns:
            Whether it was done; False where this kind of space cannot, and nothing happened.

        Raises:
            ArenaExhaustedError: No pages for the roots; nothing happened.
        """

    def release(self) -> None:
        """Drop all translations and what holds them. Idempotent; no CPU uses the space any more."""
