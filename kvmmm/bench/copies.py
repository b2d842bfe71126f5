"""`bench copies`: the memory that is copied from and to, and what all its parts have in common.

    copies_small.py    8 and 64 bytes beside slices of an mmap; a vector beside one range
    copies_peers.py    the same copies beside unicorn and process_vm_readv
    copies_large.py    64 KiB and more beside memcpy
    copies_many.py     many pmas beside one; a thread that spins
    copies_cold.py     pages without a pma, and the mirror's first use, beside the same page faults

Names of times: `in` is guest -> host (`copy_in`, `read`), `out` is host -> guest (`copy_out`), and
the number is bytes. Both are measured; the worse one is the value.
"""

from __future__ import annotations

import random
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Self, cast

from kvmmm.arena import Arena
from kvmmm.bench.guest import BenchmarkError
from kvmmm.bench.no_cpu import NoCpu
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.memmap.file import Translation
from kvmmm.memmap.mapping_set import Mapped
from kvmmm.mm import MemoryManager
from kvmmm.safemem.ffi import address_of, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from kvmmm.hostarch.ranges import FileRange

FLOOR = cast("Any", lib)
"""The C floors; what `_native/floor.h` declares."""

START = 4 << 20
"""Where guest memory begins here: the lowest address of an ordinary program."""
_WARM_BYTES = 4 << 20


class FixedFrames(Mapped):
    """A mappable with all of its frames from the start, in an order that one may choose.

    Args:
        arena: Whose frames.
        frames: Them, in one piece; whoever allocated them drops them in the end.
        order: Which of them is behind each page; None is one after the other.
    """

    name = "frames"
    max_shared_perms = ANY_ACCESS

    def __init__(self, arena: Arena, frames: FileRange, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self._arena = arena
        self._frames = frames
        self._order = order

    def translate(
        self, required: FileRange, _optional: FileRange, _access: int
    ) -> tuple[list[Translation], OSError | None]:
        """See `kvmmm.memmap.file.Mappable`: what is required, and every access."""
        arena, first, order = self._arena, self._frames.start, self._order
        start, end = required.start, required.end
        if order is None:
            return [Translation(start, end, arena, first + start, ANY_ACCESS)], None
        return [
            Translation(
                page, page + PAGE_BYTES, arena, first + order[page // PAGE_BYTES] * PAGE_BYTES,
                ANY_ACCESS,
            )
            for page in range(start, end, PAGE_BYTES)
        ], None  # fmt: skip

    def msync(self, start: int, end: int) -> None:
        """Do nothing."""


class GuestMemory:
    """Guest memory at START that is backed, resident in the host, and has been copied before.

    A context manager. All of it is filled with one byte after the other, 0 to 255.

    Args:
        length_bytes: How much, whole pages.
        order: Which frame is behind which page; None is one pma.

    Attributes:
        mm: The address space.
        arena: Where the frames are.
        frames: Which.
    """

    def __init__(self, length_bytes: int, order: Sequence[int] | None = None) -> None:
        self.length_bytes = length_bytes
        self.arena = Arena(length_bytes)
        self.frames = self.arena.allocate(length_bytes, align_bytes=HUGE_PAGE_BYTES)
        self._mms: list[MemoryManager] = []
        with self.arena.view_of(self.frames) as view:
            piece = bytes(range(256)) * (PAGE_BYTES // 256)
            for at in range(0, length_bytes, PAGE_BYTES):
                view[at : at + PAGE_BYTES] = piece
        self.mm = self.map_again(order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        for mm in self._mms:
            mm.close()
        self.arena.dec_ref(self.frames)
        self.arena.close()

    def map_again(self, order: Sequence[int] | None) -> MemoryManager:
        """Return an mm over the same frames; it is closed with the others."""
        mm = MemoryManager(self.arena, NoCpu(START + self.length_bytes))
        self._mms.append(mm)
        mappable = FixedFrames(self.arena, self.frames, order)
        mm.mmap(
            self.length_bytes, READ_WRITE, addr=START, fixed=True, private=False, mappable=mappable
        )
        mm.populate(START, self.length_bytes)
        n_wanted = 1 if order is None else len(order)
        if len(mm.pmas) != n_wanted:
            raise BenchmarkError(f"{len(mm.pmas)} pmas instead of {n_wanted}")
        for addr in range(START, START + self.length_bytes, _WARM_BYTES):
            mm.read(addr, min(_WARM_BYTES, START + self.length_bytes - addr))
        return mm

    def hva_of(self, addr: int) -> int:
        """Return the host address of a guest address, where there is one pma."""
        return self.arena.hva + self.frames.start + addr - START

    def addresses(self, n: int, n_bytes: int) -> list[int]:
        """Return random guest addresses, multiples of 8, that have so many bytes."""
        return random.choices(range(START, START + self.length_bytes - n_bytes + 1, 8), k=n)


def empty_loop(items: Iterable[object], repeats: int) -> int:
    """Return the ns that going through `items` takes when nothing is done with them."""
    start_ns = perf_counter_ns()
    for _ in range(repeats):
        for _item in items:
            pass
    return perf_counter_ns() - start_ns


def empty_pair_loop(items: Iterable[tuple[int, int]], repeats: int) -> int:
    """Return the same for pairs, each taken apart."""
    start_ns = perf_counter_ns()
    for _ in range(repeats):
        for _a, _b in items:
            pass
    return perf_counter_ns() - start_ns


def by_memcpy(hvas: Sequence[int], buffer: bytearray, *, out: bool) -> int:
    """Copy between each host address and all of a buffer in C; returns ns.

    Args:
        hvas: Where.
        buffer: What is filled, or with `out` what is stored.
        out: Host -> guest.
    """
    with_hvas = ffi.new("uint64_t[]", list(hvas))
    host = address_of(ffi.from_buffer(buffer))
    return int(FLOOR.kvmmm_floor_copy(with_hvas, len(hvas), host, len(buffer), out))
