"""Symbols by address; a damaged table is as good as none."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.vmm.image import Image, read_image
from kvmmm.vmm.symbol import SymbolTable
from tests.vmm.elf_builder import (
    SHN_ABS,
    STB_LOCAL,
    STT_FILE,
    STT_NOTYPE,
    STT_OBJECT,
    STT_SECTION,
    TEXT,
    Phdr,
    R,
    Symbol,
    W,
    X,
    tiny,
)

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = 64 << 20
PHDRS = [
    Phdr(flags=R | X, offset=0x400, filesz=0x100),
    Phdr(flags=R | W, offset=0x500, vaddr=0x200000, filesz=0x10, memsz=0x1000),
]


def table_of(*symbols: Symbol) -> SymbolTable:
    data = tiny(phdrs=PHDRS, symbols=list(symbols))
    return SymbolTable.from_image(read_image(data, memory_bytes=MEMORY))


def test_names_and_offsets():
    table = table_of(Symbol(b"first", TEXT, 0x20), Symbol(b"second", TEXT + 0x40, 0x10))
    assert table.resolve(TEXT) == "first"
    assert table.resolve(TEXT + 0x12) == "first+0x12"
    assert table.resolve(TEXT + 0x40) == "second"
    assert table.resolve(TEXT + 0x4F) == "second+0xf"
    assert table.resolve(TEXT - 1) is None
    assert table.resolve(0) is None
    assert table.resolve((1 << 64) - 1) is None


def test_a_sized_symbol_reaches_to_the_address_behind_it():
    table = table_of(Symbol(b"stop", TEXT, 0x20), Symbol(b"buffer", 0x200000, 0x1000, STT_OBJECT))
    assert table.resolve(TEXT + 0x20) == "stop+0x20"
    assert table.resolve(TEXT + 0x21) is None
    assert table.resolve(0x201000) == "buffer+0x1000"
    assert table.resolve(0x201001) is None


def test_a_label_reaches_to_the_next_symbol_within_its_segment():
    table = table_of(
        Symbol(b"_start", TEXT, type=STT_NOTYPE), Symbol(b"loop", TEXT + 8, type=STT_NOTYPE)
    )
    assert table.resolve(TEXT + 7) == "_start+0x7"
    assert table.resolve(TEXT + 0xFF) == "loop+0xf7"
    assert table.resolve(TEXT + 0x100) is None
    assert table.resolve(0x200000) is None


def test_the_best_of_several_names_wins():
    table = table_of(
        Symbol(b"counter", 0x200000, 8, STT_OBJECT),
        Symbol(b"__bss_start", 0x200000, type=STT_NOTYPE),
        Symbol(b"local", TEXT, 8, binding=STB_LOCAL),
        Symbol(b"public", TEXT, 8),
    )
    assert table.resolve(0x200000) == "counter"
    assert table.resolve(TEXT) == "public"


def test_what_is_no_address_is_no_name():
    table = table_of(
        Symbol(b"STACK_BYTES", TEXT, section=SHN_ABS),
        Symbol(b"elsewhere", TEXT, section=0),
        Symbol(b"it.c", TEXT, type=STT_FILE),
        Symbol(b".text", TEXT, type=STT_SECTION),
        Symbol(b"", TEXT),
    )
    assert table.resolve(TEXT) is None


def test_names_cannot_hurt_a_terminal():
    table = table_of(Symbol(b"\x1b[2J\xff", TEXT, 4), Symbol("größe".encode(), TEXT + 8, 4))
    assert table.resolve(TEXT) == "\\x1b[2J\\\\xff"
    assert table.resolve(TEXT + 8) == "größe"
    assert len(table_of(Symbol(b"x" * 5000, TEXT, 4)).resolve(TEXT) or "") == 200


def test_no_table_gives_no_names():
    for image in (
        read_image(tiny(), memory_bytes=MEMORY),
        read_image(b"\xf4", memory_bytes=MEMORY, base=TEXT),
        Image("it", b"\x7fELF", [], 0, "elf"),
    ):
        table = SymbolTable.from_image(image)
        assert table.resolve(TEXT) is None
        assert table.resolve(TEXT) is None


def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch):
    table = table_of(Symbol(b"f", TEXT, 4))
    assert table.resolve(TEXT) == "f"
    monkeypatch.setattr("kvmmm.vmm.symbol._symbol_sections", None)
    assert table.resolve(TEXT + 1) == "f+0x1"


def test_names_what_the_system_compiler_and_assembler_make(tmp_path: Path):
    gcc, nm = shutil.which("gcc"), shutil.which("nm")
    if gcc is None or nm is None:
        pytest.skip("gcc and nm are not installed")
    source, start, path = tmp_path / "it.c", tmp_path / "start.S", tmp_path / "it.elf"
    source.write_text("int counter[4]; void work(void) { counter[1]++; for (;;) { } }\n")
    start.write_text(".globl _start\n_start: nop\nagain: call work\njmp again\n")
    flags = ["-nostdlib", "-static", "-no-pie"]
    subprocess.run([gcc, *flags, "-o", path, start, source], check=True)
    listing = subprocess.run([nm, path], check=True, capture_output=True, text=True).stdout
    addresses = {name: int(addr, 16) for addr, _, name in map(str.split, listing.splitlines())}
    image = read_image(path, memory_bytes=MEMORY)
    table = SymbolTable.from_image(image)
    assert table.resolve(image.entry) == "_start"
    for name in ("_start", "again", "work", "counter"):
        assert table.resolve(addresses[name]) == name
    assert table.resolve(addresses["again"] + 5) == "again+0x5"
    assert table.resolve(addresses["counter"] + 4) == "counter+0x4"


SAMPLE = tiny(
    phdrs=PHDRS, symbols=[Symbol(b"f", TEXT, 8), Symbol(b"g", TEXT + 0x10, type=STT_NOTYPE)]
)
SECTIONS_START = 0x510


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(40, 63), st.integers(SECTIONS_START, len(SAMPLE) - 1)),
            st.sampled_from([0, 1, 2, 0x7F, 0xFF]) | st.integers(0, 255),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(SECTIONS_START, len(SAMPLE)),
)
def test_damaged_tables_never_raise(changes: list[tuple[int, int]], length: int):
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    whole = read_image(SAMPLE, memory_bytes=MEMORY)
    for damaged in (bytes(data), bytes(data[:length])):
        table = SymbolTable.from_image(Image("it", damaged, whole.segments, TEXT, "elf"))
        for addr in (0, TEXT, TEXT + 0x11, 0x200000, (1 << 64) - 1):
            assert isinstance(table.resolve(addr), str | None)
