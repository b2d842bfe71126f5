"""kvmmm's own pages in a guest, in one slot just above its memory; always resident and writable.

    offset    what                                                    ring 3
    0x00000   console control, test report, boot info, regions, args  read-write
    0x02000   IDT                                                     -
    0x03000   GDT, TSS with I/O bitmap, exception stubs               -
    0x04000   ring-0 and IST stack, growing down from 0x06000         -
    0x06000   console input ring, 4 KiB                               read-write
    0x10000   console output ring, 128 KiB                            read-write
    0x30000   page tables                                             -

What a CPU walks or pushes to must not fault: KVM would emulate the guest's instruction with the
table's address for its operand (seen with nested paging). Hence one slot of its own, registered at
once.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any, TypeVar

from kvmmm.arena.memfd import data_runs
from kvmmm.errors import ImageError, StateError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.hostarch.addr import GIANT_PAGE_BYTES, HUGE_PAGE_BYTES, PAGE_BYTES, align_up
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import boot
from kvmmm.safemem.ffi import ffi, lib
from kvmmm.vmm.boot_tables import TableImage, TableRoom

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmmm.arena import Arena
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.pagetables import PageTables
    from kvmmm.platform.kvm.trial import Trial

MEMORY_NAME, IMAGE_NAME = "[memory]", "[image]"
"""Names of guest memory's vmas: free for the guest, or a loaded segment."""

CONSOLE_OFFSET = 0x0
REPORT_OFFSET = 0x100
BOOT_INFO_OFFSET = 0x140
REGIONS_OFFSET = 0x200
IDT_OFFSET = 0x2000
GDT_OFFSET = 0x3000
TSS_OFFSET = 0x3100
STUBS_OFFSET = 0x3400
IST_TOP_OFFSET = 0x6000
INPUT_OFFSET = 0x6000
INPUT_BYTES = 0x1000
OUTPUT_OFFSET = 0x10000
OUTPUT_BYTES = 0x20000
TABLES_OFFSET = 0x30000

_USER_PARTS = ((0, IDT_OFFSET), (INPUT_OFFSET, INPUT_BYTES), (OUTPUT_OFFSET, OUTPUT_BYTES))
_KERNEL_PARTS = (
    (IDT_OFFSET, GDT_OFFSET - IDT_OFFSET, READ_WRITE),
    (GDT_OFFSET, 0x1000, READ | WRITE | EXECUTE),
    (0x4000, IST_TOP_OFFSET - 0x4000, READ_WRITE),
)
T = TypeVar("T")

_REGION = struct.Struct("<QQII")
_CONSOLE_HEAD = struct.Struct("<QQII")


def system_area_bytes(memory_bytes: int) -> int:
    """Return how large the area of a guest with that much memory is.

    2 MiB hold the fixed part and 460 tables; a page directory a GiB and some 4 KiB tables fit for
    hundreds of GiB, and larger guests get more.
    """
    tables = memory_bytes // GIANT_PAGE_BYTES + 64
    return align_up(TABLES_OFFSET + tables * PAGE_BYTES, HUGE_PAGE_BYTES)


class SystemArea:
    """The pages themselves, and the layout in them.

    Attributes:
        start: Guest-physical (and, under the boot tables, virtual) address of the first page.
        end: One past the last.
        file_range: The arena frames behind it.
        image: What the boot page tables should hold; None before `build_tables`.
    """

    __slots__ = (
        "_giant_pages", "_layout", "_tables", "_view", "arena", "end", "file_range", "image",
        "start",
    )  # fmt: skip

    def __init__(
        self, arena: Arena, file_range: FileRange, start: int, *, giant_pages: bool
    ) -> None:
        self.arena = arena
        self.start = start
        self.end = start + file_range.length_bytes
        self.file_range = file_range
        self._view = arena.view_of(self.file_range)
        self._giant_pages = giant_pages
        self.image: TableImage | None = None
        self._tables: PageTables | None = None
        self._layout: boot.BootLayout | None = None

    @property
    def hva(self) -> int:
        """Host address of the first byte."""
        return self.arena.hva + self.file_range.start

    @property
    def boot_info_gpa(self) -> int:
        """Guest address of struct kvmmm_boot_info."""
        return self.start + BOOT_INFO_OFFSET

    def read(self, gpa: int, length_bytes: int) -> bytes:
        """Return bytes of the area; empty where the range does not lie inside it."""
        offset = gpa - self.start
        if offset < 0 or gpa + length_bytes > self.end:
            return b""
        return bytes(self._view[offset : offset + length_bytes])

    def layout(self) -> boot.BootLayout:
        """Return what a CPU's start state needs; the tables must have been built."""
        if self._layout is None:
            raise StateError("the boot tables have not been built")
        return self._layout

    def copy_to(self, file_range: FileRange) -> SystemArea:
        """Return a copy in other frames, at the same guest addresses, with its output ring empty.

        Args:
            file_range: Fresh frames of the same arena, as many.
        """
        copy = SystemArea(self.arena, file_range, self.start, giant_pages=self._giant_pages)
        by = file_range.start - self.file_range.start
        for start, stop in data_runs(self.arena.fd, self.file_range.start, self.file_range.end):
            os.pwrite(self.arena.fd, self.arena.view[start:stop], start + by)
        copy._layout = self._layout
        if self.image is not None:
            copy._take_image(self.image)
        console = copy._console()
        console.out_tail = console.out_head
        return copy

    @property
    def output_head(self) -> int:
        """How many bytes the guest says that it has put into the output ring."""
        return int(self._console().out_head)

    def reopen_input(self) -> None:
        """Take back that no more input comes."""
        self._console().in_eof = 0

    def _put(self, offset: int, content: bytes) -> None:
        # Into pages that nobody has touched, pwrite(2) is twice as fast as a copy to the mapping.
        os.pwrite(self.arena.fd, content, self.file_range.start + offset)

    # ---- page tables ----

    @property
    def tables(self) -> PageTables | None:
        """The boot page tables where they lie, to look at; None before `build_tables`.

        Edits of them are for experiments: the guest can write there, and `BootTables` knows nothing
        of them.
        """
        if self._tables is None and self.image is not None:
            hva = self.hva + TABLES_OFFSET
            self._tables = TableRoom(self.image, self._view[TABLES_OFFSET:], hva).adopt(self.image)
        return self._tables

    def build_tables(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Build the boot tables, once, before the guest runs: gva == gpa, permissions of the vmas.

        Args:
            ranges: [start, end) and access bits, ascending. User-accessible, so that a guest may
                drop to ring 3; page 0 is nobody's.
        """
        wanted = (tuple(ranges), self.start, self.end, self._giant_pages)
        image = _images.get(wanted)
        if image is None:
            first = self.start + TABLES_OFFSET
            image = TableImage(first, self.end, giant_pages=self._giant_pages)
            image = image.mapping(self._parts(ranges))
            _remember(_images, wanted, image)
        self._put(TABLES_OFFSET, image.content)
        self._take_image(image)
        self._layout = boot.BootLayout(
            root_gpa=image.first_gpa,
            gdt_gpa=self.start + GDT_OFFSET,
            idt_gpa=self.start + IDT_OFFSET,
            tss_gpa=self.start + TSS_OFFSET,
            stubs_gpa=self.start + STUBS_OFFSET,
            ist_top_gpa=self.start + IST_TOP_OFFSET,
        )

    def image_of(self, ranges: Sequence[tuple[int, int, int]]) -> TableImage:
        """Return what the tables should hold for such ranges, by way of what they hold now.

        Raises:
            StateError: There is no room for so many tables, or none have been built.
        """
        if self.image is None:
            raise StateError("the boot tables have not been built")
        return self.image.mapping(self._parts(ranges))

    def change_tables(self, image: TableImage, changes: Sequence[tuple[int, bytes]]) -> None:
        """Write what `image` has changed.

        Preconditions:
            - No CPU walks the tables meanwhile.
        """
        for offset, content in changes:
            at = TABLES_OFFSET + offset
            self._view[at : at + len(content)] = content
        self._take_image(image)

    def _take_image(self, image: TableImage) -> None:
        self.image = image
        self._tables = None

    def _parts(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        return [*_guest_parts(ranges), *self._own_parts()]

    def _own_parts(self) -> Iterator[tuple[int, int, int]]:
        user = flags_of(READ_WRITE, user=True)
        for offset, length in _USER_PARTS:
            yield self.start + offset, self.start + offset + length, user
        for offset, length, perms in _KERNEL_PARTS:
            yield self.start + offset, self.start + offset + length, flags_of(perms, user=False)
        yield self.start + TABLES_OFFSET, self.end, flags_of(READ_WRITE, user=False)

    # ---- what the guest reads ----

    def write_head(
        self, memory_map: tuple[tuple[int, int, int, str], ...], command_line: str,
        memory_bytes: int, stack_top: int, features: int, tsc_hz: int,
    ) -> None:  # fmt: skip
        """Write boot information, console control, IDT, GDT, TSS and stubs.

        Args:
            memory_map: (start, end, perms, name) of all guest memory, ascending; the area is added.
            command_line: Handed to the guest as NUL-terminated UTF-8.
            memory_bytes: What the boot tables map.
            stack_top: Initial stack pointer.
            features: KVMMM_CPU_* bits.
            tsc_hz: TSC frequency, or 0.

        Raises:
            ImageError: The command line and the memory map do not fit.
        """
        wanted = (
            self.start, memory_map, command_line, memory_bytes, stack_top, features, tsc_hz,
        )  # fmt: skip
        head = _heads.get(wanted)
        if head is None:
            head = self._head(*wanted[1:])
            _remember(_heads, wanted, head)
        self._put(0, head)

    def _head(
        self, memory_map: tuple[tuple[int, int, int, str], ...], command_line: str,
        memory_bytes: int, stack_top: int, features: int, tsc_hz: int,
    ) -> bytes:  # fmt: skip
        """The pages up to the stubs: what the guest reads, and the descriptor tables."""
        start = self.start
        regions = b"".join(
            _REGION.pack(begin, end, _REGION_IMAGE if name == IMAGE_NAME else _REGION_RAM, perms)
            for begin, end, perms, name in memory_map
        ) + _REGION.pack(start, self.end, _REGION_SYSTEM, READ_WRITE)
        text = command_line.encode() + b"\0"
        room = IDT_OFFSET - REGIONS_OFFSET - len(regions)
        if len(text) > room:
            reason = f"{len(text) - 1} bytes are too many: {max(room - 1, 0)} fit"
            raise ImageError("command line", reason)
        text_offset = REGIONS_OFFSET + len(regions)
        info = _BOOT_INFO.pack(
            lib.KVMMM_ABI_MAGIC, lib.KVMMM_ABI_VERSION, _BOOT_INFO.size, memory_bytes,
            start + REGIONS_OFFSET, len(memory_map) + 1, len(text) - 1, start + text_offset,
            start + CONSOLE_OFFSET, start + REPORT_OFFSET, stack_top, features, tsc_hz,
        )  # fmt: skip
        console = _CONSOLE_HEAD.pack(
            start + OUTPUT_OFFSET, start + INPUT_OFFSET, OUTPUT_BYTES, INPUT_BYTES
        )
        stubs_gpa, tss_gpa = start + STUBS_OFFSET, start + TSS_OFFSET
        head = bytearray(STUBS_OFFSET + boot.STUBS_BYTES)
        for offset, content in (
            (CONSOLE_OFFSET, console),
            (BOOT_INFO_OFFSET, info),
            (REGIONS_OFFSET, regions + text),
            (IDT_OFFSET, boot.idt(stubs_gpa)),
            (GDT_OFFSET, boot.gdt(tss_gpa)),
            (TSS_OFFSET, boot.tss(start + IST_TOP_OFFSET)),
            (STUBS_OFFSET, boot.STUBS),
        ):
            head[offset : offset + len(content)] = content
        return bytes(head)

    def _console(self) -> Any:  # noqa: ANN401 - a cffi struct
        return ffi.cast("struct kvmmm_console *", self.hva + CONSOLE_OFFSET)

    def input_room(self) -> int:
        """Return how many bytes fit into the input ring now; 0 when its indexes make no sense."""
        console = self._console()
        used = int(console.in_head) - int(console.in_tail)
        return INPUT_BYTES - used if 0 <= used <= INPUT_BYTES else 0

    def put_input(self, chunk: bytes) -> None:
        """Append to the input ring; the caller has asked for `input_room`."""
        console = self._console()
        head = int(console.in_head)
        at = head % INPUT_BYTES
        first = min(len(chunk), INPUT_BYTES - at)
        ring = self._view[INPUT_OFFSET : INPUT_OFFSET + INPUT_BYTES]
        ring[at : at + first] = chunk[:first]
        ring[: len(chunk) - first] = chunk[first:]
        console.in_head = (head + len(chunk)) % (1 << 64)  # the guest may write there, too

    def end_input(self) -> None:
        """Tell the guest that no more input comes."""
        self._console().in_eof = 1

    def test_report(self) -> tuple[int, int]:
        """Return (passed, failed) as the guest counts them in struct kvmmm_report."""
        passed, failed = struct.unpack_from("<II", self._view, REPORT_OFFSET)
        return passed, failed

    def close(self) -> None:
        """Drop the tables and every view of the arena; the frames go with it."""
        self._tables = None
        self._view.release()


def _guest_parts(ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    for start, end, perms in ranges:
        flags = flags_of(perms, user=True)
        if flags:
            yield start, end, flags


_MAX_REMEMBERED = 16
_images: dict[object, TableImage] = {}
_heads: dict[object, bytes] = {}
"""Boot tables, and heads of the area, by all that they depend on. Pure caches: a race makes one
twice."""


def _remember(cache: dict[object, T], key: object, content: T) -> None:
    if len(cache) >= _MAX_REMEMBERED:
        cache.clear()
    cache[key] = content


# struct kvmmm_boot_info, field by field; a test holds it to the compiler's layout.
_BOOT_INFO = struct.Struct("<QIIQQIIQQQQQQ")
_REGION_RAM, _REGION_IMAGE = lib.KVMMM_REGION_RAM, lib.KVMMM_REGION_IMAGE
_REGION_SYSTEM = lib.KVMMM_REGION_SYSTEM


def cpu_features(trial: Trial, *, giant_pages: bool) -> int:
    """Return the KVMMM_CPU_* bits of what a guest can use."""
    features = lib.KVMMM_CPU_SSE
    features |= lib.KVMMM_CPU_AVX if trial.has_avx else 0
    features |= lib.KVMMM_CPU_FSGSBASE if trial.has_fsgsbase else 0
    return features | (lib.KVMMM_CPU_1GIB if giant_pages else 0)
