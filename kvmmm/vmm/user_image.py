"""Programs for ring 3 as values: static ELF64 executables, as Linux loads them.

    ET_EXEC   goes where it was linked
    ET_DYN    a static-pie: goes to `PIE_BASE`, and relocates itself

Both are checked by the same rules as guest kernels' images (`image`), with these differences:
there is an address space of 47 bits to place them in, physical addresses do not matter, a dynamic
section may be there, and the program has to be told where its program headers are (AT_PHDR).

Source: Linux fs/binfmt_elf.c, load_elf_binary; System V ABI, AMD64 supplement, 3.4.
"""

from __future__ import annotations

import os
import struct
from operator import attrgetter
from typing import TYPE_CHECKING

from kvmmm.errors import ImageError
from kvmmm.hostarch.access import EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import page_up
from kvmmm.vmm import elf
from kvmmm.vmm.image import PERMS, Image, Segment, check_entry, overlap
from kvmmm.vmm.image_file import FILE_LIMIT_BYTES, looks_like, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator

PIE_BASE = 0x5555_5555_4000
"""Where a static-pie goes: where Linux puts programs when it does not randomise."""

MIN_ADDR = 0x1_0000
"""The lowest address that a program may use: vm.mmap_min_addr of most distributions."""
MAX_ADDR = (1 << 47) - 4096
"""One past the highest (Linux TASK_SIZE)."""

_TYPES = (elf.ET_EXEC, elf.ET_DYN)
_START = attrgetter("start")
_OSABI_OFFSET = 7
_OSABI_LINUX = 3
_NOTE = struct.Struct("<III")
_NT_GNU_ABI_TAG = 1
_USE_STATIC = "nothing here links at run time: link it with -static or -static-pie"


class UserImage(Image):
    """A program that was found good. Treat it as immutable.

    Attributes:
        bias: What is added to the addresses it is linked at, which those of `Image` are.
        phdr_addr: Address of its program headers in memory, bias included; 0 where not loaded.
        n_phdrs: How many.
        stack_perms: What its stack allows (PT_GNU_STACK).
    """

    __slots__ = ("bias", "n_phdrs", "phdr_addr", "stack_perms")

    def __init__(
        self, path: str, data: bytes, segments: list[Segment], entry: int, *, bias: int,
        phdr_addr: int, n_phdrs: int, stack_perms: int,
    ) -> None:  # fmt: skip
        super().__init__(path, data, segments, entry, "elf")
        self.bias = bias
        self.phdr_addr = phdr_addr
        self.n_phdrs = n_phdrs
        self.stack_perms = stack_perms

    @property
    def entry_addr(self) -> int:
        """Address of the first instruction, bias included."""
        return self.entry + self.bias

    @property
    def brk_start(self) -> int:
        """Where the heap begins: behind the last segment."""
        return page_up(self.segments[-1].end) + self.bias


def read_user_image(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> UserImage:
    """Return the program in a file or in bytes.

    Args:
        source: Path of the file, or its contents.

    Raises:
        ImageNotFoundError: The file cannot be read.
        ImageError: It cannot be loaded; `reason` says why, `remedy` what to do.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _parse("<bytes>", bytes(source))
    path = os.fspath(source)
    return _parse(path, read_file(path, FILE_LIMIT_BYTES))


def is_linux_program(data: bytes) -> bool:
    """Return whether an ELF says that it is a program for Linux; guest kernels do not.

    It does by its ABI note (NT_GNU_ABI_TAG, which every C library's start code brings along), by
    EI_OSABI, or by asking for an interpreter.

    Args:
        data: The file; anything at all.
    """
    if not data.startswith(elf.ELF_MAGIC):
        return False
    try:
        _entry, table_offset, count = elf.read_file_header("", data, _TYPES)
    except ImageError:
        return False
    if data[_OSABI_OFFSET] == _OSABI_LINUX:
        return True
    for kind, _flags, offset, _vaddr, _paddr, n_bytes, _memory, _align in _program_headers(
        data, table_offset, count
    ):
        if kind == elf.PT_INTERP:
            return True
        if kind == elf.PT_NOTE and _has_abi_tag(data[offset : offset + n_bytes]):
            return True
    return False


def _has_abi_tag(notes: bytes) -> bool:
    # Names and descriptions are padded to 4 bytes; in some property notes to 8, which come last.
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, description_bytes, kind = _NOTE.unpack_from(notes, at)
        at += _NOTE.size
        name = notes[at : at + name_bytes]
        at += (name_bytes + 3) & ~3
        if (kind, name) == (_NT_GNU_ABI_TAG, b"GNU\0"):
            return notes[at : at + 4] == bytes(4)  # 0 is Linux
        at += (description_bytes + 3) & ~3
    return False


def _program_headers(data: bytes, table_offset: int, count: int) -> Iterator[tuple[int, ...]]:
    for index in range(count):
        yield elf.PHDR.unpack_from(data, table_offset + index * elf.PHDR.size)


def _parse(path: str, data: bytes) -> UserImage:
    if not data.startswith(elf.ELF_MAGIC):
        raise ImageError(
            path,
            f"not an ELF{looks_like(data)}",
            "build a static x86-64 program: gcc -static, or musl-gcc -static",
        )
    entry, table_offset, count = elf.read_file_header(path, data, _TYPES)
    bias = PIE_BASE if data[16] == elf.ET_DYN else 0
    segments: list[Segment] = []
    phdr_vaddr = None
    stack_perms = READ_WRITE
    for index, fields in enumerate(_program_headers(data, table_offset, count)):
        kind = fields[0]
        if kind == elf.PT_LOAD:
            header = elf.load_header(path, data, index, fields)
            if header.memory_bytes:
                segments.append(_segment(header))
            if header.offset <= table_offset < header.offset + header.file_bytes:
                phdr_vaddr = table_offset - header.offset + header.vaddr
        elif kind == elf.PT_INTERP:
            raise ImageError(
                path,
                "a dynamic executable: it asks for the interpreter "
                f"{elf.interpreter(data, fields)} (PT_INTERP)",
                _USE_STATIC,
            )
        elif kind == elf.PT_GNU_STACK and fields[1] & elf.PF_X:
            stack_perms = READ_WRITE | EXECUTE
    if not segments:
        raise elf.nothing_to_load(path, count)
    segments.sort(key=_START)
    _check_addresses(path, segments, bias)
    check_entry(path, segments, entry)
    return UserImage(
        path, data, segments, entry, bias=bias, n_phdrs=count, stack_perms=stack_perms,
        phdr_addr=0 if phdr_vaddr is None else phdr_vaddr + bias,
    )  # fmt: skip


def _segment(header: elf.ProgramHeader) -> Segment:
    return Segment(
        header.vaddr, header.vaddr + header.memory_bytes, PERMS[header.flags & 7], header.offset,
        header.file_bytes, name=f"segment {header.index}",
    )  # fmt: skip


def _check_addresses(path: str, segments: list[Segment], bias: int) -> None:
    before: Segment | None = None
    for segment in segments:
        start, end = segment.start + bias, segment.end + bias
        if start < MIN_ADDR:
            raise ImageError(
                path,
                f"{segment.name} [{start:#x}, {end:#x}) begins below {MIN_ADDR:#x}, where no "
                "program may be, so that null pointers fault",
                "link it at 0x400000, as ld does by itself; or is it a guest kernel? (--kernel)",
            )
        if end > MAX_ADDR:
            raise ImageError(
                path,
                f"{segment.name} [{start:#x}, {end:#x}) lies above the {MAX_ADDR:#x} where "
                "programs end",
                "link it at 0x400000, as ld does by itself",
            )
        if before is not None and segment.start < before.end:
            raise overlap(path, before, segment)
        before = segment
