"""The table of kvmmm/mm/copies.md: read from the page, and what its words mean.

`CONDITIONS` prepares what a row's first cell says; `OPERATIONS` does what its second one names.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import kvmmm.mm
from kvmmm.arena import Arena
from kvmmm.hostarch.access import NO_ACCESS, READ
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.memmap.host_file import HostFile
from tests.mm.family import HUGE, MAX, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE_PATH = Path(kvmmm.mm.__file__).with_name("copies.md")

N, K = 64, 24
FILL = bytes(1 + i % 251 for i in range(4 * PAGE))
"""What accessible guest memory holds: no NUL in it."""
NEW = bytes(255 - i for i in range(N))
"""What is written: no byte is what was there, as addresses are chosen here."""
UNTOUCHED = 0x7F
START = 8 * HUGE


class Row(NamedTuple):
    condition: str
    operation: str
    moved: str
    error: str
    addr: str
    done: str


def rows(text: str) -> Iterator[Row]:
    """The table, one operation a row."""
    kinds = {
        kind: re.findall(r"`([^`]+)`", names)
        for kind, names in re.findall(r"^- \*(\w+)\*: (.*)$", text, re.MULTILINE)
    }
    table = text[text.index("| condition |") :].splitlines()[2:]
    for line in table:
        if not line.startswith("|"):
            break
        condition, operations, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in operations.split(", "):
            for operation in [name.strip("`")] if "`" in name else kinds[name.strip("*")]:
                yield Row(condition, operation, *(cell.strip("`") for cell in rest))


class Ground:
    """Four pages of guest memory, filled, and where in it a row looks.

    Attributes:
        addr, n_bytes, before: n bytes at addr, of which k come before what is wrong.
        options: For the operation.
        buffer: The host's buffer, unless it is the usual one.
    """

    def __init__(self, tmp_path: Path, arena_bytes: int = 16 << 20) -> None:
        self.tmp_path = tmp_path
        self.family = Family(Arena(arena_bytes))
        self.mm: Any = self.family.first.mm
        self.addr, self.n_bytes, self.before = START + PAGE - K, N, K
        self.options: dict[str, Any] = {}
        self.buffer: memoryview | None = None
        self.finally_: list[Callable[[], object]] = []
        self.map(START, START + 4 * PAGE)

    def map(self, start: int, end: int) -> None:
        self.family.first.map(start, end)
        self.mm.copy_out(start, FILL[: end - start])

    def close(self) -> None:
        for end in reversed(self.finally_):
            end()
        self.family.__exit__(None, None, None)

    def content(self) -> dict[int, bytes]:
        """All that is backed, by page."""
        return {
            page: self.mm.read(page, PAGE, ignore_permissions=True)
            for start, end, _ in self.mm.pmas
            for page in range(start, end, PAGE)
        }


# ---- conditions ----


def _at(ground: Ground, addr: int, n_bytes: int = N, before: int = 0) -> None:
    ground.addr, ground.n_bytes, ground.before = addr, n_bytes, before


def _nothing(_: Ground) -> None:
    pass


def _file_ends(ground: Ground) -> None:
    path = ground.tmp_path / "file"
    path.write_bytes(FILL[:PAGE])
    file = HostFile.open(path, writable=True)
    ground.family.first.map(START, START + 2 * PAGE, mappable=file, private=False)
    ground.mm.read(START, 1)
    ground.finally_.append(lambda: (ground.mm.munmap(START, 2 * PAGE), file.close()))


def _no_memory(ground: Ground) -> None:
    ground.mm.munmap(START, 4 * PAGE)
    ground.family.first.map(START, START + 2 * HUGE)
    ground.mm.copy_out(START + HUGE - PAGE, FILL[:PAGE])
    ground.addr = START + HUGE - K
    arena = ground.family.arena
    while arena.statistics().largest_free_bytes:
        fr = arena.allocate(arena.statistics().largest_free_bytes)
        ground.finally_.append(lambda fr=fr: arena.dec_ref(fr))  # type: ignore[misc]


def _buffer_ends(ground: Ground) -> None:
    fd = os.memfd_create("buffer")
    os.ftruncate(fd, 2 * PAGE)
    ground.addr = START
    mapped = mmap.mmap(fd, 2 * PAGE)
    with memoryview(mapped) as view:
        ground.buffer = view[PAGE - K : PAGE - K + N]
        ground.buffer[:K] = NEW[:K]
    os.ftruncate(fd, PAGE)
    os.close(fd)
    ground.finally_ += [mapped.close, ground.buffer.release]


def _inside(ground: Ground) -> None:
    ground.family.first.map(START + HUGE, START + 2 * HUGE)
    _at(ground, START + HUGE)
    token = ground.mm.enter_copy()
    ground.finally_.append(lambda: ground.mm.leave_copy(token))


def _forbid(ground: Ground, perms: int = NO_ACCESS) -> None:
    ground.mm.mprotect(START + PAGE, PAGE, perms)


def _forbid_and_ignore(ground: Ground) -> None:
    _forbid(ground)
    ground.options = {"ignore_permissions": True}


def _forbid_first(ground: Ground) -> None:
    ground.mm.mprotect(START, PAGE, READ)
    _at(ground, START)


def _unmap_first(ground: Ground) -> None:
    ground.mm.munmap(START, PAGE)
    _at(ground, START)


CONDITIONS: dict[str, Callable[[Ground], object]] = {
    "all can be accessed": _nothing,
    "no bytes, nothing mapped there": lambda g: _at(g, START + 8 * PAGE, 0),
    "no bytes, at `max_addr`": lambda g: _at(g, MAX, 0),
    "no bytes, beyond `max_addr`": lambda g: _at(g, MAX + 1, 0),
    "it ends beyond `max_addr`": lambda g: (g.map(MAX - PAGE, MAX), _at(g, MAX - K, N, K)),
    "it begins beyond `max_addr`": lambda g: _at(g, MAX + 1),
    "nothing is mapped at its first byte": _unmap_first,
    "nothing is mapped behind its first *k* bytes": lambda g: g.mm.munmap(START + PAGE, PAGE),
    "a permission is missing there": _forbid,
    "it is read-only there": lambda g: _forbid(g, READ),
    "all of it is read-only": _forbid_first,
    "a permission is missing, with `ignore_permissions`": _forbid_and_ignore,
    "a shared mapping of a file of the host": lambda g: (_file_ends(g), _at(g, START + 5)),
    "its file ends there": _file_ends,
    "no memory is left there": _no_memory,
    "the host's buffer itself faults there": _buffer_ends,
    "the buffer has another length": lambda g: setattr(g, "buffer", memoryview(bytearray(NEW[1:]))),
    "`addr` is not a multiple of 4": lambda g: _at(g, START + 2),
    "no NUL in *n* bytes": _nothing,
    "inside a Reader or Writer, memory that is not there yet": _inside,
}


# ---- operations: each returns what it moved, as bytes, or how many ----


def _parts(g: Ground) -> AddrRangeSeq:
    middle = g.addr + min(5, g.n_bytes)
    return AddrRangeSeq((AddrRange(g.addr, middle), AddrRange(middle, g.addr + g.n_bytes)))


def _file(g: Ground, writable: bool = False) -> Any:
    return g.mm.open(AddrRange(g.addr, g.addr + g.n_bytes), writable, **g.options)


def _in_many(g: Ground, _dst: memoryview) -> bytes:
    # An empty pair first: each pair's range is checked when its turn comes.
    return b"".join(g.mm.copy_in_many([(g.addr, 0), (g.addr, g.n_bytes)], **g.options))


def _out_many(g: Ground, src: memoryview) -> int:
    done: int = g.mm.copy_out_many([(g.addr, b""), (g.addr, src)], **g.options)
    return done


def _pin(g: Ground, _dst: memoryview) -> bytes:
    with g.mm.pin(g.addr, g.n_bytes) as view:
        return bytes(view)


def _set_item(g: Ground, src: memoryview) -> int:
    g.mm[g.addr : g.addr + g.n_bytes] = src
    return len(src)


READS: dict[str, Callable[[Ground, memoryview], Any]] = {
    "copy_in": lambda g, dst: dst[: g.mm.copy_in(g.addr, dst, **g.options)],
    "read": lambda g, _: g.mm.read(g.addr, g.n_bytes, **g.options),
    "copy_in_vec": lambda g, dst: dst[: g.mm.copy_in_vec(_parts(g), dst, **g.options)],
    "copy_in_many": _in_many,
    "copy_in_to": lambda g, dst: dst[: g.mm.copy_in_to(_parts(g), dst, **g.options)],
    "read_int": lambda g, _: g.mm.read_int(g.addr, g.n_bytes, **g.options).to_bytes(N, "little"),
    "read_struct": lambda g, _: g.mm.read_struct(g.addr, f"{g.n_bytes}s", **g.options)[0],
    "mm[a:b]": lambda g, _: g.mm[g.addr : g.addr + g.n_bytes],
    "file.readall": lambda g, _: _file(g).readall(),
    "file.read": lambda g, _: _file(g).read(N),
    "file.readinto": lambda g, dst: dst[: _file(g).readinto(dst)],
    "read_string": lambda g, _: g.mm.read_string(g.addr, g.n_bytes, **g.options),
    "load_uint32": lambda g, _: g.mm.load_uint32(g.addr, **g.options).to_bytes(4, "little"),
    "pin": _pin,
}
WRITES: dict[str, Callable[[Ground, memoryview], int]] = {
    "copy_out": lambda g, src: g.mm.copy_out(g.addr, src, **g.options),
    "write": lambda g, src: g.mm.write(g.addr, src, **g.options),
    "zero_out": lambda g, _: g.mm.zero_out(g.addr, g.n_bytes, **g.options),
    "copy_out_vec": lambda g, src: g.mm.copy_out_vec(_parts(g), src, **g.options),
    "copy_out_many": _out_many,
    "copy_out_from": lambda g, src: g.mm.copy_out_from(_parts(g), src, **g.options),
    "write_int": lambda g, src: g.mm.write_int(
        g.addr, int.from_bytes(src, "little"), g.n_bytes, **g.options
    ),
    "write_struct": lambda g, src: g.mm.write_struct(
        g.addr, f"{g.n_bytes}s", (bytes(src),), **g.options
    ),
    "mm[a:b] =": _set_item,
    "file.write": lambda g, src: _file(g, writable=True).write(src),
    "swap_uint32": lambda g, src: g.mm.swap_uint32(
        g.addr, int.from_bytes(src[:4], "little"), **g.options
    ) and 4,
    "compare_and_swap_uint32": lambda g, src: g.mm.compare_and_swap_uint32(
        g.addr,
        int.from_bytes(FILL[g.addr % PAGE : g.addr % PAGE + 4], "little"),
        int.from_bytes(src[:4], "little"),
        **g.options,
    ) and 4,
}  # fmt: skip
OPERATIONS = READS | WRITES
