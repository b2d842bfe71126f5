"""`Arena`: allocation and reference counts over one sealed memfd. The package has the states."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Self

from kvmmm.arena.memfd import create_sealed
from kvmmm.arena.statistics import ArenaStatistics
from kvmmm.arena.usage import PageUsage, Reservation
from kvmmm.errors import ArenaExhaustedError, RangeError, StateError, SyscallError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, PAGE_MASK, HostVirt, align_up
from kvmmm.hostarch.ranges import FileRange
from kvmmm.safemem.ffi import HostMapping, fill, punch_hole
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from types import TracebackType

_CAPACITY_MAX_BYTES = 1 << 46  # half of what an x86-64 process can map with four levels
_JUNK = 0xDB
_DEBUG = os.environ.get("KVMMM_DEBUG", "") not in ("", "0")


class Arena:
    """All memory behind a VM: a sealed sparse memfd, mapped linearly, handed out in pages.

    Thread-safe. A context manager; `close` must come after the VMs that have memslots over it.

    Args:
        capacity_bytes: Its size, rounded up to 2 MiB. Costs nothing until touched.
        used_bytes: It begins with [0, used_bytes) allocated, one reference each: `first`. The same
            as allocating it, for less.
        reserved_bytes: And with so much behind that reserved: `reservation`.
        debug: Fill freed pages with 0xdb and punch them only when allocated again. Default:
            whether KVMMM_DEBUG is set.

    Attributes (all read-only; fd is -1 and hva 0 once closed):
        fd: The memfd.
        hva: Host address of its linear mapping, a multiple of 2 MiB: offset fo is at hva + fo.
        capacity_bytes: Its size in bytes.
        view: All of the mapping, writable, format "B".
        first: The range that it began with; empty without `used_bytes`.
        reservation: The reservation that it began with; None without `reserved_bytes`.

    Raises:
        RangeError: A capacity of zero or below, or more than a process can map.
        ArenaExhaustedError: It is to begin with more than it holds.
        SyscallError: The kernel refused the file (EMFILE, …) or the mapping (ENOMEM).

    Source: gVisor pgalloc.MemoryFile has the same purpose; it grows in chunks, this one does not.
    """

    __slots__ = (
        "_allocation_count",
        "_free_count",
        "_junk",
        "_lock",
        "_mapping",
        "_punched_bytes",
        "_usage",
        "capacity_bytes",
        "fd",
        "first",
        "hva",
        "reservation",
        "view",
    )

    def __init__(
        self,
        capacity_bytes: int,
        *,
        used_bytes: int = 0,
        reserved_bytes: int = 0,
        debug: bool | None = None,
    ) -> None:
        if not 0 < capacity_bytes <= _CAPACITY_MAX_BYTES:
            raise RangeError(
                0, capacity_bytes, f"an arena's size is between 1 and {_CAPACITY_MAX_BYTES} bytes"
            )
        if (used_bytes | reserved_bytes) & PAGE_MASK or min(used_bytes, reserved_bytes) < 0:
            raise RangeError(0, used_bytes, "what an arena begins with is made of whole pages")
        if used_bytes + reserved_bytes > capacity_bytes:
            raise ArenaExhaustedError(used_bytes + reserved_bytes, capacity_bytes, capacity_bytes)
        capacity_bytes = align_up(capacity_bytes, HUGE_PAGE_BYTES)
        fd = create_sealed("kvmmm-arena", capacity_bytes)
        try:
            self._mapping = HostMapping(fd, capacity_bytes, HUGE_PAGE_BYTES)
        except OSError as e:
            os.close(fd)
            raise SyscallError(
                e.errno or 0,
                f"cannot map an arena of {capacity_bytes >> 20} MiB (ask for less, or raise the "
                "limit on address space, ulimit -v)",
            ) from e
        self.fd = fd
        self.capacity_bytes = capacity_bytes
        self.hva = HostVirt(self._mapping.hva)
        self.view = memoryview(self._mapping)
        self._lock = threading.Lock()
        self._usage = PageUsage(capacity_bytes, used_bytes, reserved_bytes)
        self.first = FileRange(0, used_bytes)
        self.reservation = self._usage.reservation
        # Debug: free pages that are not zero. None: free pages are always holes.
        self._junk: SegmentSet[bool] | None = (
            SegmentSet(_merge_junk) if (_DEBUG if debug is None else debug) else None
        )
        self._allocation_count = 0
        self._free_count = 0
        self._punched_bytes = 0

    def __repr__(self) -> str:
        if self.fd < 0:
            return "<Arena closed>"
        return f"<Arena fd={self.fd} hva={self.hva:#x} capacity_bytes={self.capacity_bytes}>"

    # Allocation.

    def allocate(
        self,
        length_bytes: int,
        *,
        align_bytes: int = PAGE_BYTES,
        phase_bytes: int = 0,
        at: int | None = None,
        reservation: Reservation | None = None,
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

        Raises:
            RangeError: A size or place that is unaligned, empty or outside the arena or the
                reservation; nothing changed.
            StateError: Closed, or the reservation is not this arena's.
            ArenaExhaustedError: No free range fits, or `at` is taken; nothing changed.
            OSError: fallocate(2) refused to clear a page (debug mode only); nothing changed.
        """
        self._check_request(length_bytes, align_bytes, phase_bytes)
        with self._lock:
            self._check_open()
            usage = self._usage
            if at is None:
                if reservation is not None:
                    raise RangeError(reservation.start, reservation.end, "at= must say where in it")
                start = usage.find_fit(length_bytes, align_bytes, phase_bytes)
                if start is None:
                    raise self._exhausted(length_bytes)
                end = start + length_bytes
            else:
                start, end = at, at + length_bytes
                self._check_range(start, end)
                if (at - phase_bytes) & (align_bytes - 1):
                    raise RangeError(
                        start, end, f"at= is not {phase_bytes:#x} mod {align_bytes:#x}"
                    )
                if reservation is None and not usage.is_free(start, end):
                    raise self._exhausted(length_bytes)
            if self._junk is not None:
                self._punch_junk(start, end)
            if reservation is None:
                usage.take(start, end)
            elif not usage.take_reserved(reservation, start, end):
                raise self._exhausted(length_bytes)
            self._allocation_count += 1
        return FileRange(start, end)

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
            start = self._usage.find_fit(length_bytes, align_bytes, phase_bytes)
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
            self._usage.add_reference(fr.start, fr.end)

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

    # The bytes, the figures, the end.

    def view_of(self, fr: FileRange) -> memoryview:
        """Return a writable view of `fr`, format "B". It holds the mapping until it is released.

        Raises:
            RangeError: Outside the arena.
            StateError: Closed.
        """
        self._check_open()
        if fr.end > self.capacity_bytes:
            raise RangeError(fr.start, fr.end, f"the arena ends at {self.capacity_bytes:#x}")
        return memoryview(self._mapping)[fr.start : fr.end]

    def statistics(self) -> ArenaStatistics:
        """Return the figures of this moment; also after `close`."""
        with self._lock:
            usage = self._usage
            return ArenaStatistics(
                capacity_bytes=self.capacity_bytes,
                used_bytes=usage.used_bytes,
                reserved_bytes=usage.reserved_bytes,
                peak_used_bytes=usage.peak_used_bytes,
                largest_free_bytes=usage.largest_free_bytes,
                allocation_count=self._allocation_count,
                free_count=self._free_count,
                punched_bytes=self._punched_bytes,
            )

    def close(self) -> None:
        """Unmap and close, whatever is still allocated. A second call does nothing.

        Raises:
            StateError: A view is still held; the arena stays open and whole.
        """
        with self._lock:
            if self.fd < 0:
                return
            try:
                self.view.release()
                self._mapping.close()
            except BufferError as e:
                self.view = memoryview(self._mapping)
                raise StateError(
                    f"the arena stays open: {e}; release what view_of() and slices of view gave, "
                    "then close again"
                ) from e
            fd, self.fd = self.fd, -1
            self.hva = HostVirt(0)
            os.close(fd)

    def __del__(self) -> None:
        # Quietly: fd and mapping go. A view that is still held keeps the mapping until it goes.
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Called with the lock held, but for _check_request.

    def _check_open(self) -> None:
        if self.fd < 0:
            raise StateError("the arena is closed")

    @staticmethod
    def _check_request(length_bytes: int, align_bytes: int, phase_bytes: int) -> None:
        if length_bytes <= 0 or length_bytes & PAGE_MASK:
            raise RangeError(0, length_bytes, "a length is a multiple of 4 KiB above zero")
        if align_bytes < PAGE_BYTES or align_bytes & (align_bytes - 1):
            raise RangeError(0, length_bytes, f"{align_bytes:#x} is no alignment for pages")
        if phase_bytes & PAGE_MASK:
            raise RangeError(0, length_bytes, f"phase {phase_bytes:#x} is no multiple of 4 KiB")

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


def _merge_junk(_start1: int, _end1: int, _value1: bool, _value2: bool) -> bool | None:
    return True
