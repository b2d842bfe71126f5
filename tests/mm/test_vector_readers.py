"""Readers and Writers inside of a copy: what they may do, and what becomes of them that may not."""

from __future__ import annotations

import io
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestBusError, HostBufferError, StateError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.mm.vector import copy_in_to, copy_out_from, with_internal_mappings
from kvmmm.safemem.block import BlockSeq, copy_seq, zero_seq
from kvmmm.safemem.ffi import IOOpts
from tests.mm.conftest import HUGE
from tests.mm.vectors import Sink, Source, seq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
A = 4 * HUGE
B = A + 4 * HUGE
FILE = 32 * HUGE
CONTENT = b"".join(bytes([65 + i]) * PAGE for i in range(4))

BOUNCED = IOOpts(mechanism="walk")
both_ways = pytest.mark.parametrize("opts", [None, BOUNCED], ids=["internal", "buffer"])


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with HostFile.open(path, writable=True) as made:
        yield made


@pytest.fixture
def setup(file: HostFile, make: Make) -> Iterator[Setup]:
    """[A, B) private, and the file's four pages, shared, at FILE."""
    setup = make()
    setup.map(A, B)
    setup.map(FILE, FILE + 4 * PAGE, mappable=file, private=False)
    yield setup
    setup.mm.munmap(0, setup.mm.max_addr)  # while there is a file


# Counts.


@both_ways
@pytest.mark.parametrize(("lie", "error"), [(None, TypeError), (-1, ValueError), (6, ValueError)])
def test_lies(setup: Setup, opts: IOOpts | None, lie: Any, error: type[Exception]):
    class Liar:
        def read_to_blocks(self, _blocks: BlockSeq, /) -> Any:
            return lie

        write_from_blocks = read_to_blocks

    for copy in (copy_out_from, copy_in_to):
        with pytest.raises(error):
            copy(setup.mm, AddrRange(A, A + 5), Liar(), opts=opts)
    setup.mm.munmap(A, PAGE)


# What is lent.


@pytest.mark.parametrize(
    "keep", [lambda b: b.views()[0][1:], lambda b: b.views()[0].cast("c")], ids=["slice", "cast"],
)  # fmt: skip
def test_who_keeps_memory_is_told(setup: Setup, keep: Callable[[BlockSeq], object]):
    class Keeper:
        def write_from_blocks(self, srcs: BlockSeq, /) -> int:
            self.kept = keep(srcs)
            return srcs.n_bytes

    with pytest.raises(StateError, match="still held"):
        copy_in_to(setup.mm, AddrRange(A, A + 5), Keeper())
    setup.mm.munmap(A, PAGE)


def test_who_keeps_the_blocks_cannot_use_them(setup: Setup):
    kept: list[BlockSeq] = []

    def move(blocks: BlockSeq) -> int:
        kept.append(blocks.drop_first(1))
        return 5

    with_internal_mappings(setup.mm, AddrRange(A, A + 5), WRITE, move)
    with pytest.raises(StateError, match="over"):
        kept[0].copy_from(b"late")
    with pytest.raises(StateError, match="over"):
        kept[0].views()


def test_a_writer_cannot_write(setup: Setup):
    """What it sees may be shared with others."""

    class Scribbler:
        def write_from_blocks(self, srcs: BlockSeq, /) -> int:
            assert srcs.views()[0].readonly
            return zero_seq(srcs)

    with pytest.raises(StateError, match="reading only"):
        copy_in_to(setup.mm, AddrRange(A, A + 5), Scribbler())


def test_a_file_that_keeps_what_it_is_given(setup: Setup):
    """It has nothing: what it was given is dead. Slices of it would be an error."""
    kept: list[memoryview] = []

    class Hoarder:
        write = staticmethod(kept.append)

    assert copy_in_to(setup.mm, seq((A, A + 5), (A, A + 1)), Hoarder()) == 6
    assert len(kept) == 2
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


# Operations inside.


@pytest.mark.parametrize("name", ["munmap", "fault", "nested", "invalidate", "fork"])
def test_operations_inside_raise(setup: Setup, name: str):
    mm = setup.mm
    operations: dict[str, Callable[[], object]] = {
        "munmap": lambda: mm.munmap(A, PAGE),
        "fault": lambda: mm.read(A + HUGE, 5),
        "nested": lambda: copy_out_from(mm, AddrRange(A, A + 1), b"x"),
        "invalidate": lambda: mm.invalidate(AddrRange(A, A + PAGE), private=True),
        "fork": lambda: mm.fork(setup.space),
    }
    for copy, other in ((copy_out_from, Source), (copy_in_to, Sink)):
        with pytest.raises(StateError, match="inside a Reader or Writer"):
            copy(mm, AddrRange(A, A + 5), other(b"", before=operations[name]))  # type: ignore[arg-type]
    mm.munmap(A, PAGE)
    assert mm.read(A + HUGE, 5) == bytes(5)


def test_a_copy_inside_that_does_not_fault(setup: Setup):
    """Also of memory of another memory manager, and of a file that this one maps."""
    setup.mm.copy_out(A + PAGE, b"other")
    src = Source(b"", before=lambda: setattr(src, "data", setup.mm.read(A + PAGE, 5)))
    assert copy_out_from(setup.mm, AddrRange(A, A + 5), src) == 5
    assert setup.mm.read(A, 5) == b"other"


def test_reading_a_file_into_its_own_mapping(setup: Setup, file: HostFile):
    with Path(file.name).open("r+b", 0) as raw:
        assert copy_out_from(setup.mm, AddrRange(FILE + PAGE, FILE + 3 * PAGE), raw) == 2 * PAGE
        assert (
            setup.mm.read(FILE, 4 * PAGE) == CONTENT[:PAGE] + CONTENT[: 2 * PAGE] + CONTENT[-PAGE:]
        )
        raw.seek(0)
        assert copy_in_to(setup.mm, AddrRange(FILE + 3 * PAGE, FILE + 4 * PAGE), raw) == PAGE
    assert setup.mm.read(FILE, PAGE) == CONTENT[-PAGE:]


def test_who_takes_memory_away_waits(setup: Setup):
    """For the reader, in whose hands it is."""
    entered, go_on, gone = threading.Event(), threading.Event(), threading.Event()

    def before() -> None:
        entered.set()
        assert go_on.wait(30)

    def unmap() -> None:
        setup.mm.munmap(A, PAGE)
        gone.set()

    src = Source(b"kept?", before)
    reading = threading.Thread(target=copy_out_from, args=(setup.mm, AddrRange(A, A + 5), src))
    unmapping = threading.Thread(target=unmap)
    reading.start()
    assert entered.wait(30)
    where = setup.mm.pmas.find(A)
    assert where is not None
    unmapping.start()
    assert not gone.wait(0.05)
    assert setup.arena.ref_count(A + where[2].delta) == 1
    go_on.set()
    for thread in (reading, unmapping):
        thread.join(30)
        assert not thread.is_alive()
    assert src.data == b""
    assert setup.arena.ref_count(A + where[2].delta) == 0


# Files that end.


@both_ways
def test_a_file_that_has_been_cut(setup: Setup, file: HostFile, opts: IOOpts | None):
    """Known to nobody yet: pmas are there."""
    setup.mm.read(FILE, 4 * PAGE)
    os.truncate(file.name, 2 * PAGE)
    ars = seq((A, A + 3), (FILE + 2 * PAGE - 5, FILE + 2 * PAGE + 5), (A + 9, A + 12))
    setup.mm.copy_out(A, b"abc")
    for out in (io.BytesIO(), Sink()):
        with pytest.raises(GuestBusError) as caught:
            copy_in_to(setup.mm, ars, out, opts=opts)
        assert (caught.value.addr, caught.value.done) == (FILE + 2 * PAGE, 8)
        assert caught.value.access == READ
        if isinstance(out, io.BytesIO):
            assert out.getvalue() == b"abcBBBBB"
    for src in (b"x" * 16, io.BytesIO(b"x" * 16), Source(b"x" * 16)):
        setup.mm.zero_out(A, 20)
        with pytest.raises(GuestBusError) as caught:
            copy_out_from(setup.mm, ars, src, opts=opts)
        assert (caught.value.addr, caught.value.done) == (FILE + 2 * PAGE, 8)
        assert caught.value.access == WRITE
        assert setup.mm.read(A, 12) == b"xxx" + bytes(9)
    assert setup.mm.read(FILE + 2 * PAGE - 6, 6) == b"Bxxxxx"
    assert file.revalidate()


@both_ways
def test_a_file_that_ends(setup: Setup, file: HostFile, opts: IOOpts | None):
    """Known: there is nothing to translate."""
    file.truncate(2 * PAGE)
    ars = seq((FILE + 2 * PAGE - 5, FILE + 2 * PAGE + 5), (A, A + 3))
    with pytest.raises(GuestBusError) as caught:
        copy_out_from(setup.mm, ars, b"x" * 13, opts=opts)
    assert (caught.value.addr, caught.value.done) == (FILE + 2 * PAGE, 5)
    with pytest.raises(GuestBusError) as caught:
        copy_in_to(setup.mm, ars.drop_first(5), Sink(), opts=opts)
    assert (caught.value.addr, caught.value.done) == (FILE + 2 * PAGE, 0)


def test_a_file_that_is_cut_by_the_reader(setup: Setup, file: HostFile):
    src = Source(b"x" * 100, before=lambda: os.truncate(file.name, PAGE))
    with pytest.raises(GuestBusError) as caught:
        copy_out_from(setup.mm, AddrRange(FILE + PAGE - 7, FILE + PAGE + 7), src)
    assert (caught.value.addr, caught.value.done) == (FILE + PAGE, 7)
    assert setup.mm.read(FILE + PAGE - 8, 8) == b"Axxxxxxx"


def test_a_fault_of_other_memory_is_not_the_guests(setup: Setup, file: HostFile):
    """Of blocks that the reader has from elsewhere."""
    from kvmmm.safemem.block import Block, BlockFaultError

    os.truncate(file.name, PAGE)
    own = BlockSeq([Block(file.hva, 2 * PAGE, may_fault=True)]).drop_first(PAGE - 3)
    with pytest.raises(BlockFaultError) as caught:
        with_internal_mappings(
            setup.mm, AddrRange(A, A + 9), WRITE, lambda blocks: copy_seq(blocks, own)
        )
    assert caught.value.loan is own.loan
    setup.mm.munmap(A, PAGE)


@both_ways
def test_the_callers_buffer_faults(setup: Setup, tmp_path: Path, opts: IOOpts | None):
    path = tmp_path / "own"
    path.write_bytes(b"o" * 2 * PAGE)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 2 * PAGE) as own:
        os.truncate(path, PAGE)
        with memoryview(own) as whole, whole[PAGE - 7 :] as part:
            with pytest.raises(HostBufferError) as caught:
                copy_out_from(setup.mm, seq((A, A + 3), (A + 5, A + 50)), part, opts=opts)
            assert (caught.value.offset, caught.value.done) == (7, 7)
            assert setup.mm.read(A, 10) == b"ooo\0\0oooo\0"
            with pytest.raises(HostBufferError) as caught:
                copy_in_to(setup.mm, seq((A, A + 3), (A + 5, A + 50)), part, opts=opts)
            assert (caught.value.offset, caught.value.done) == (7, 7)


# Other sources.


@both_ways
def test_a_pipe(setup: Setup, opts: IOOpts | None):
    reading, writing = os.pipe()
    ars = seq((A, A + 3), (A + HUGE, A + HUGE + 3))
    with io.FileIO(reading, "r") as source, io.FileIO(writing, "w") as sink:
        assert copy_in_to(setup.mm, ars, sink, opts=opts) == 6
        sink.write(b"ab")
        assert copy_out_from(setup.mm, ars, source, opts=opts) == 6
        assert copy_out_from(setup.mm, ars.drop_first(4), source, opts=opts) == 2
        assert setup.mm.read(A + HUGE, 4) == b"\0ab\0"


@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
def test_files(setup: Setup, tmp_path: Path, buffering: int):
    data = os.urandom(3 * HUGE)
    path = tmp_path / "data"
    path.write_bytes(data)
    ars = seq((A + HUGE, A + 3 * HUGE + 5), (FILE + 5, FILE + PAGE), (A, A + HUGE))
    with path.open("rb", buffering) as source, (tmp_path / "out").open("wb", buffering) as sink:
        assert copy_out_from(setup.mm, ars, source) == 3 * HUGE
        assert copy_in_to(setup.mm, ars, sink) == ars.n_bytes
    n_last = 3 * HUGE - 2 * HUGE - 5 - (PAGE - 5)
    assert setup.mm.read(A, n_last) == data[-n_last:]
    assert (tmp_path / "out").read_bytes() == data + bytes(ars.n_bytes - len(data))


def test_not_to_be_read(setup: Setup):
    with pytest.raises(TypeError):
        copy_out_from(setup.mm, AddrRange(A, A + 1), 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        copy_in_to(setup.mm, AddrRange(A, A + 1), "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        copy_in_to(setup.mm, AddrRange(A, A + 1), b"const")  # type: ignore[arg-type]
    assert setup.mm.rss_bytes == 0
