"""Stand-ins without KVM: an address space with a CPU on it, a file, something to map."""

from __future__ import annotations

import collections
import errno
import os
from typing import TYPE_CHECKING

from kvmmm.hostarch.access import ANY_ACCESS, READ, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES, page_down
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.file import Translation
from kvmmm.memmap.mapping_set import Mapped
from kvmmm.safemem.ffi import HostMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.memmap.file import File, MappingSpace


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
        walks_frames: As memslots are: then it cannot fork either.
        map_failure: Raised by the next `map_file`, once.
        fork_failure: Raised by the next `fork_into`, once.
    """

    def __init__(
        self, max_addr: int, min_window_bytes: int = 2 << 20, map_unit_bytes: int = 0, *,
        walks_frames: bool = False,
    ) -> None:  # fmt: skip
        self.walks_frames = walks_frames
        self.map_quickly = None
        self.walk = None
        self.map_failure: OSError | None = None
        self.fork_failure: OSError | None = None
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
        if self.map_failure is not None:
            failure, self.map_failure = self.map_failure, None
            raise failure
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
        if self.walks_frames:
            return False
        assert not child.pages
        if self.fork_failure is not None:
            failure, self.fork_failure = self.fork_failure, None
            raise failure
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


class FakeFile:
    """A File in a memfd that counts references.

    Attributes:
        bytes: All of it, as far as `size_bytes`: what is behind it must not be touched.
        references: page offset -> count.
        may_fault: Then its bytes are only to be had by `read_into` and `write_from`.
    """

    def __init__(self, length_bytes: int, *, may_fault: bool = False) -> None:
        self._fd = os.memfd_create("fake")
        self.size_bytes = self.capacity_bytes = length_bytes
        self._mapping = HostMapping(self._fd, max(length_bytes, 1), PAGE_BYTES)
        self.hva = self._mapping.hva
        self.bytes = memoryview(self._mapping)[:length_bytes]
        self.may_fault = may_fault
        self.references: collections.Counter[int] = collections.Counter()

    def __del__(self) -> None:
        os.close(self._fd)

    @property
    def size_bytes(self) -> int:
        """Where its bytes end; less than `capacity_bytes` once it is cut."""
        return os.fstat(self._fd).st_size

    @size_bytes.setter
    def size_bytes(self, n_bytes: int) -> None:
        os.ftruncate(self._fd, n_bytes)

    def inc_ref(self, fr: FileRange) -> None:
        for page in range(fr.start, fr.end, PAGE_BYTES):
            self.references[page] += 1

    def dec_ref(self, fr: FileRange) -> None:
        for page in range(fr.start, fr.end, PAGE_BYTES):
            assert self.references[page] > 0, hex(page)
            self.references[page] -= 1

    def view_of(self, fr: FileRange) -> memoryview:
        return memoryview(self.bytes)[fr.start : min(fr.end, self.size_bytes)]

    def read_into(self, fo: int, dst: memoryview) -> int:
        n_bytes = max(min(len(dst), self.size_bytes - fo), 0)
        dst[:n_bytes] = self.bytes[fo : fo + n_bytes]
        return n_bytes

    def write_from(self, fo: int, src: memoryview) -> int:
        n_bytes = max(min(len(src), self.size_bytes - fo), 0)
        self.bytes[fo : fo + n_bytes] = src[:n_bytes]
        return n_bytes


class FakeMappable(Mapped):
    """A Mappable over a FakeFile, with every freedom that a mappable has.

    Attributes:
        delta: File offset minus offset; changing it takes effect with the next translation.
        piece_bytes: How much one translation covers at most, aligned so.
        reads_around: Whether it gives all that is optional.
        perms: What translations permit beyond what was asked; the least possible by default.
        error: What is behind its end.
        calls: (required, optional, access) of each translation.
    """

    name = "/fake"
    max_shared_perms = ANY_ACCESS

    def __init__(self, file: FakeFile, *, piece_bytes: int = 1 << 40, delta: int = 0) -> None:
        super().__init__()
        self.file = file
        self.delta = delta
        self.piece_bytes = piece_bytes
        self.reads_around = False
        self.perms = 0
        self.error = OSError(errno.EIO, "its end")
        self.calls: list[tuple[FileRange, FileRange, int]] = []

    @property
    def mappings(self) -> list[tuple[MappingSpace, int, int, int, bool]]:
        """What is mapped: (space, start, end, offset, writable), by offset."""
        return [
            (space, start + delta, end + delta, start, writable)
            for start, end, found in self._mappings._mappings
            for space, delta, writable in found
        ]

    def translate(
        self, required: FileRange, optional: FileRange, access: int
    ) -> tuple[list[Translation], OSError | None]:
        self.calls.append((required, optional, access))
        wanted = optional if self.reads_around else required
        found = []
        at = wanted.start
        stop = min(wanted.end, self.file.size_bytes - self.delta)
        while at < stop:
            end = min((at // self.piece_bytes + 1) * self.piece_bytes, stop)
            if required.start < end and at < required.end:
                found.append(Translation(at, end, self.file, at + self.delta, access | self.perms))
            at = end
        return found, self.error if stop < required.end else None

    def msync(self, start: int, end: int) -> None:
        pass
