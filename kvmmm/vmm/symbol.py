"""Names for guest addresses, from the image's own symbol table, for reports and traces.

The table is read at the first question, by pyelftools: a run that ends well never pays for it.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Self

from kvmmm.vmm.elf import printable

if TYPE_CHECKING:
    from elftools.elf.sections import Section

    from kvmmm.vmm.image import Image

# Elf64_Sym: st_name, st_info, st_other, st_shndx, st_value, st_size.
_SYM = struct.Struct("<IBBHQQ")

_SHN_UNDEF = 0
_SHN_ABS = 0xFFF1  # a constant, such as a stack size: no address to name
_STT_NOTYPE = 0  # what assemblers give a plain label
_STT_FUNC = 2  # 1 is STT_OBJECT; above come sections, files, thread-local offsets
_STB_LOCAL = 0
_NAME_LIMIT = 200

# (value, size in bytes, offset of the name in the string table)
_Symbol = tuple[int, int, int]


class SymbolTable:
    """The symbols of one image, by address.

    An image without a readable .symtab (stripped, flat, damaged) has an empty one; nothing raises.
    """

    __slots__ = ("_image", "_names", "_starts", "_symbols")

    def __init__(self, image: Image) -> None:
        self._image = image
        self._starts: list[int] | None = None  # None until the first question
        self._symbols: list[_Symbol] = []
        self._names = b""

    @classmethod
    def from_image(cls, image: Image) -> Self:
        """Return the table of `image`; reads nothing yet."""
        return cls(image)

    def resolve(self, addr: int) -> str | None:
        """Return `name`, or `name+0x12`, for a guest address; None when no symbol is known for it.

        A symbol with a size names its bytes and the address just behind them (where a call that
        does not return leaves rip, and where an overrun begins); one without a size reaches to the
        next symbol, but never out of its segment.

        Args:
            addr: Guest-virtual address, as the image is linked.
        """
        starts = self._starts
        if starts is None:
            starts = self._load()
        index = bisect_right(starts, addr) - 1
        if index < 0:
            return None
        start, size_bytes, name_offset = self._symbols[index]
        if size_bytes:
            if addr > start + size_bytes:
                return None
        elif not any(s.start <= start and addr < s.end for s in self._image.segments):
            return None
        offset = addr - start
        name = self._name(name_offset)
        return f"{name}+{offset:#x}" if offset else name

    def _load(self) -> list[int]:
        symbols: list[_Symbol] = []
        if self._image.kind == "elf":
            entries, self._names = _symbol_sections(self._image.data)
            symbols = _select(entries, self._names)
        self._symbols = symbols
        self._starts = [start for start, _, _ in symbols]
        return self._starts

    def _name(self, offset: int) -> str:
        end = self._names.find(b"\0", offset)
        return printable(self._names[offset : end if end >= 0 else None][:_NAME_LIMIT])


def _symbol_sections(data: bytes) -> tuple[bytes, bytes]:
    # Returns the bytes of .symtab and of its string table; both empty when there is none.
    import io

    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(data))
        for section in elf.iter_sections(type="SHT_SYMTAB"):
            strings = elf.get_section(section["sh_link"], type=("SHT_STRTAB",))
            # Slices, not section.data(): that one would allocate whatever size the header claims.
            return _bytes_of(data, section), _bytes_of(data, strings)
    except Exception:  # noqa: BLE001  # a damaged file upsets pyelftools in many ways
        return b"", b""
    return b"", b""


def _bytes_of(data: bytes, section: Section) -> bytes:
    offset = section["sh_offset"]
    return data[offset : offset + section["sh_size"]]


def _select(entries: bytes, names: bytes) -> list[_Symbol]:
    # One symbol an address, ascending. Where several share one, what a programmer would call it
    # wins: a function or object over a label such as __bss_start, then with a size, then global.
    ranked: list[tuple[int, bool, bool, bool, int, int]] = []
    whole_bytes = len(entries) - len(entries) % _SYM.size
    for name, info, _, section, value, size_bytes in _SYM.iter_unpack(entries[:whole_bytes]):
        kind = info & 0xF
        if kind > _STT_FUNC or section in (_SHN_UNDEF, _SHN_ABS):
            continue
        if name < len(names) and names[name]:
            is_global = info >> 4 != _STB_LOCAL
            ranked.append((value, kind != _STT_NOTYPE, size_bytes > 0, is_global, size_bytes, name))
    ranked.sort()
    best = {value: (value, size_bytes, name) for value, _, _, _, size_bytes, name in ranked}
    return list(best.values())
