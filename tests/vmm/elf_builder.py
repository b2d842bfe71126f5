"""Builds ELF64 files, good and bad, field by field; shares nothing with the reader."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PT_NULL, PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_TLS = 0, 1, 2, 3, 4, 7
PT_GNU_STACK = 0x6474E551
R, W, X = 4, 2, 1
ET_NONE, ET_REL, ET_EXEC, ET_DYN, ET_CORE = range(5)
TEXT = 0x100000
"""Where the image of `tiny` begins."""

STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_SECTION, STT_FILE = range(5)
STB_LOCAL, STB_GLOBAL = 0, 1
SHN_ABS = 0xFFF1


@dataclass
class Phdr:
    type: int = PT_LOAD
    flags: int = R | X
    offset: int = 0x1000
    vaddr: int = TEXT
    paddr: int | None = None  # as vaddr
    filesz: int = 0x10
    memsz: int | None = None  # as filesz
    align: int = 0x1000

    def pack(self) -> bytes:
        return struct.pack(
            "<IIQQQQQQ",
            self.type,
            self.flags,
            self.offset,
            self.vaddr,
            self.vaddr if self.paddr is None else self.paddr,
            self.filesz,
            self.filesz if self.memsz is None else self.memsz,
            self.align,
        )


@dataclass
class Symbol:
    name: bytes
    value: int
    size: int = 0
    type: int = STT_FUNC
    binding: int = STB_GLOBAL
    section: int = 1

    def pack(self, name_offset: int) -> bytes:
        info = self.binding << 4 | self.type
        return struct.pack("<IBBHQQ", name_offset, info, 0, self.section, self.value, self.size)


@dataclass
class Elf:
    phdrs: list[Phdr] = field(default_factory=lambda: [Phdr()])
    magic: bytes = b"\x7fELF"
    elf_class: int = 2
    byte_order: int = 1
    type: int = ET_EXEC
    machine: int = 62
    version: int = 1
    entry: int = TEXT
    phoff: int = 64
    phentsize: int = 56
    phnum: int | None = None  # as many as there are
    contents: dict[int, bytes] = field(default_factory=dict)  # by file offset
    symbols: list[Symbol] | None = None

    def build(self) -> bytes:
        """Return a file long enough for every segment; what `contents` leaves is 0x90 (nop)."""
        out = bytearray(self._header(0, 0) + b"".join(p.pack() for p in self.phdrs))
        end = max([p.offset + p.filesz for p in self.phdrs] + [len(out)])
        out += b"\x90" * (min(end, 1 << 20) - len(out))
        for offset, data in self.contents.items():
            out[offset : offset + len(data)] = data
        if self.symbols is not None:
            sections, table = self._sections(len(out))
            out[:64] = self._header(len(out) + len(sections), 4)
            out += sections + table
        return bytes(out)

    def _header(self, shoff: int, shnum: int) -> bytes:
        phnum = len(self.phdrs) if self.phnum is None else self.phnum
        return struct.pack(
            "<4sBBBBQHHIQQQIHHHHHH",
            *(self.magic, self.elf_class, self.byte_order, 1, 0, 0),
            *(self.type, self.machine, self.version, self.entry, self.phoff, shoff),
            *(0, 64, self.phentsize, phnum, 64, shnum, 3 if shnum else 0),
        )

    def _sections(self, offset: int) -> tuple[bytes, bytes]:
        # Section 1 is .symtab, 2 .strtab, 3 .shstrtab; returns their bytes and the section headers.
        strings, symtab = b"\0", bytes(24)
        for symbol in self.symbols or []:
            symtab += symbol.pack(len(strings))
            strings += symbol.name + b"\0"
        names = b"\0.symtab\0.strtab\0.shstrtab\0"
        table, at = bytes(64), offset
        for name, kind, data, link in ((1, 2, symtab, 2), (9, 3, strings, 0), (17, 3, names, 0)):
            entry_bytes = 24 if kind == 2 else 0
            table += struct.pack(
                "<IIQQQQIIQQ", name, kind, 0, 0, at, len(data), link, 1, 8, entry_bytes
            )
            at += len(data)
        return symtab + strings + names, table


def tiny(**fields: object) -> bytes:
    """Return a good ELF of one segment (16 bytes of code at `TEXT`), with `fields` changed."""
    return Elf(**fields).build()  # type: ignore[arg-type]
