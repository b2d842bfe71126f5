"""Readers and Writers: gVisor's io_test.go scenarios, buffers, and those that misbehave."""

from __future__ import annotations

import array
import io
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.safemem.stream import (
    BlockSeqReader,
    BlockSeqWriter,
    BufferReader,
    BufferWriter,
    as_reader,
    as_writer,
    checked_count,
    read_full,
    write_full,
)
from tests.safemem.memory import Memory

if TYPE_CHECKING:
    from kvmmm.safemem.block import BlockSeq


class Capped:
    """A file that moves no more than so many bytes at once.

    Attributes:
        calls: How many bytes each call was given.
    """

    def __init__(self, data: bytes = b"", at_once: int = 1) -> None:
        self.file = io.BytesIO(data)
        self.at_once = at_once
        self.calls: list[int] = []

    def readinto(self, buffer: memoryview) -> int:
        self.calls.append(len(buffer))
        with buffer[: self.at_once] as part:
            return self.file.readinto(part)

    def write(self, data: memoryview) -> int:
        self.calls.append(len(data))
        with data[: self.at_once] as part:
            return self.file.write(part)


@pytest.fixture
def dst() -> Memory:
    return Memory([b"...", b"", b"..."])


@pytest.fixture
def src() -> Memory:
    return Memory([b"foo", b"", b"bar"])


# Scenarios.


def test_full_read(dst: Memory):
    assert as_reader(io.BytesIO(b"foobarbaz")).read_to_blocks(dst.seq()) == 6
    assert dst.bytes() == b"foobar"


def test_partial_read(dst: Memory):
    assert as_reader(io.BytesIO(b"foob")).read_to_blocks(dst.seq()) == 4
    assert dst.bytes() == b"foob.."


def test_single_byte_reader(dst: Memory):
    file = Capped(b"foobar")
    reader = as_reader(file)
    assert reader.read_to_blocks(dst.seq()) == 1
    assert file.calls == [3]  # the first short read ends it
    assert dst.bytes() == b"f....."
    file.file.seek(0)
    assert read_full(reader, dst.seq()) == 6
    assert dst.bytes() == b"foobar"


def test_full_write(src: Memory):
    file = io.BytesIO()
    assert as_writer(file).write_from_blocks(src.seq(writable=False)) == 6
    assert file.getvalue() == b"foobar"


def test_partial_write(src: Memory):
    room = bytearray(4)
    assert as_writer(room).write_from_blocks(src.seq(writable=False)) == 4
    assert room == b"foob"


def test_single_byte_writer(src: Memory):
    file = Capped()
    writer = as_writer(file)
    assert writer.write_from_blocks(src.seq(writable=False)) == 1
    assert file.file.getvalue() == b"f"
    file.file.seek(0)
    assert write_full(writer, src.seq(writable=False)) == 6
    assert file.file.getvalue() == b"foobar"


def test_nothing(dst: Memory):
    file = Capped(b"foobar")
    nothing = dst.seq().take_first(0)
    assert as_reader(file).read_to_blocks(nothing) == 0
    assert as_writer(file).write_from_blocks(nothing) == 0
    assert not file.calls


# Buffers.


@pytest.mark.parametrize(
    "data",
    [b"foobarbaz", bytearray(b"foobarbaz"), memoryview(b"foobarbaz"), "foobarbaz",
     array.array("B", b"foobarbaz")],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_buffers_are_read(dst: Memory, data: Any):
    reader = as_reader(data)
    assert isinstance(reader, BufferReader)
    assert reader.read_to_blocks(dst.seq()) == 6
    assert dst.bytes() == b"foobar"
    assert reader.read_to_blocks(dst.seq()) == 3
    assert dst.bytes() == b"bazbar"
    assert reader.read_to_blocks(dst.seq()) == 0


def test_text_is_utf8(dst: Memory):
    assert as_reader("äßø").read_to_blocks(dst.seq()) == 6
    assert dst.bytes() == "äßø".encode()


def test_buffers_are_filled(src: Memory):
    numbers = array.array("H", [0xFFFF] * 7)
    writer = as_writer(numbers)
    assert isinstance(writer, BufferWriter)
    assert [writer.write_from_blocks(src.seq()) for _ in range(4)] == [6, 6, 2, 0]
    assert numbers.tobytes() == b"foobarfoobarfo"
    numbers.append(1)  # nobody holds it


def test_a_constant_cannot_be_filled(src: Memory):
    with pytest.raises(TypeError):
        as_writer(b"const").write_from_blocks(src.seq())  # type: ignore[arg-type]


# Block sequences.


def test_block_seq_reader_and_writer(dst: Memory, src: Memory):
    reader = BlockSeqReader(src.seq(writable=False))
    assert reader.read_to_blocks(dst.seq().take_first(4)) == 4
    assert reader.blocks.n_bytes == 2
    assert reader.read_to_blocks(dst.seq().drop_first(1)) == 2
    assert (reader.read_to_blocks(dst.seq()), dst.bytes()) == (0, b"farb..")
    writer = BlockSeqWriter(dst.seq())
    assert writer.write_from_blocks(src.seq().drop_first(2)) == 4
    assert writer.write_from_blocks(src.seq()) == 2
    assert (writer.write_from_blocks(src.seq()), dst.bytes()) == (0, b"obarfo")


# Others.


def test_what_is_a_reader_is_one():
    class Own:
        def read_to_blocks(self, dsts: BlockSeq, /) -> int:
            return dsts.copy_from(b"own")

        def write_from_blocks(self, srcs: BlockSeq, /) -> int:
            return srcs.n_bytes

    own = Own()
    assert as_reader(own) is own
    assert as_writer(own) is own


@pytest.mark.parametrize("refused", [None, 7, object(), io.StringIO("text")], ids=repr)
def test_what_is_none(refused: Any):
    with pytest.raises(TypeError):
        as_reader(refused)
    with pytest.raises(TypeError):
        as_writer(refused)


@pytest.mark.parametrize("wrong", [None, True, "3", 2.0])
def test_a_count_is_a_number(wrong: Any):
    with pytest.raises(TypeError, match="not how many bytes"):
        checked_count(wrong, 5, "who")


@pytest.mark.parametrize("wrong", [-1, 6, 1 << 70])
def test_a_count_has_bounds(wrong: int):
    assert [checked_count(n, 5, "who") for n in range(6)] == list(range(6))
    with pytest.raises(ValueError, match="of 5"):
        checked_count(wrong, 5, "who")


def test_who_returns_0_for_ever_is_asked_once(dst: Memory):
    class Idle:
        calls = 0

        def read_to_blocks(self, _dsts: BlockSeq, /) -> int:
            self.calls += 1
            return 0

        write_from_blocks = read_to_blocks

    idle = Idle()
    assert read_full(idle, dst.seq()) == 0
    assert write_full(idle, dst.seq()) == 0
    assert idle.calls == 2


def test_full_validates(dst: Memory):
    class Liar:
        def read_to_blocks(self, dsts: BlockSeq, /) -> int:
            return dsts.n_bytes + 1

    with pytest.raises(ValueError, match="7 bytes of 6"):
        read_full(Liar(), dst.seq())
