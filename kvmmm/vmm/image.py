"""Guest images as values: what goes where in guest memory. No VM is needed, and none is made.

`read_image` answers all that can be asked about an image without a VM, so that a bad one is
rejected with a reason before /dev/kvm is even opened. Loading is then copying:

    for start, end, perms in image.page_ranges():    map [start, end) with perms, zero-filled
    for segment in image.segments:                   copy image.contents(segment) to segment.start
    enter at image.entry

Under the boot tables a guest-virtual address is a guest-physical one, and guest memory is
[0, memory_bytes) without page 0; an image has to fit in there as it is linked.
"""

from __future__ import annotations

import os
from operator import attrgetter

from kvmmm.errors import ImageError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, WRITE, access_str
from kvmmm.hostarch.addr import (
    ADDRESS_LIMIT,
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    align_up,
    page_down,
    page_up,
)
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.units import format_bytes
from kvmmm.vmm import elf
from kvmmm.vmm.image_file import FILE_LIMIT_BYTES, identity, looks_like, read_file

_REMEMBERED_BYTES = 16 << 20
_MAX_REMEMBERED = 8
_images: dict[tuple[object, ...], Image] = {}
"""Images by file and what was asked of it: a host starts many VMs from few files. Immutable."""

# Where guest memory has to end at the latest: the APIC page and KVM's private slots come next.
_MEMORY_LIMIT = 0xFEC00000

PERMS = tuple(
    (READ if flags & elf.PF_R else 0)
    | (WRITE if flags & elf.PF_W else 0)
    | (EXECUTE if flags & elf.PF_X else 0)
    for flags in range(8)
)
"""`kvmmm.hostarch.access` bits by p_flags."""
_START = attrgetter("start")


class Segment:
    """One piece of an image, at its exact addresses. Treat it as immutable.

    Attributes:
        start: Guest-physical address of its first byte; need not be page-aligned.
        end: One past its last byte in memory; what the file does not fill is zero.
        perms: `kvmmm.hostarch.access` bits, as the image asks for them.
        file_offset: Where its bytes begin in `Image.data`.
        file_bytes: How many there are; at most `end - start`.
        name: `segment N` with N as `readelf -l` counts, or `flat binary`.
    """

    __slots__ = ("end", "file_bytes", "file_offset", "name", "perms", "start")

    def __init__(
        self, start: int, end: int, perms: int, file_offset: int, file_bytes: int, *, name: str
    ) -> None:
        self.start = start
        self.end = end
        self.perms = perms
        self.file_offset = file_offset
        self.file_bytes = file_bytes
        self.name = name

    @property
    def page_range(self) -> AddrRange:
        """The pages that it touches; neighbours may touch the first and the last as well."""
        return AddrRange(page_down(self.start), page_up(self.end))

    def __repr__(self) -> str:
        return f"<{self.name} [{self.start:#x}, {self.end:#x}) {access_str(self.perms)}>"


class Image:
    """A guest image that was found good. Treat it as immutable.

    Attributes:
        path: How the caller named it; `<bytes>` when it came as bytes.
        data: The whole file.
        segments: By ascending address; no two share a byte.
        entry: Guest address of the first instruction, inside an executable segment.
        kind: `elf` or `flat`.
    """

    __slots__ = ("_page_ranges", "data", "entry", "kind", "path", "segments")

    def __init__(
        self, path: str, data: bytes, segments: list[Segment], entry: int, kind: str
    ) -> None:
        self.path = path
        self.data = data
        self.segments = segments
        self.entry = entry
        self.kind = kind
        self._page_ranges: tuple[tuple[int, int, int], ...] | None = None

    def contents(self, segment: Segment) -> memoryview:
        """Return a view of the bytes that go to `segment.start`; behind them come zeros."""
        return memoryview(self.data)[segment.file_offset : segment.file_offset + segment.file_bytes]

    def page_ranges(self) -> tuple[tuple[int, int, int], ...]:
        """Return (start, end, perms) of the pages to map: aligned, ascending, disjoint.

        A page that segments share, as linkers lay them out with -z noseparate-code, permits what
        any of them asks for. Neighbours with equal permissions are one range.
        """
        if self._page_ranges is not None:
            return self._page_ranges
        ranges: list[tuple[int, int, int]] = []
        for segment in self.segments:
            start, end, perms = page_down(segment.start), page_up(segment.end), segment.perms
            if ranges and start < ranges[-1][1]:
                # They share no byte, so what they share is one page, the last of the range before.
                first, last, before = ranges.pop()
                _append(ranges, first, start, before)
                _append(ranges, start, last, before | perms)
                start = last
            _append(ranges, start, end, perms)
        self._page_ranges = tuple(ranges)
        return self._page_ranges


def _append(ranges: list[tuple[int, int, int]], start: int, end: int, perms: int) -> None:
    if start == end:
        return
    if ranges and ranges[-1][1] == start and ranges[-1][2] == perms:
        start = ranges.pop()[0]
    ranges.append((start, end, perms))


def read_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    memory_bytes: int,
    base: int | None = None,
    rwx: bool = False,
) -> Image:
    """Return the image in a file or in bytes: a static ELF64, or with `base` a flat binary.

    Args:
        source: Path of the file, or its contents.
        memory_bytes: Size of guest memory, in which the image has to fit; whole pages.
        base: Guest-physical address of a flat binary's first byte, which is also its entry.
        rwx: Whether every segment gets all permissions, as a boot loader would give them.

    Raises:
        ImageNotFoundError: The file cannot be read.
        ImageError: The image cannot be loaded; `reason` says why, `remedy` what to do.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        path, data = "<bytes>", bytes(source)  # a copy only of what could change later
    else:
        path = os.fspath(source)
        return _read_path(path, memory_bytes, base, rwx)
    return _parse(path, data, memory_bytes, base, rwx)


def _read_path(path: str, memory_bytes: int, base: int | None, rwx: bool) -> Image:
    """Read and check a file, unless it is the very one that was read before."""
    key = identity(path)
    if key is not None:
        key = (*key, path, memory_bytes, base, rwx)
        image = _images.get(key)
        if image is not None:
            return image
    data = read_file(path, max(memory_bytes, FILE_LIMIT_BYTES))
    image = _parse(path, data, memory_bytes, base, rwx)
    if key is not None and len(data) <= _REMEMBERED_BYTES:
        if len(_images) >= _MAX_REMEMBERED:
            _images.clear()
        _images[key] = image
    return image


def _parse(path: str, data: bytes, memory_bytes: int, base: int | None, rwx: bool) -> Image:
    if not data.startswith(elf.ELF_MAGIC):
        return _read_flat(path, data, memory_bytes, base)
    if base is not None:
        raise ImageError(path, "an ELF, which says itself where it goes", "leave out --base")
    entry, headers = elf.read_headers(path, data)
    segments = _place(path, headers, rwx)
    _check_addresses(path, segments, memory_bytes)
    check_entry(path, segments, entry)
    return Image(path, data, segments, entry, "elf")


def explain(source: str | os.PathLike[str] | bytes) -> str:
    """Return what a file is, for a person, also where `read_image` rejects it.

    Args:
        source: Path of the file, or its contents.

    Raises:
        ImageNotFoundError: The file cannot be read.
        ImageError: It is far too large to be a guest image.
    """
    if isinstance(source, bytes):
        path, data = "<bytes>", source
    else:
        path = os.fspath(source)
        data = read_file(path, FILE_LIMIT_BYTES)
    if data.startswith(elf.ELF_MAGIC):
        return elf.describe(path, data)
    return f"{path}: {len(data)} bytes, not an ELF{looks_like(data)}"


def _not_an_elf(path: str, data: bytes) -> ImageError:
    if not data:
        return ImageError(path, "the file is empty", "build it again")
    return ImageError(
        path,
        f"not an ELF{looks_like(data)}",
        "build a static x86-64 ELF; if it is a flat binary, say where it goes with --base ADDR",
    )


def _read_flat(path: str, data: bytes, memory_bytes: int, base: int | None) -> Image:
    if base is None or not data:
        raise _not_an_elf(path, data)
    segment = Segment(base, base + len(data), ANY_ACCESS, 0, len(data), name="flat binary")
    _check_addresses(path, [segment], memory_bytes)
    return Image(path, data, [segment], base, "flat")


def _place(path: str, headers: list[elf.ProgramHeader], rwx: bool) -> list[Segment]:
    # Tools that know no physical addresses leave p_paddr zero everywhere; then p_vaddr counts.
    has_paddr = any(h.paddr for h in headers)
    segments: list[Segment] = []
    for h in headers:
        if has_paddr and h.paddr != h.vaddr:
            raise ImageError(
                path,
                f"segment {h.index} is linked to run at {h.vaddr:#x} (p_vaddr) but to be loaded at "
                f"{h.paddr:#x} (p_paddr)",
                "the boot page tables map guest memory to its own addresses only: link it where it "
                "is loaded, without AT() or a higher-half base",
            )
        segments.append(
            Segment(
                h.vaddr,
                h.vaddr + h.memory_bytes,
                ANY_ACCESS if rwx else PERMS[h.flags & 7],
                h.offset,
                h.file_bytes,
                name=f"segment {h.index}",
            )
        )
    # The gABI asks for this order; linker scripts need not keep it.
    segments.sort(key=_START)
    return segments


def _check_addresses(path: str, segments: list[Segment], memory_bytes: int) -> None:
    before: Segment | None = None
    for segment in segments:
        start, end = segment.start, segment.end
        if start < PAGE_BYTES or end > memory_bytes:
            raise _misplaced(path, segment, segments[-1].end, memory_bytes)
        if before is not None and start < before.end:
            raise overlap(path, before, segment)
        before = segment


def overlap(path: str, before: Segment, segment: Segment) -> ImageError:
    """Return the error of two segments that share bytes, the lower one first."""
    start, end = segment.start, segment.end
    return ImageError(
        path,
        f"{before.name} and {segment.name} overlap: [{before.start:#x}, {before.end:#x}) "
        f"and [{start:#x}, {end:#x}) share {min(before.end, end) - start} bytes",
        "give each section addresses of its own in the linker script",
    )


def _misplaced(path: str, segment: Segment, image_end: int, memory_bytes: int) -> ImageError:
    where = f"{segment.name} [{segment.start:#x}, {segment.end:#x})"
    if segment.end > ADDRESS_LIMIT:
        return ImageError(
            path,
            f"{where} wraps around the end of the 64-bit address space",
            "the program header is damaged, or the linker script is wrong",
        )
    if segment.start < PAGE_BYTES:
        return ImageError(
            path,
            f"{where} covers page 0, which is never mapped, so that null pointers fault",
            f"link it (or set --base) at {PAGE_BYTES:#x} or above; 0x100000 is usual",
        )
    # Ask once for enough for the whole image.
    needed = align_up(max(segment.end, image_end), HUGE_PAGE_BYTES)
    return ImageError(
        path,
        f"{where} lies outside guest memory, which ends at {memory_bytes:#x} "
        f"({format_bytes(memory_bytes)})",
        f"give the guest more: --memory {needed >> 20}M at least"
        if needed <= _MEMORY_LIMIT
        else "link it at a low address, such as 0x100000",
    )


def check_entry(path: str, segments: list[Segment], entry: int) -> None:
    """Reject an entry that cannot be executed.

    Raises:
        ImageError: It lies outside every segment, or in one that forbids execution.
    """
    for segment in segments:
        if segment.start <= entry < segment.end:
            if segment.perms & EXECUTE:
                return
            raise ImageError(
                path,
                f"the entry {entry:#x} lies in {segment.name}, whose permissions "
                f"{access_str(segment.perms)} forbid execution",
                "put the entry into an executable section, or give --rwx",
            )
    raise ImageError(
        path,
        f"the entry {entry:#x} lies outside every segment: "
        + ", ".join(f"[{s.start:#x}, {s.end:#x})" for s in segments[:8]),
        "name the entry symbol, a global one: ENTRY(_start) in the linker script, or ld -e _start",
    )
