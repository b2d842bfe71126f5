"""ELF64 headers, read with `struct`: what loading needs, and reasons for what cannot be loaded.

A guest starts in less than a millisecond; pyelftools takes longer to be imported, and again to
parse one file. So loading goes through two precompiled structs, and pyelftools only explains.

    ELF header (64 bytes)
      e_phoff ──► program headers, e_phnum x 56 bytes
                    PT_LOAD    p_offset, p_filesz ──► bytes in the file
                               p_vaddr,  p_memsz  ──► where they go; what the file lacks is zero
                    PT_INTERP, PT_DYNAMIC         ──► wants a dynamic linker: rejected
                    PT_NOTE, PT_TLS, PT_GNU_STACK … are ignored

`user_image` has other rules for programs of ring 3, and shares the pieces.

Segments are numbered as `readelf -l` numbers them: by their place among all program headers.

Source: System V ABI (gABI) chapters 4 and 5; System V ABI, AMD64 supplement, section 4.1.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

from kvmmm.errors import ImageError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

ELF_MAGIC = b"\x7fELF"
PF_X = 1
PF_W = 2
PF_R = 4

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
_MACHINE_END = 20  # e_type at 16 and e_machine at 18 lie alike in ELF32 and ELF64

_CLASS_32 = 1
_CLASS_64 = 2
_LITTLE_ENDIAN = 1
_BIG_ENDIAN = 2
ET_EXEC = 2
ET_DYN = 3
_EM_386 = 3
_EM_X86_64 = 62
PT_LOAD = 1
PT_DYNAMIC = 2
PT_INTERP = 3
PT_NOTE = 4
PT_PHDR = 6
PT_GNU_STACK = 0x6474E551

# Linux takes at most 64 KiB of program headers as well (fs/binfmt_elf.c, load_elf_phdrs).
_PROGRAM_HEADERS_LIMIT = 65536 // PHDR.size

# `describe` is for a person.
_DESCRIBED_LIMIT = 256

_MACHINES = {
    2: "SPARC",
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S/390",
    40: "ARM",
    43: "SPARC V9",
    50: "IA-64",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    247: "eBPF",
    258: "LoongArch",
}
_TYPES = {
    0: ("an ELF without a type (ET_NONE)", "link it as an executable"),
    1: (
        "a relocatable object file (ET_REL), not linked yet",
        "link it: gcc -nostdlib -static -no-pie -o guest.elf guest.o",
    ),
    3: (
        "a dynamic executable, PIE or shared object (ET_DYN): it would have to be relocated",
        "link it with -static -no-pie; a program for Linux that relocates itself runs with --user",
    ),
    4: ("a core dump (ET_CORE), not a program", "give the program that dumped it"),
}
_USE_64 = (
    "build it with -m64 (as --64, ld -m elf_x86_64); if the build ends with objcopy -O elf32-i386, "
    "give the ELF from before that step: a guest starts in 64-bit mode"
)
_USE_X86 = "build it for x86-64, with gcc -m64 or x86_64-linux-gnu-gcc"
_USE_STATIC = "nothing here links at run time: link it with -static -no-pie"
_REBUILD = "copy or build the file again"


class ProgramHeader:
    """A PT_LOAD program header (Elf64_Phdr), as the file has it; addresses are guest addresses."""

    __slots__ = ("file_bytes", "flags", "index", "memory_bytes", "offset", "paddr", "vaddr")

    def __init__(self, index: int, fields: tuple[int, ...]) -> None:
        self.index = index
        (
            _,
            self.flags,
            self.offset,
            self.vaddr,
            self.paddr,
            self.file_bytes,
            self.memory_bytes,
            _,
        ) = fields


def read_headers(path: str, data: bytes) -> tuple[int, list[ProgramHeader]]:
    """Return the entry point and the PT_LOAD headers that hold bytes, in the order of the file.

    Every header returned has its file bytes inside `data`, and no more of them than of memory.
    Whether its addresses make sense is for the caller to say.

    Args:
        path: What messages call the image.
        data: The whole file, which begins with `ELF_MAGIC`.

    Raises:
        ImageError: Not a static x86-64 ELF executable, or a truncated one.
    """
    entry, table_offset, count = read_file_header(path, data)
    headers: list[ProgramHeader] = []
    for index in range(count):
        fields = PHDR.unpack_from(data, table_offset + index * PHDR.size)
        kind = fields[0]
        if kind == PT_LOAD:
            header = load_header(path, data, index, fields)
            if header.memory_bytes:  # linker scripts leave empty segments behind
                headers.append(header)
        elif kind in (PT_INTERP, PT_DYNAMIC):
            why = (
                f"asks for the interpreter {interpreter(data, fields)} (PT_INTERP)"
                if kind == PT_INTERP
                else "has a dynamic section (PT_DYNAMIC)"
            )
            raise ImageError(path, f"a dynamic executable: it {why}", _USE_STATIC)
    if not headers:
        raise nothing_to_load(path, count)
    return entry, headers


def load_header(path: str, data: bytes, index: int, fields: tuple[int, ...]) -> ProgramHeader:
    """Return a PT_LOAD header whose bytes are all in the file.

    Raises:
        ImageError: They are not, or there are more of them than memory for them.
    """
    header = ProgramHeader(index, fields)
    file_bytes = header.file_bytes
    if file_bytes > header.memory_bytes or (file_bytes and header.offset + file_bytes > len(data)):
        raise _bad_extent(path, header, len(data))
    return header


def nothing_to_load(path: str, count: int) -> ImageError:
    """Return the error of an ELF with `count` program headers, none of which loads anything."""
    return ImageError(
        path,
        f"there is nothing to load: of its {count} program headers, none is a PT_LOAD with "
        "bytes in memory",
        "link it as an executable; a linker script with PHDRS must name a PT_LOAD",
    )


def check_ident(path: str, data: bytes, types: tuple[int, ...] = (ET_EXEC,)) -> None:
    """Reject what the first 20 bytes rule out; `data` begins with `ELF_MAGIC`, and may end there.

    Args:
        path: What messages call the image.
        data: The file, or its beginning.
        types: The e_types to accept.

    Raises:
        ImageError: Too short, 32-bit, big-endian, of another machine, or not an executable.
    """
    if len(data) < _MACHINE_END:
        raise _too_short(path, data)
    elf_class, byte_order = data[4], data[5]
    order: Literal["little", "big"] = "big" if byte_order == _BIG_ENDIAN else "little"
    machine = int.from_bytes(data[_MACHINE_END - 2 : _MACHINE_END], order)
    name = _MACHINES.get(machine, f"machine number {machine}")
    if byte_order != _LITTLE_ENDIAN:
        what = (
            "a big-endian ELF" if order == "big" else f"an ELF of unknown byte order {byte_order}"
        )
        raise ImageError(path, f"{what}, for {name}; x86-64 is little-endian", _USE_X86)
    if elf_class != _CLASS_64:
        what = "a 32-bit ELF" if elf_class == _CLASS_32 else f"an ELF of unknown class {elf_class}"
        remedy = _USE_64 if machine in (_EM_386, _EM_X86_64) else _USE_X86
        raise ImageError(path, f"{what}, for {name}; kvmmm runs 64-bit x86-64 guests", remedy)
    if machine != _EM_X86_64:
        raise ImageError(path, f"built for {name}; kvmmm runs x86-64 guests", _USE_X86)
    elf_type = data[16] | data[17] << 8
    if elf_type not in types:
        reason, remedy = _TYPES.get(
            elf_type, (f"an ELF of unknown type {elf_type:#x}", "link it as an executable")
        )
        raise ImageError(path, reason, remedy)


def read_file_header(
    path: str, data: bytes, types: tuple[int, ...] = (ET_EXEC,)
) -> tuple[int, int, int]:
    """Return the entry, and offset and count of the program headers, which then lie inside `data`.

    Raises:
        ImageError: As `check_ident`; or there are none, too many, or they are cut off.
    """
    check_ident(path, data, types)
    if len(data) < _EHDR.size:
        raise _too_short(path, data)
    fields = _EHDR.unpack_from(data)
    entry, table_offset, entry_bytes, count = fields[4], fields[5], fields[9], fields[10]
    if count == 0:
        raise ImageError(
            path, "there is nothing to load: it has no program headers", "link it as an executable"
        )
    if entry_bytes != PHDR.size:
        raise ImageError(
            path,
            f"the file says that a program header has {entry_bytes} bytes (e_phentsize); in ELF64 "
            f"it has {PHDR.size}",
            "the ELF header is damaged",
        )
    if count > _PROGRAM_HEADERS_LIMIT:
        raise ImageError(
            path,
            f"the file says that it has {count} program headers (e_phnum); at most "
            f"{_PROGRAM_HEADERS_LIMIT} are accepted, as by Linux",
            "the ELF header is damaged, or the linker script is wrong",
        )
    table_end = table_offset + count * PHDR.size
    if table_end > len(data):
        raise ImageError(
            path,
            f"truncated: its {count} program headers end at file offset {table_end:#x}, but the "
            f"file ends at {len(data):#x}; {table_end - len(data)} bytes are missing",
            _REBUILD,
        )
    return entry, table_offset, count


def _bad_extent(path: str, header: ProgramHeader, file_end: int) -> ImageError:
    index, file_bytes = header.index, header.file_bytes
    if file_bytes > header.memory_bytes:
        return ImageError(
            path,
            f"segment {index} has more bytes in the file ({file_bytes:#x}) than in memory "
            f"({header.memory_bytes:#x})",
            "the program header is damaged, or the linker script is wrong",
        )
    end = header.offset + file_bytes
    return ImageError(
        path,
        f"truncated: segment {index} has its bytes at file offsets [{header.offset:#x}, {end:#x}), "
        f"but the file ends at {file_end:#x}; {min(file_bytes, end - file_end)} of its "
        f"{file_bytes} bytes are missing",
        _REBUILD,
    )


def _too_short(path: str, data: bytes) -> ImageError:
    return ImageError(
        path,
        f"truncated: it begins like an ELF, but has {len(data)} bytes, and an ELF header alone has "
        f"{_EHDR.size}",
        _REBUILD,
    )


def interpreter(data: bytes, fields: tuple[int, ...]) -> str:
    """Return the name that a PT_INTERP header asks for; for a message only, hence bounded."""
    offset, length_bytes = fields[2], min(fields[5], 128)
    return printable(data[offset : offset + length_bytes].split(b"\0", 1)[0])


def printable(name: bytes | str) -> str:
    """Return a name out of a file as text that no terminal acts on, whatever it holds."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return text if text.isprintable() else ascii(text)[1:-1]


def describe(path: str, data: bytes) -> str:
    """Return what the ELF is, for a person: type, machine, entry, segments and their sections.

    It never rejects: what cannot be read is said in the text.

    Args:
        path: What the text calls the image.
        data: The whole file.
    """
    # pyelftools is as slow to import as it is good at naming things: 55 ms.
    import io

    from elftools.elf.descriptions import describe_e_machine, describe_e_type
    from elftools.elf.elffile import ELFFile

    lines: list[str] = []
    try:
        elf = ELFFile(io.BytesIO(data))
        lines.append(
            f"{path}: ELF{elf.elfclass}, {describe_e_type(elf['e_type'], elf)}, "
            f"{describe_e_machine(elf['e_machine'])}, entry {elf['e_entry']:#x}"
        )
        _describe_segments(elf, lines)
    except Exception as e:  # noqa: BLE001  # a damaged file upsets pyelftools in many ways
        lines.append(f"{path}: the rest cannot be read: {type(e).__name__}: {printable(str(e))}")
    return "\n".join(lines)


def _describe_segments(elf: ELFFile, lines: list[str]) -> None:
    # Appends line by line, so that what came before an error is kept.
    from elftools.elf.descriptions import describe_p_type

    count = elf.num_segments()
    shown = min(count, _DESCRIBED_LIMIT)
    lines.append(
        "segment type          guest addresses              file offsets             perms sections"
    )
    sections = [elf.get_section(i) for i in range(min(elf.num_sections(), _DESCRIBED_LIMIT))]
    for index in range(shown):
        segment = elf.get_segment(index)
        vaddr, offset, flags = segment["p_vaddr"], segment["p_offset"], segment["p_flags"]
        memory = f"[{vaddr:#x}, {vaddr + segment['p_memsz']:#x})"
        file = f"[{offset:#x}, {offset + segment['p_filesz']:#x})"
        perms = "".join(
            c if flags & bit else "-" for c, bit in (("r", PF_R), ("w", PF_W), ("x", PF_X))
        )
        names = [printable(s.name) for s in sections if s.name and segment.section_in_segment(s)]
        if segment["p_paddr"] != vaddr:
            names.append(f"(physical address {segment['p_paddr']:#x})")
        row = f"{index:7} {describe_p_type(segment['p_type']):13} {memory:28} {file:24} {perms:5} "
        lines.append((row + " ".join(names)).rstrip())
    if shown < count:
        lines.append(f"... and {count - shown} more")
