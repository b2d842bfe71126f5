"""Images as values: placement, page permissions, and what is rejected before there is a VM."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.errors import EXIT_IMAGE, EXIT_NO_INPUT, ImageError
from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.vmm.image import Image, Segment, explain, read_image
from kvmmm.vmm.image_file import ImageNotFoundError
from tests.vmm.elf_builder import TEXT, Elf, Phdr, R, W, X, tiny

MEMORY = 64 << 20


def read(source: str | Path | bytes, **options: object) -> Image:
    return read_image(source, **{"memory_bytes": MEMORY} | options)  # type: ignore[arg-type]


def rejection(source: str | Path | bytes, **options: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(source, **options)
    return caught.value


def placed(*phdrs: Phdr, entry: int = TEXT) -> bytes:
    return tiny(phdrs=list(phdrs), entry=entry)


# What is accepted.


def test_an_elf_becomes_segments_with_exact_addresses():
    image = read(
        placed(
            Phdr(flags=R | X, offset=0x1010, vaddr=TEXT + 0x10, filesz=0x20),
            Phdr(flags=R | W, offset=0x1800, vaddr=TEXT + 0x1800, filesz=8, memsz=0x900),
            entry=TEXT + 0x10,
        )
    )
    code, data = image.segments
    assert (code.start, code.end, code.perms) == (TEXT + 0x10, TEXT + 0x30, READ_EXECUTE)
    assert (code.file_offset, code.file_bytes, code.name) == (0x1010, 0x20, "segment 0")
    assert code.page_range == AddrRange(TEXT, TEXT + 0x1000)
    assert (data.start, data.end, data.perms) == (TEXT + 0x1800, TEXT + 0x2100, READ_WRITE)
    assert data.page_range == AddrRange(TEXT + 0x1000, TEXT + 0x3000)
    assert repr(code) == "<segment 0 [0x100010, 0x100030) r-x>"
    assert bytes(image.contents(data)) == image.data[0x1800:0x1808]
    assert (image.entry, image.kind, image.path) == (TEXT + 0x10, "elf", "<bytes>")
    assert list(image.page_ranges()) == [
        (TEXT, TEXT + 0x1000, READ_EXECUTE),
        (TEXT + 0x1000, TEXT + 0x3000, READ_WRITE),
    ]


def test_segments_are_sorted_whatever_the_file_says():
    image = read(placed(Phdr(vaddr=0x300000), Phdr(vaddr=0x200000), entry=0x300000))
    assert [s.name for s in image.segments] == ["segment 1", "segment 0"]


def test_a_shared_page_has_the_permissions_of_both():
    image = read(
        placed(
            Phdr(flags=R | X, vaddr=TEXT, filesz=0x1800),
            Phdr(flags=R | W, vaddr=TEXT + 0x1800, filesz=0x10, memsz=0x1000),
        )
    )
    assert list(image.page_ranges()) == [
        (TEXT, TEXT + 0x1000, READ_EXECUTE),
        (TEXT + 0x1000, TEXT + 0x2000, ANY_ACCESS),
        (TEXT + 0x2000, TEXT + 0x3000, READ_WRITE),
    ]


def test_rwx_gives_everything_to_every_segment():
    image = read(
        placed(Phdr(flags=R), Phdr(flags=R | W, vaddr=TEXT + 0x1000), entry=TEXT + 0x1000), rwx=True
    )
    assert [s.perms for s in image.segments] == [ANY_ACCESS, ANY_ACCESS]
    assert list(image.page_ranges()) == [(TEXT, TEXT + 0x2000, ANY_ACCESS)]


@pytest.mark.parametrize("flags", range(8))
def test_flags_become_access_bits(flags: int):
    image = read(placed(Phdr(), Phdr(flags=flags | 0x05000000, vaddr=0x200000)))
    perms = image.segments[1].perms
    expected = (flags & R and READ) | (flags & W and WRITE) | (flags & X and EXECUTE)
    assert perms == expected


def test_the_virtual_address_counts_when_no_segment_has_a_physical_one():
    image = read(placed(Phdr(paddr=0), Phdr(vaddr=0x200000, paddr=0)))
    assert [s.start for s in image.segments] == [TEXT, 0x200000]


def test_an_image_may_fill_memory_from_page_1_to_the_end():
    image = read(placed(Phdr(vaddr=0x1000, memsz=MEMORY - 0x1000), entry=0x1000))
    assert list(image.page_ranges()) == [(0x1000, MEMORY, READ_EXECUTE)]


def test_bytes_that_could_change_are_copied():
    source = bytearray(tiny())
    image = read_image(source, memory_bytes=MEMORY)
    source[:] = bytes(len(source))
    assert image.data == tiny()
    assert read_image(memoryview(tiny()), memory_bytes=MEMORY).entry == TEXT


def test_a_flat_binary_is_one_rwx_segment_at_base():
    image = read(b"\xf4" * 5000, base=0x7C00)
    (segment,) = image.segments
    assert (segment.start, segment.end, segment.perms) == (0x7C00, 0x7C00 + 5000, ANY_ACCESS)
    assert (image.entry, image.kind, segment.name) == (0x7C00, "flat", "flat binary")
    assert list(image.page_ranges()) == [(0x7000, 0x9000, ANY_ACCESS)]
    assert bytes(image.contents(segment)) == b"\xf4" * 5000


@st.composite
def segment_lists(draw: st.DrawFn) -> list[Segment]:
    # Sorted, disjoint to the byte, dense enough that pages are shared, some by three.
    sizes = st.sampled_from([1, 8, 0x7FF, 0x800, 0xFFF, 0x1000, 0x1001, 0x2345, 0x3000])
    gaps = st.sampled_from([0, 0, 1, 0x400, 0xFFF, 0x1000, 0x5000])
    at, segments = draw(st.sampled_from([0x1000, 0x1FFF, 0x2800])), []
    for index in range(draw(st.integers(1, 8))):
        start = at + draw(gaps)
        at = start + draw(sizes)
        segments.append(Segment(start, at, draw(st.integers(0, 7)), 0, 0, name=f"{index}"))
    return segments


@given(segment_lists())
def test_page_ranges_agree_with_a_page_by_page_model(segments: list[Segment]):
    model: dict[int, int] = {}
    for segment in segments:
        for page in range(segment.start >> 12, ((segment.end - 1) >> 12) + 1):
            model[page] = model.get(page, 0) | segment.perms
    ranges = list(Image("it", b"", segments, 0, "elf").page_ranges())
    assert all(start < end and not (start | end) & 0xFFF for start, end, _ in ranges)
    for (_, end, perms), (start, _, next_perms) in pairwise(ranges):
        assert end < start or (end == start and perms != next_perms)
    assert model == {
        page: perms for start, end, perms in ranges for page in range(start >> 12, end >> 12)
    }


# What is rejected.


@pytest.mark.parametrize(
    ("phdrs", "facts", "remedy"),
    [
        (
            [Phdr(paddr=0x200000)],
            ["segment 0", "run at 0x100000 (p_vaddr)", "loaded at 0x200000 (p_paddr)"],
            "link it where it is loaded",
        ),
        (
            [Phdr(vaddr=0xFFFFFFFF80100000, paddr=0x100000)],
            ["0xffffffff80100000 (p_vaddr)", "0x100000 (p_paddr)"],
            "higher-half",
        ),
        ([Phdr(), Phdr(vaddr=0x200000, paddr=0)], ["segment 1", "0x200000", "0x0"], "link"),
        ([Phdr(vaddr=0xFFFFFFFF80100000)], ["outside guest memory"], "low address"),
        ([Phdr(vaddr=(1 << 64) - 8)], ["segment 0", "wraps around"], "damaged"),
        ([Phdr(memsz=(1 << 64) - 1)], ["wraps around"], "damaged"),
        ([Phdr(vaddr=0)], ["[0x0, 0x10) covers page 0"], "0x1000"),
        ([Phdr(vaddr=0xFFF)], ["covers page 0"], "0x1000"),
        (
            [Phdr(), Phdr(vaddr=MEMORY - 8)],
            ["segment 1", "outside guest memory, which ends at 0x4000000 (64 MiB)"],
            "--memory 66M at least",
        ),
        (
            [Phdr(), Phdr(vaddr=MEMORY), Phdr(vaddr=200 << 20)],
            ["segment 1"],
            "--memory 202M at least",
        ),
        (
            [Phdr(filesz=0x20), Phdr(vaddr=TEXT + 0x1F)],
            ["segment 0 and segment 1 overlap", "[0x100000, 0x100020)", "share 1 bytes"],
            "linker script",
        ),
        (
            [Phdr(vaddr=TEXT + 0x10), Phdr(memsz=0x2000)],
            ["segment 1 and segment 0 overlap", "share 16 bytes"],
            "linker script",
        ),
        ([Phdr(vaddr=0x200000)], ["entry 0x100000", "outside every", "[0x200000, 0x200010)"], "ld"),
        (
            [Phdr(flags=R | W), Phdr(vaddr=0x200000)],
            ["entry 0x100000 lies in segment 0", "rw- forbid execution"],
            "--rwx",
        ),
    ],
)
def test_rejects(phdrs: list[Phdr], facts: list[str], remedy: str):
    error = rejection(placed(*phdrs))
    for fact in facts:
        assert fact in error.reason
    assert remedy in error.remedy
    assert error.exit_code == EXIT_IMAGE
    assert isinstance(error, ValueError)


def test_rwx_does_not_allow_an_entry_outside_every_segment():
    assert "outside every segment" in rejection(tiny(entry=TEXT + 0x10), rwx=True).reason


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "the file is empty"),
        (b"\x7fEL", "not an ELF"),
        (b"hello", "not an ELF"),
        (b"#!/bin/sh\n", "looks like a script"),
        (b"\x1f\x8b\x08", "looks like a gzip file"),
        (b"MZ" + bytes(600), "bzImage"),
        (b"!<arch>\n", "static library"),
    ],
)
def test_rejects_what_is_no_elf(data: bytes, fact: str):
    error = rejection(data)
    assert fact in error.reason
    assert not data or "--base ADDR" in error.remedy


def test_rejects_flat_binaries_that_cannot_lie_there():
    assert "page 0" in rejection(b"\xf4", base=0xFFF).reason
    assert "page 0" in rejection(b"\xf4", base=-5).reason
    assert "outside guest memory" in rejection(b"\xf4\xf4", base=MEMORY - 1).reason
    assert "empty" in rejection(b"", base=0x1000).reason
    error = rejection(tiny(), base=0x1000)
    assert "an ELF" in error.reason
    assert "--base" in error.remedy


# Files.


def test_reads_a_file(tmp_path: Path):
    path = tmp_path / "it.elf"
    path.write_bytes(tiny())
    for source in (path, str(path)):
        image = read(source)
        assert image.path == str(path)
        assert image.data == tiny()
    assert explain(path).startswith(f"{path}: ELF64, EXEC")


def unreadable(source: str | Path) -> ImageNotFoundError:
    error = rejection(source)
    assert isinstance(error, ImageNotFoundError)
    assert isinstance(error, OSError)
    assert error.exit_code == EXIT_NO_INPUT
    assert str(error).startswith(f"{error.path}: {error.reason}")
    return error


def test_rejects_a_missing_file(tmp_path: Path):
    error = unreadable(tmp_path / "none.elf")
    assert error.errno == errno.ENOENT
    assert "no such file" in error.reason
    assert "kvmmm guests" in error.remedy


def test_rejects_a_directory(tmp_path: Path):
    error = unreadable(tmp_path)
    assert (error.errno, error.reason) == (errno.EISDIR, "a directory")


def test_rejects_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, _: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("kvmmm.vmm.image.os.open", refuse)  # root may read anything
    error = unreadable(tmp_path / "it.elf")
    assert error.errno == errno.EACCES
    assert "Permission denied" in error.reason
    assert "chmod +r" in error.remedy


def test_rejects_a_fifo_without_waiting_for_a_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in unreadable(tmp_path / "fifo").reason


def test_rejects_a_device_and_a_name_that_is_none():
    assert "not a regular file" in unreadable("/dev/zero").reason
    assert "null" in unreadable("a\0b").reason
    assert unreadable("x" * 5000).errno == errno.ENAMETOOLONG
    assert unreadable("").errno == errno.ENOENT


def test_a_huge_file_is_rejected_without_reading_it(tmp_path: Path):
    path = tmp_path / "huge"
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)
    assert "the file has 1 TiB" in rejection(path).reason
    with path.open("r+b") as f:
        f.write(tiny(machine=183))
    assert "AArch64" in rejection(path).reason


def test_no_descriptor_is_left_behind(tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "it").write_bytes(tiny())
    for source in (tmp_path, tmp_path / "fifo", tmp_path / "none"):
        unreadable(source)
    read(tmp_path / "it")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_explain_takes_what_read_image_rejects(tmp_path: Path):
    assert explain(b"\x1f\x8b") == "<bytes>: 2 bytes, not an ELF (it looks like a gzip file)"
    assert "AArch64" in explain(tiny(machine=183))
    with pytest.raises(ImageNotFoundError):
        explain(tmp_path / "none")


# Anything at all.

SAMPLE = Elf(
    phdrs=[
        Phdr(flags=R | X, offset=0x200, filesz=0x100),
        Phdr(flags=R | W, offset=0x300, vaddr=TEXT + 0x100, filesz=0x10, memsz=0x3000),
        Phdr(type=4, flags=R, offset=0x310, vaddr=0, filesz=0x10),
    ]
).build()
HEADERS_END = 64 + 3 * 56
FIELDS = [(16, 2), (18, 2), (24, 8), (32, 8), (54, 2), (56, 2)] + [
    (64 + 56 * i + at, size)
    for i in range(3)
    for at, size in ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8))
]
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 56, 0xFFF, 0x1000, TEXT, MEMORY, len(SAMPLE)]),
    st.sampled_from([1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 0x1000]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 2 * MEMORY),
)


def check_outcome(data: bytes, **options: object) -> None:
    try:
        image = read(data, **options)
    except ImageError:
        return
    end = 0x1000
    for segment in image.segments:
        assert end <= segment.start < segment.end <= MEMORY
        assert len(image.contents(segment)) == segment.file_bytes <= segment.end - segment.start
        end = segment.end
    assert any(s.start <= image.entry < s.end and s.perms & EXECUTE for s in image.segments)
    assert all(0x1000 <= start < end <= MEMORY for start, end, _ in image.page_ranges())


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=5), st.booleans())
def test_mutated_fields_are_taken_or_rejected(
    changes: list[tuple[tuple[int, int], int]], rwx: bool
):
    data = bytearray(SAMPLE)
    for (at, size), value in changes:
        data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    check_outcome(bytes(data), rwx=rwx)


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, HEADERS_END - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(SAMPLE)),
)
def test_mutated_bytes_are_taken_or_rejected(changes: list[tuple[int, int]], length: int):
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    check_outcome(bytes(data))
    check_outcome(bytes(data[:length]))


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-(1 << 65), 1 << 65)))
def test_arbitrary_bytes_are_taken_or_rejected(data: bytes, base: int | None):
    check_outcome(data, base=base)
    check_outcome(b"\x7fELF" + data, base=base)
