"""What the struct reader takes, and each reason why it does not."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvmmm.errors import EXIT_IMAGE, ImageError
from kvmmm.hostarch.access import READ_EXECUTE, READ_WRITE
from kvmmm.vmm import elf
from kvmmm.vmm.image import read_image
from tests.vmm.elf_builder import (
    ET_CORE,
    ET_DYN,
    ET_NONE,
    ET_REL,
    PT_DYNAMIC,
    PT_GNU_STACK,
    PT_INTERP,
    PT_LOAD,
    PT_NOTE,
    PT_NULL,
    PT_TLS,
    TEXT,
    Elf,
    Phdr,
    R,
    Symbol,
    W,
    X,
    tiny,
)


def rejection(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        elf.read_headers("it.elf", data)
    error = caught.value
    assert error.exit_code == EXIT_IMAGE
    assert error.path == "it.elf"
    assert error.remedy
    assert str(error) == f"it.elf: {error.reason}\n{error.remedy}"
    return error


def test_reads_entry_and_load_headers():
    data = tiny(
        phdrs=[
            Phdr(PT_NOTE, R, 0x1000, 0, filesz=8),
            Phdr(PT_LOAD, R | X, 0x1000, TEXT, filesz=0x20),
            Phdr(PT_LOAD, R | W, 0x1020, TEXT + 0x1020, filesz=8, memsz=0x3000),
            Phdr(PT_TLS, R, 0x1000, 0, filesz=8),
            Phdr(PT_GNU_STACK, R | W, 0, 0, filesz=0),
        ],
        entry=TEXT + 4,
    )
    entry, headers = elf.read_headers("it.elf", data)
    assert entry == TEXT + 4
    assert [(h.index, h.flags, h.offset, h.vaddr, h.paddr) for h in headers] == [
        (1, R | X, 0x1000, TEXT, TEXT),
        (2, R | W, 0x1020, TEXT + 0x1020, TEXT + 0x1020),
    ]
    assert [(h.file_bytes, h.memory_bytes) for h in headers] == [(0x20, 0x20), (8, 0x3000)]


def test_program_headers_may_stand_anywhere():
    good = Elf(phoff=0x2000, contents={})
    data = good.build().ljust(0x2000, b"\0") + Phdr().pack()
    assert len(elf.read_headers("it.elf", data)[1]) == 1


def test_empty_segments_are_skipped_wherever_they_point():
    data = tiny(phdrs=[Phdr(), Phdr(offset=1 << 50, vaddr=0, filesz=0, memsz=0)])
    assert [h.index for h in elf.read_headers("it.elf", data)[1]] == [0]


def test_a_segment_without_file_bytes_may_point_behind_the_file():
    data = tiny(phdrs=[Phdr(), Phdr(offset=1 << 20, vaddr=0x200000, filesz=0, memsz=0x1000)])
    assert [h.index for h in elf.read_headers("it.elf", data)[1]] == [0, 1]


@pytest.mark.parametrize(
    ("fields", "facts", "remedy"),
    [
        ({"elf_class": 1, "machine": 3}, ["32-bit", "i386"], "-m64"),
        ({"elf_class": 1, "machine": 62}, ["32-bit", "x86-64"], "-m64"),
        ({"elf_class": 1, "machine": 40}, ["32-bit", "ARM"], "x86-64"),
        ({"elf_class": 7}, ["unknown class 7"], "-m64"),
        ({"byte_order": 0}, ["unknown byte order 0"], "x86-64"),
        ({"machine": 183}, ["AArch64"], "x86-64"),
        ({"machine": 243}, ["RISC-V"], "x86-64"),
        ({"machine": 3}, ["i386"], "x86-64"),
        ({"machine": 4711}, ["machine number 4711"], "x86-64"),
        ({"type": ET_NONE}, ["ET_NONE"], "link"),
        ({"type": ET_REL}, ["ET_REL", "not linked"], "-static -no-pie"),
        ({"type": ET_DYN}, ["dynamic executable", "PIE", "ET_DYN"], "-static -no-pie"),
        ({"type": ET_CORE}, ["core dump"], "program"),
        ({"type": 0xFE00}, ["unknown type 0xfe00"], "link"),
        ({"phentsize": 32}, ["32 bytes (e_phentsize)", "56"], "damaged"),
        ({"phnum": 0, "phentsize": 0}, ["no program headers"], "link"),
        ({"phnum": 1171}, ["1171 program headers (e_phnum)", "1170"], "damaged"),
        ({"phnum": 0xFFFF}, ["65535 program headers"], "damaged"),
        ({"phoff": 1 << 40}, ["truncated", "0x10000000038", "missing"], "again"),
        ({"phnum": 100}, ["truncated", "100 program headers", "1552 bytes are missing"], "again"),
        ({"phdrs": [Phdr(PT_NOTE)]}, ["nothing to load", "PT_LOAD"], "PT_LOAD"),
        ({"phdrs": [Phdr(filesz=0)]}, ["nothing to load"], "PT_LOAD"),
        ({"phdrs": [Phdr(PT_NULL)] * 3}, ["nothing to load: of its 3"], "PT_LOAD"),
        (
            {"phdrs": [Phdr(), Phdr(filesz=0x20, memsz=0x10)]},
            ["segment 1", "more bytes in the file (0x20) than in memory (0x10)"],
            "damaged",
        ),
        ({"phdrs": [Phdr(), Phdr(PT_DYNAMIC)]}, ["dynamic", "PT_DYNAMIC"], "-static"),
    ],
)
def test_rejects(fields: dict[str, object], facts: list[str], remedy: str):
    error = rejection(tiny(**fields))
    for fact in facts:
        assert fact in error.reason
    assert remedy in error.remedy


def test_rejects_a_big_endian_elf_and_names_its_machine():
    data = bytearray(tiny(byte_order=2))
    data[16:20] = struct.pack(">HH", 2, 22)
    assert "big-endian ELF, for S/390" in rejection(bytes(data)).reason


def test_rejects_an_interpreter_by_name_that_cannot_hurt_a_terminal():
    name = b"/lib64/\x1b[2J-ld.so\0"
    data = tiny(
        phdrs=[Phdr(PT_INTERP, R, 0x1000, TEXT, filesz=len(name)), Phdr()],
        contents={0x1000: name},
    )
    assert "the interpreter /lib64/\\x1b[2J-ld.so (PT_INTERP)" in rejection(data).reason


@pytest.mark.parametrize("length", [4, 5, 17, 19, 20, 63])
def test_rejects_less_than_a_header(length: int):
    assert f"truncated: it begins like an ELF, but has {length} bytes" in (
        rejection(tiny()[:length]).reason
    )


def test_rejects_a_truncated_segment_and_says_by_how_much():
    data = tiny(phdrs=[Phdr(filesz=0x10), Phdr(offset=0x1010, vaddr=0x200000, filesz=0x100)])
    reason = rejection(data[:-0x30]).reason
    assert "segment 1 has its bytes at file offsets [0x1010, 0x1110)" in reason
    assert "the file ends at 0x10e0; 48 of its 256 bytes are missing" in reason
    assert "256 of its 256 bytes" in rejection(data[:0x1010]).reason


def test_every_prefix_of_a_file_is_rejected_as_truncated():
    data = tiny(phdrs=[Phdr(offset=0x100), Phdr(offset=0x110, vaddr=0x200000)])
    for length in range(4, len(data)):
        assert "truncated" in rejection(data[:length]).reason
    assert len(elf.read_headers("it.elf", data)[1]) == 2


def test_offsets_near_2_to_the_64_do_not_wrap():
    top = (1 << 64) - 8
    assert "truncated: segment 0" in rejection(tiny(phdrs=[Phdr(offset=top)])).reason
    assert "truncated: its 1 program headers" in rejection(tiny(phoff=top)).reason


def test_the_loading_path_imports_no_slow_library():
    code = "import sys, kvmmm.vmm.image, kvmmm.vmm.symbol; print('elftools' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"


def test_reads_what_the_system_compiler_makes(tmp_path: Path):
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    source, path = tmp_path / "it.c", tmp_path / "it.elf"
    source.write_text(
        "char zero[70000]; int w = 7; void _start(void) { zero[w] = 1; for (;;) { } }"
    )
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext-segment=0x200000"]
    for option in ("-Wl,-z,separate-code", "-Wl,-z,noseparate-code"):
        subprocess.run([gcc, *flags, option, "-o", path, source], check=True)
        image = read_image(path, memory_bytes=64 << 20)
        entry_segment = next(s for s in image.segments if s.start <= image.entry < s.end)
        assert entry_segment.perms == READ_EXECUTE
        bss = image.segments[-1]
        assert bss.perms == READ_WRITE
        assert bss.end - bss.start >= 70000 > bss.file_bytes
        assert image.page_ranges()[0][0] == 0x200000


@pytest.mark.parametrize("flags", [["-static-pie"], ["-pie"], ["-shared"], ["-c"], ["-no-pie"]])
def test_rejects_what_is_not_a_static_executable(tmp_path: Path, flags: list[str]):
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    source, path = tmp_path / "it.c", tmp_path / "it.elf"
    source.write_text("int main(void) { return 0; }")
    made = subprocess.run(
        [gcc, "-fPIC", *flags, "-o", path, source], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"gcc {flags[0]}: {made.stderr.strip()[-200:]}")
    error = rejection(path.read_bytes())
    fact = {"-c": "ET_REL", "-no-pie": "the interpreter /lib64/ld-linux"}.get(flags[0], "ET_DYN")
    assert fact in error.reason
    assert "-static -no-pie" in error.remedy


def test_rejects_a_program_of_this_system():
    path = Path("/bin/true")
    if not path.exists():
        pytest.skip("there is no /bin/true")
    if path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("/bin/true is no ELF here")
    assert "dynamic executable" in rejection(path.read_bytes()).reason


def test_describe_names_segments_and_sections(tmp_path: Path):
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    source, image = tmp_path / "it.c", tmp_path / "it.elf"
    source.write_text("int word = 1; void _start(void) { for (;;) { } }\n")
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"]
    subprocess.run([gcc, *flags, "-o", image, source], check=True)
    text = elf.describe("it.elf", image.read_bytes())
    first, header, *rows = text.splitlines()
    assert first.startswith("it.elf: ELF64, EXEC (Executable file), Advanced Micro Devices X86-64")
    assert header.split()[:2] == ["segment", "type"]
    assert any(row.endswith(" .text") and " r-x " in row for row in rows)
    assert any(row.endswith(" .data") and " rw- " in row for row in rows)


def test_describe_says_what_it_cannot_read():
    assert "it.elf: the rest cannot be read: " in elf.describe("it.elf", tiny()[:30])
    assert "cannot be read" in elf.describe("it.elf", b"\x7fELF")
    text = elf.describe("it.elf", tiny(phdrs=[Phdr(), Phdr(paddr=0x5000)], phnum=3)[:200])
    assert "(physical address 0x5000)" in text
    assert "cannot be read" in text


def test_describe_bounds_what_it_shows():
    assert "... and 44 more" in elf.describe("it.elf", tiny(phdrs=[Phdr(PT_NOTE)] * 300))


def test_describe_takes_an_elf_for_another_machine():
    assert "AArch64" in elf.describe("it.elf", tiny(machine=183, symbols=[Symbol(b"f", TEXT)]))
