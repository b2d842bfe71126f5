"""What is taken as a program for ring 3, each reason why not, and how programs are recognised."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from kvmmm.errors import EXIT_IMAGE, ImageError
from kvmmm.hostarch.access import ANY_ACCESS, READ_WRITE
from kvmmm.vmm import bundled
from kvmmm.vmm.image_file import ImageNotFoundError
from kvmmm.vmm.symbol import SymbolTable
from kvmmm.vmm.user_image import MAX_ADDR, PIE_BASE, is_linux_program, read_user_image
from tests.vmm.elf_builder import (
    ET_CORE,
    ET_DYN,
    PT_DYNAMIC,
    PT_GNU_STACK,
    PT_INTERP,
    PT_LOAD,
    PT_NOTE,
    Elf,
    Phdr,
    R,
    Symbol,
    W,
    X,
)

TEXT = 0x400000


def note(name: bytes, kind: int, description: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data.ljust(len(data) + 3 & ~3, b"\0")

    head = struct.pack("<III", len(name), len(description), kind)
    return head + padded(name) + padded(description)


ABI_TAG = note(b"GNU\0", 1, struct.pack("<4I", 0, 3, 2, 0))
HURD_TAG = note(b"GNU\0", 1, struct.pack("<4I", 1, 3, 2, 0))
BUILD_ID = note(b"GNU\0", 3, b"x" * 20)


def program(**fields: Any) -> bytes:
    """A good program of one segment, with its headers in it, and fields changed."""
    given: dict[str, Any] = {
        "phdrs": [Phdr(offset=0, vaddr=TEXT, filesz=0x1010)], "entry": TEXT + 0x1000,
    }  # fmt: skip
    return Elf(**given | fields).build()


def test_a_static_program():
    image = read_user_image(program())
    assert (image.path, image.bias, image.entry_addr) == ("<bytes>", 0, TEXT + 0x1000)
    assert (image.phdr_addr, image.n_phdrs) == (TEXT + 64, 1)
    assert image.brk_start == TEXT + 0x2000
    assert image.stack_perms == READ_WRITE
    assert image.page_ranges() == ((TEXT, TEXT + 0x2000, 5),)


def test_a_static_pie_is_placed():
    phdrs = [
        Phdr(flags=R | X, offset=0, vaddr=0, filesz=0x1010),
        Phdr(flags=R | W, offset=0x1000, vaddr=0x3010, filesz=0x10, memsz=0x5000),
        Phdr(PT_DYNAMIC, R | W, 0x1000, 0x3010),
    ]
    image = read_user_image(program(type=ET_DYN, phdrs=phdrs, entry=0x1000))
    assert (image.bias, image.entry_addr) == (PIE_BASE, PIE_BASE + 0x1000)
    assert image.phdr_addr == PIE_BASE + 64
    assert image.brk_start == PIE_BASE + 0x9000
    assert [s.start for s in image.segments] == [0, 0x3010]


def test_program_headers_that_are_not_loaded_have_no_address():
    assert read_user_image(program(phdrs=[Phdr(vaddr=TEXT)], entry=TEXT)).phdr_addr == 0


@pytest.mark.parametrize(("flags", "perms"), [(R | W, READ_WRITE), (R | W | X, ANY_ACCESS)])
def test_the_stack_as_the_file_asks_for_it(flags: int, perms: int):
    stack = Phdr(PT_GNU_STACK, flags, 0, 0, filesz=0)
    phdrs = [Phdr(vaddr=TEXT), stack]
    assert read_user_image(program(phdrs=phdrs, entry=TEXT)).stack_perms == perms


@pytest.mark.parametrize(
    ("data", "facts", "remedy"),
    [
        (b"#!/bin/sh\n", ["not an ELF", "a script"], "-static"),
        (b"", ["not an ELF"], "-static"),
        (program(machine=183), ["AArch64"], "x86-64"),
        (program(type=ET_CORE), ["core dump"], "program"),
        (program(phdrs=[Phdr(PT_NOTE, vaddr=TEXT)]), ["nothing to load"], "PT_LOAD"),
        (
            program(
                phdrs=[Phdr(PT_INTERP, R, 0x1000, TEXT, filesz=8), Phdr(vaddr=TEXT)],
                contents={0x1000: b"/ld.so\0\0"},
            ),
            ["dynamic", "/ld.so", "PT_INTERP"],
            "-static",
        ),
        (program(phdrs=[Phdr(vaddr=0x1000)], entry=0x1000), ["below 0x10000"], "--kernel"),
        (
            program(phdrs=[Phdr(vaddr=MAX_ADDR - 8)], entry=MAX_ADDR - 8),
            ["above", f"{MAX_ADDR:#x}"],
            "0x400000",
        ),
        (program(phdrs=[Phdr(vaddr=1 << 63)], entry=1 << 63), ["above"], "0x400000"),
        (program(phdrs=[Phdr(vaddr=TEXT), Phdr(vaddr=TEXT + 8)]), ["overlap"], "addresses"),
        (program(phdrs=[Phdr(vaddr=TEXT)], entry=0x123), ["entry 0x123", "outside"], "_start"),
        (program(phdrs=[Phdr(vaddr=TEXT, flags=R)], entry=TEXT), ["entry", "forbid"], "executable"),
        (program(phdrs=[Phdr(vaddr=TEXT, filesz=0x20, memsz=0x10)]), ["more bytes"], "damaged"),
    ],
)
def test_rejected(data: bytes, facts: list[str], remedy: str):
    with pytest.raises(ImageError) as caught:
        read_user_image(data)
    error = caught.value
    assert error.exit_code == EXIT_IMAGE
    assert all(fact in error.reason for fact in facts), error.reason
    assert remedy in error.remedy


def test_a_file_that_is_not_there():
    with pytest.raises(ImageNotFoundError):
        read_user_image("/nonexistent/program")


class TestRecognition:
    @pytest.mark.parametrize(
        ("notes", "is_one"),
        [
            (ABI_TAG, True),
            (BUILD_ID + ABI_TAG, True),
            (HURD_TAG, False),
            (BUILD_ID, False),
            (ABI_TAG[:14], False),
            (b"", False),
            (b"\xff" * 64, False),
        ],
    )
    def test_by_its_notes(self, notes: bytes, *, is_one: bool):
        phdrs = [Phdr(vaddr=TEXT), Phdr(PT_NOTE, R, 0x2000, 0, filesz=len(notes))]
        data = program(phdrs=phdrs).ljust(0x2000, b"\0")[:0x2000] + notes
        assert is_linux_program(data) is is_one

    def test_by_its_osabi(self):
        data = bytearray(program())
        assert not is_linux_program(bytes(data))
        data[7] = 3
        assert is_linux_program(bytes(data))

    def test_by_its_interpreter(self):
        assert is_linux_program(program(phdrs=[Phdr(PT_INTERP, R, 0x1000, 0, filesz=8)]))

    @pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF" * 30, b"#!/bin/sh"])
    def test_what_is_no_elf_is_none(self, data: bytes):
        assert not is_linux_program(data)

    def test_programs_of_this_machine_are(self):
        programs = [path for path in map(Path, ("/bin/sh", "/usr/bin/env")) if path.exists()]
        assert all(is_linux_program(path.read_bytes()) for path in programs)

    def test_bundled_guests(self):
        for guest in bundled.guests():
            assert is_linux_program(guest.path.read_bytes()) is guest.is_user, guest


def test_bundled_programs_load():
    kinds = set()
    for guest in bundled.guests():
        if guest.is_user:
            image = read_user_image(guest.path)
            assert image.phdr_addr
            kinds.add(image.bias)
    assert kinds == {0, PIE_BASE}, "both kinds of programs"


def test_symbols_are_those_of_the_link():
    data = program(
        type=ET_DYN,
        phdrs=[Phdr(PT_LOAD, R | X, 0, 0, filesz=0x1010)],
        entry=0x1000,
        symbols=[Symbol(b"main", 0x1000, 8)],
    )
    image = read_user_image(data)
    assert SymbolTable.from_image(image).resolve(image.entry_addr + 4 - image.bias) == "main+0x4"
