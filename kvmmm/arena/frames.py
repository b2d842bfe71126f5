"""`Frames`: an arena's pages, handed out and counted. The package has the states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.arena.usage import PageUsage, Reservation
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError
from kvmmm.hostarch.addr import PAGE_BYTES, PAGE_MASK, HostVirt
from kvmmm.hostarch.ranges import FileRange
from kvmmm.safemem.ffi import GuardedLock, fill, punch_hole
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from collections.abc import Sequence

_JUNK = 0xDB


class Frames:
    """Allocation and reference counts over a memfd that is mapped; what `Arena` builds on.

    Args:
        fd: The memfd.
        hva: Host address of its mapping.
        capacity_bytes: Length of both.
        used_bytes: See `Arena`.
        reserved_bytes: See `Arena`.
        debug: Fill freed pages with 0xdb and punch them only when allocated again.
    """

    __slots__ = (
        "_allocation_count",
        "_free_count",
        "_junk",
        "_lock",
        "_punched_bytes",
        "_usage",
        "capacity_bytes",
        "fd",
        "first",
        "hva",
        "reservation",
    )

    def __init__(
        self,
        fd: int,
        hva: int,
        capacity_bytes: int,
        used_bytes: int,
        reserved_bytes: int,
        *,
        debug: bool,
    ) -> None:
        self.fd = fd
        self.capacity_bytes = capacity_bytes
        self.hva = HostVirt(hva)
        self._lock = GuardedLock()
        self._usage = PageUsage(capacity_bytes, used_bytes, reserved_bytes)
        self.first = FileRange(0, used_bytes)
        self.reservation = self._usage.reservation
        # Debug: free pages that are not zero. None: free pages are always holes.
        self._junk: SegmentSet[bool] | None = SegmentSet(SegmentSet.merge_equal) if debug else None
        self._allocation_count = 0
        self._free_count = 0
        self._punched_bytes = 0

    def allocate(
        self,
        length_bytes: int,
        *,
        align_bytes: int = PAGE_BYTES,
        phase_bytes: int = 0,
        at: int | None = None,
        reservation: Reservation | None = None,
        top_down: bool = False,
    ) -> FileRange:
        """Return zero-filled pages with one reference each.

        Args:
            length_bytes: How much; a multiple of 4 KiB.
            align_bytes: The range begins at fo with fo % align_bytes == phase_bytes % align_bytes;
                a power of two, at least 4 KiB. With 2 MiB and a gpa as the phase, gpa and offset
                agree modulo 2 MiB, as a large page needs it.
            phase_bytes: See there; a multiple of 4 KiB.
            at: File offset where it must begin, instead of anywhere.
            reservation: Whose reserved pages to take, with `at` inside it. Without it, only free
                pages are taken.
            top_down: Anywhere is as high as it fits, not as low: for memory that is touched
                downwards, so that neighbours there become neighbours here.

        Raises:
            RangeError: A size or place that is unaligned, empty or outside the arena or the
                reservation; nothing changed.
            StateError: Closed, or the reservation is not this arena's.
            ArenaExhaustedError: No free range fits, or `at` is taken; nothing changed.
            OSError: fallocate(2) refused to clear a page (debug mode only); nothing changed.
        """
        self._check_request(length_bytes, align_bytes, phase_bytes)
        with self._lock:
            if self.fd < 0:
                self._check_open()
            fo = None
            if at is None and reservation is None and not top_down and self._junk is None:
                fo = self._usage.take_fit(length_bytes, align_bytes, phase_bytes)
            if fo is None:
                fo = self._place(length_bytes, align_bytes, phase_bytes, at, reservation, top_down)
                self._take(fo, fo + length_bytes, reservation)
            self._allocation_count += 1
        return FileRange(fo, fo + length_bytes)

    def take(self, length_bytes: int, align_bytes: int, phase_bytes: int) -> int | None:
        """Allocate as `allocate` does, where the last allocation of that kind says; or say None.

        For the path of a fault: the arguments are not checked, and only the offset is returned.
        None means that `allocate` must be asked.
        """
        with self._lock:
            if self.fd < 0 or self._junk is not None:
                return None
            fo = self._usage.take_fit(length_bytes, align_bytes, phase_bytes)
            if fo is not None:
                self._allocation_count += 1
            return fo

    def reserve(
        self, length_bytes: int, *, align_bytes: int = PAGE_BYTES, phase_bytes: int = 0
    ) -> Reservation | None:
        """Promise a contiguous range to the caller without committing it; None if none fits.

        Nobody else is given a page of it. `allocate(at=, reservation=)` commits parts of it; a part
        whose last reference goes is reserved again. The arguments are those of `allocate`.

        Raises:
            RangeError: A size that is unaligned or empty.
            StateError: Closed.
        """
        self._check_request(length_bytes, align_bytes, phase_bytes)
        with self._lock:
            self._check_open()
            start = self._usage.free.find_fit(length_bytes, align_bytes, phase_bytes)
            return None if start is None else self._usage.reserve(start, start + length_bytes)

    def unreserve(self, reservation: Reservation) -> None:
        """End a reservation. What of it is used stays used, and is freed like any page later.

        Raises:
            StateError: Closed, or no (longer a) reservation of this arena.
        """
        with self._lock:
            self._check_open()
            self._usage.unreserve(reservation)

    # References.

    def inc_ref(self, fr: FileRange) -> None:
        """Add one reference to each page of `fr`.

        Raises:
            RangeError: Unaligned, empty or outside the arena; nothing changed.
            StateError: Closed, or a page is not in use; nothing changed.
        """
        with self._lock:
            self._check_open()
            self._check_range(fr.start, fr.end)
            self._usage.add_references((fr,))

    def inc_ref_many(self, ranges: Sequence[FileRange]) -> None:
        """Add one reference to each page of each range, all or nothing, in one step.

        A page that lies in two of them gets two.

        Raises:
            RangeError: One is unaligned, empty or outside the arena; nothing changed.
            StateError: Closed, or a page is not in use; nothing changed.
        """
        with self._lock:
            self._check_open()
            for fr in ranges:
                self._check_range(fr.start, fr.end)
            self._usage.add_references(ranges)

    def dec_ref(self, fr: FileRange) -> None:
        """Drop one reference of each page of `fr`; pages without any are punched out.

        Raises:
            RangeError: Unaligned, empty or outside the arena; nothing changed.
            StateError: Closed, or a page is not in use; nothing changed.
            OSError: fallocate(2) refused; the references are still there.
        """
        with self._lock:
            self._check_open()
            self._check_range(fr.start, fr.end)
            if self._usage.drop_shared(fr.start, fr.end):
                return  # somebody else has them all
            unused = self._usage.last_references(fr.start, fr.end)
            for start, end in unused:
                if self._junk is None:
                    self._punch(start, end)
                else:
                    fill(self.hva + start, _JUNK, end - start)
                    self._junk.insert(start, end, True)
            self._usage.drop_reference(fr.start, fr.end)
            self._free_count += len(unused)

    def ref_count(self, fo: int) -> int:
        """Return the references on the page that holds file offset `fo`; 0 when it is unused."""
        with self._lock:
            return self._usage.ref_count(fo)

    def ref_counts(self, fr: FileRange) -> list[tuple[int, int, int]]:
        """Return (start, end, references) of the parts of `fr` that have any, in order.

        Raises:
            RangeError: Unaligned, empty or outside the arena.
        """
        with self._lock:
            self._check_range(fr.start, fr.end)
            return self._usage.ref_counts(fr.start, fr.end)

    def first_shared(self, fr: FileRange) -> int | None:
        """Return the offset of the first page of `fr` that has several references; None: none.

        Raises:
            RangeError: Unaligned, empty or outside the arena.
            StateError: A page before that is not in use.

        Source:
            gVisor pgalloc.MemoryFile.FirstSharedRange.
        """
        with self._lock:
            self._check_range(fr.start, fr.end)
            return self._usage.first_shared(fr.start, fr.end)

    def has_unique_ref(self, fr: FileRange) -> bool:
        """Return whether every page of `fr` has exactly one reference.

        It may lose that at any time, unless the one who asks holds it and keeps others from
        sharing; it cannot gain it but by what others drop.

        Raises:
            RangeError: Unaligned, empty or outside the arena.
            StateError: A page before the first that is shared is not in use.

        Source:
            gVisor pgalloc.MemoryFile.HasUniqueRef.
        """
        return self.first_shared(fr) is None

    # Called with the lock held, but for _check_request.

    def _check_open(self) -> None:
        if self.fd < 0:
            raise StateError("the arena is closed")

    @staticmethod
    def _check_request(length_bytes: int, align_bytes: int, phase_bytes: int) -> None:
        if (
            length_bytes > 0
            and not (length_bytes | phase_bytes | align_bytes) & PAGE_MASK
            and align_bytes > 0
            and not align_bytes & (align_bytes - 1)
        ):
            return
        if length_bytes <= 0 or length_bytes & PAGE_MASK:
            raise RangeError(0, length_bytes, "a length is a multiple of 4 KiB above zero")
        if phase_bytes & PAGE_MASK:
            raise RangeError(0, length_bytes, f"phase {phase_bytes:#x} is no multiple of 4 KiB")
        raise RangeError(0, length_bytes, f"{align_bytes:#x} is no alignment for pages")

    def _place(
        self, length_bytes: int, align_bytes: int, phase_bytes: int, at: int | None,
        reservation: Reservation | None, top_down: bool,
    ) -> int:  # fmt: skip
        # Where an allocation is to begin; nothing is taken yet.
        free = self._usage.free
        if at is None:
            if reservation is not None:
                raise RangeError(reservation.start, reservation.end, "at= must say where in it")
            find = free.find_fit_down if top_down else free.find_fit
            fo = find(length_bytes, align_bytes, phase_bytes)
            if fo is None:
                raise self._exhausted(length_bytes)
            return fo
        end = at + length_bytes
        self._check_range(at, end)
        if (at - phase_bytes) & (align_bytes - 1):
            raise RangeError(at, end, f"at= is not {phase_bytes:#x} mod {align_bytes:#x}")
        if reservation is None and not free.covers(at, end):
            raise self._exhausted(length_bytes)
        return at

    def _take(self, start: int, end: int, reservation: Reservation | None) -> None:
        if self._junk is not None:
            self._punch_junk(start, end)
        if reservation is None:
            self._usage.take(start, end)
        elif not self._usage.take_reserved(reservation, start, end):
            raise self._exhausted(end - start)

    def _check_range(self, start: int, end: int) -> None:
        if (start | end) & PAGE_MASK or not 0 <= start < end <= self.capacity_bytes:
            raise RangeError(
                start, end, f"not whole pages of an arena of {self.capacity_bytes:#x} bytes"
            )

    def _exhausted(self, wanted_bytes: int) -> ArenaExhaustedError:
        return ArenaExhaustedError(wanted_bytes, self._usage.free_bytes, self.capacity_bytes)

    def _punch(self, start: int, end: int) -> None:
        punch_hole(self.fd, start, end - start)
        self._punched_bytes += end - start

    def _punch_junk(self, start: int, end: int) -> None:
        if self._junk is not None:
            for s, e, _ in list(self._junk.segments(start, end)):
                self._punch(max(s, start), min(e, end))
            self._junk.remove(start, end)
