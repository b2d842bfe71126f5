"""The interfaces: `File`, `Mappable`, and who maps them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange, FileRange


class File(Protocol):
    """Frames in a file that this process has mapped once, from offset 0, shared.

    Writable, too, or else nothing of it is ever translated with WRITE.

    References are counted by page. A frame without any may be given to somebody else.
    """

    @property
    def hva(self) -> int:
        """Host address of offset 0 of the linear mapping. For platforms only."""

    @property
    def capacity_bytes(self) -> int:
        """Length of the linear mapping: offsets below it can be given to a CPU."""

    @property
    def may_fault(self) -> bool:
        """Whether the host itself may get SIGBUS there, because somebody can cut the file short.

        Then the bytes are to be moved by copies that recover (`safemem.ffi.safe_copy`; the mm's do)
        or by `read_into` and `write_from`, never through `view_of`.
        """

    def inc_ref(self, fr: FileRange) -> None:
        """Take one more reference on every page of `fr`."""

    def dec_ref(self, fr: FileRange) -> None:
        """Drop one reference on every page of `fr`."""

    def ref_count(self, fo: int) -> int:
        """Return the references on the page that holds file offset `fo`."""

    def ref_counts(self, fr: FileRange) -> list[tuple[int, int, int]]:
        """Return (start, end, references) of the parts of `fr` that have any, in order."""

    def view_of(self, fr: FileRange) -> memoryview:
        """Return the bytes of `fr`; writable unless the file is read-only.

        Where `may_fault` is true they are for system calls only, which then fail with EFAULT.
        """

    def read_into(self, fo: int, dst: memoryview) -> int:
        """Copy bytes at offset `fo` into `dst`; how many there were before the last page's end.

        What a CPU can reach, that is: in the page in which the file ends zeros follow.
        """

    def write_from(self, fo: int, src: memoryview) -> int:
        """Copy `src` to offset `fo`; how many bytes there was room for before the last page's end.

        The file does not grow: what goes behind its end, in its last page, may be lost.
        """


class Translation:
    """Where one range of a mappable lies. Immutable.

    Attributes:
        start: Offset in the mappable, page aligned.
        end: One past the last.
        file: What holds the bytes.
        offset: File offset of `start`.
        perms: Accesses for which this holds (`kvmmm.hostarch.access` bits).
    """

    __slots__ = ("end", "file", "offset", "perms", "start")

    def __init__(self, start: int, end: int, file: File, offset: int, perms: int) -> None:
        self.start = start
        self.end = end
        self.file = file
        self.offset = offset
        self.perms = perms

    def __repr__(self) -> str:
        return f"<translation [{self.start:#x}, {self.end:#x}) at {self.offset:#x}>"


class MappingSpace(Protocol):
    """Whoever maps a mappable: a memory manager.

    Lock order: a mappable may hold its own locks when it calls `invalidate`, but not those that its
    `translate` takes (the mm's active_lock comes in between).
    """

    def invalidate(self, ar: AddrRange, *, private: bool) -> None:
        """Forget what backs `ar`; the next access translates again.

        Args:
            ar: Guest addresses, page aligned.
            private: Whether private copies go, too: the file was truncated.
        """


class Mappable(Protocol):
    """What a mapping maps. Offsets are page aligned.

    Source: gVisor memmap.Mappable.
    """

    @property
    def name(self) -> str:
        """Shown in maps."""

    @property
    def max_shared_perms(self) -> int:
        """The most that a shared mapping of it may permit; a private one may permit all."""

    def add_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """Note that `space` maps [offset, offset + len) at `ar`; called with mapping_lock held.

        Args:
            space: Who.
            ar: Guest addresses.
            offset: Where `ar` begins in this mappable.
            writable: Whether it may ever be written through this mapping (shared, max_perms).

        Raises:
            OSError: It cannot be mapped so.
        """

    def remove_mapping(
        self, space: MappingSpace, ar: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """Undo `add_mapping`, for all of it or a part."""

    def copy_mapping(
        self, space: MappingSpace, src: AddrRange, dst: AddrRange, offset: int, *, writable: bool
    ) -> None:
        """Note that `src` is now mapped at `dst`, too, beginning at the same offset (mremap)."""

    def translate(
        self, required: FileRange, optional: FileRange, access: int
    ) -> tuple[list[Translation], OSError | None]:
        """Say where bytes lie. Called with the mm's active_lock held; no reference is taken.

        Args:
            required: Offsets that are needed now.
            optional: Offsets, around `required`, that may be translated as well.
            access: What they are needed for.

        Returns:
            Translations, ascending and contiguous: the first contains `required.start`, each
            overlaps `required` and lies inside `optional`, each permits `access`. And the error
            that ends them, if they end before `required.end`: `GuestBusError`'s kind is told by
            errno EIO beyond the end of a file.
        """

    def msync(self, start: int, end: int) -> None:
        """Write [start, end) back to where it is kept.

        Raises:
            OSError: The host could not.
        """
