"""Files and sockets as Readers and Writers: real, raw and odd ones, and blocks that fault."""

from __future__ import annotations

import errno
import io
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.safemem.block import Block, BlockFaultError, BlockSeq
from kvmmm.safemem.loan import Loan
from kvmmm.safemem.stream import as_reader, as_writer
from tests.safemem.memory import PAGE, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmmm.memmap.host_file import HostFile

Pipe = tuple[io.FileIO, io.FileIO]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    with io.FileIO(reading, "r") as source, io.FileIO(writing, "w") as sink:
        yield source, sink


class OnlyReads:
    """What has `read` and nothing else."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, n_bytes: int) -> bytes:
        return self._file.read(n_bytes)


class OnlyWrites:
    """What has a `write` that returns nothing."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: memoryview) -> None:
        self.data += data


PARTS = st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.booleans()), max_size=6)


@given(PARTS, st.binary(max_size=60))
def test_every_file_gives_the_same(parts: list[tuple[bytes, bool]], data: bytes):
    old = b"".join(part for part, _ in parts)
    n_bytes = min(len(old), len(data))

    def check(file: Any) -> None:
        memory = Memory([part for part, _ in parts], may_fault=[fault for _, fault in parts])
        seq = memory.seq()
        assert as_reader(file).read_to_blocks(seq) == n_bytes
        seq.loan.end()
        assert memory.bytes() == data[:n_bytes] + old[n_bytes:]

    for file in (data, io.BytesIO(data), OnlyReads(data), io.BufferedReader(io.BytesIO(data))):
        check(file)
    fd = os.memfd_create("data")
    with io.FileIO(fd, "r+") as raw:
        raw.write(data)
        raw.seek(0)
        check(raw)
        assert raw.tell() == n_bytes


@given(PARTS)
def test_every_file_takes_the_same(parts: list[tuple[bytes, bool]]):
    memory = Memory([part for part, _ in parts], may_fault=[fault for _, fault in parts])
    data = memory.bytes()

    def write(file: Any) -> None:
        seq = memory.seq(writable=False)
        assert as_writer(file).write_from_blocks(seq) == len(data)
        seq.loan.end()

    plain, odd, room = io.BytesIO(), OnlyWrites(), bytearray(len(data))
    for file in (plain, odd, room):
        write(file)
    assert plain.getvalue() == odd.data == room == data
    with io.FileIO(os.memfd_create("data"), "r+") as raw:
        write(raw)
        assert os.pread(raw.fileno(), 999, 0) == data


def test_more_blocks_than_one_call_takes(tmp_path: Path):
    data = bytes(i * 7 & 0xFF for i in range(2500))
    memory = Memory([b"."] * 2500)
    path = tmp_path / "data"
    path.write_bytes(data)
    with io.FileIO(path) as raw:
        assert as_reader(raw).read_to_blocks(memory.seq()) == 2500
    assert memory.bytes() == data
    with io.FileIO(path, "w") as raw:
        assert as_writer(raw).write_from_blocks(memory.seq()) == 2500
    assert path.read_bytes() == data


# Pipes and sockets.


def test_a_pipe_gives_what_it_has(pipe: Pipe):
    source, sink = pipe
    memory = Memory([b"...", b"..."])
    sink.write(b"foob")
    assert as_reader(source).read_to_blocks(memory.seq()) == 4
    assert memory.bytes() == b"foob.."
    sink.close()
    assert as_reader(source).read_to_blocks(memory.seq()) == 0


def test_a_pipe_is_not_waited_for_once_it_has_given(pipe: Pipe):
    source, sink = pipe
    memory = Memory([b"...", b"..."], may_fault=[True, True])
    sink.write(b"foo")
    assert as_reader(source).read_to_blocks(memory.seq()) == 3
    assert memory.bytes() == b"foo..."


def test_a_pipe_that_does_not_wait(pipe: Pipe):
    source, sink = pipe
    os.set_blocking(source.fileno(), False)
    os.set_blocking(sink.fileno(), False)
    big = Memory([b"x" * (1 << 20)])
    with pytest.raises(BlockingIOError):
        as_reader(source).read_to_blocks(big.seq())
    written = as_writer(sink).write_from_blocks(big.seq())
    assert 0 < written < 1 << 20
    with pytest.raises(BlockingIOError):
        as_writer(sink).write_from_blocks(big.seq())
    assert as_reader(source).read_to_blocks(big.seq()) == written


def test_the_other_end_is_closed(pipe: Pipe):
    source, sink = pipe
    source.close()
    memory = Memory([b"abc"])
    with pytest.raises(BrokenPipeError):
        as_writer(sink).write_from_blocks(memory.seq())


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("may_fault", [False, True])
def test_sockets(kind: socket.SocketKind, may_fault: bool):
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    src = Memory([b"foo", b"bar"], may_fault=[may_fault] * 2)
    dst = Memory([b"..", b"....", b".."], may_fault=[False, may_fault, False])
    with one, other:
        assert as_writer(one).write_from_blocks(src.seq()) == 6
        assert as_reader(other).read_to_blocks(dst.seq()) == 6
        assert dst.bytes() == b"foobar.."
        other.settimeout(0.01)
        with pytest.raises(TimeoutError):
            as_reader(other).read_to_blocks(dst.seq())


class Raw(io.RawIOBase):
    """A raw file: what is to come of each call, in order."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, _buffer: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    write = readinto


@pytest.mark.parametrize("direction", ["read", "write"])
class TestAnswers:
    """What a raw file may answer, and what it may not."""

    def move(self, direction: str, answers: list[Any]) -> int:
        memory, raw = Memory([b"foo", b"bar"]), Raw(answers)
        try:
            if direction == "read":
                return as_reader(raw).read_to_blocks(memory.seq())
            return as_writer(raw).write_from_blocks(memory.seq())
        finally:
            assert not raw.answers  # each was asked for
            raw.close()

    def test_counts(self, direction: str):
        assert self.move(direction, [0]) == 0
        assert self.move(direction, [2]) == 2
        assert self.move(direction, [3, 0]) == 3
        assert self.move(direction, [3, 3]) == 6

    def test_would_wait(self, direction: str):
        with pytest.raises(BlockingIOError) as caught:
            self.move(direction, [None])
        assert caught.value.errno == errno.EAGAIN
        assert self.move(direction, [3, None]) == 3
        assert self.move(direction, [3, BlockingIOError(errno.EAGAIN, "later")]) == 3

    def test_some_was_taken_before_it_would_wait(self, direction: str):
        assert self.move(direction, [BlockingIOError(errno.EAGAIN, "later", 2)]) == 2
        assert self.move(direction, [3, BlockingIOError(errno.EAGAIN, "later", 2)]) == 5

    def test_lies(self, direction: str):
        for lie in (-1, 4):
            with pytest.raises(ValueError, match="of 3"):
                self.move(direction, [lie])
        with pytest.raises(TypeError):
            self.move(direction, ["3"])

    def test_its_error_is_the_callers(self, direction: str):
        error = OSError(errno.EIO, "dust")
        with pytest.raises(OSError, match="dust") as caught:
            self.move(direction, [3, error])
        assert caught.value is error
        assert error.__notes__ == ["after 3 bytes"]
        with pytest.raises(ZeroDivisionError) as first:
            self.move(direction, [ZeroDivisionError()])
        assert not hasattr(first.value, "__notes__")


def test_read_returns_bytes_and_no_more_than_asked():
    class Odd(OnlyReads):
        def read(self, n_bytes: int) -> Any:
            return answers.pop(0) if answers else b"x" * n_bytes

    memory = Memory([b"..."])
    answers: list[Any] = ["text"]
    with pytest.raises(TypeError, match="read str, not bytes"):
        as_reader(Odd(b"")).read_to_blocks(memory.seq())
    answers = [b"four"]
    with pytest.raises(ValueError, match="4 bytes of 3"):
        as_reader(Odd(b"")).read_to_blocks(memory.seq())
    answers = [None]
    with pytest.raises(BlockingIOError):
        as_reader(Odd(b"")).read_to_blocks(memory.seq())
    assert memory.bytes() == b"..."
    assert as_reader(Odd(b"")).read_to_blocks(memory.seq()) == 3


def test_text_files_are_refused(tmp_path: Path):
    path = tmp_path / "text"
    with path.open("w+", encoding="utf-8") as file:
        for adapt in (as_reader, as_writer):
            with pytest.raises(TypeError, match="binary mode"):
                adapt(file)  # type: ignore[arg-type]


# Blocks that fault.


def faulting(cut: HostFile, other: Memory, before: int, *, writable: bool) -> BlockSeq:
    """`before` bytes, then a fault, and then the rest of `other`."""
    first = Block(cut.hva + PAGE - before, before + 50, may_fault=True)
    return BlockSeq([*other.blocks[:1], first, *other.blocks[1:]], Loan(writable=writable))


FILES = ["raw", "buffered", "pipe", "socket"]


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path, pipe: Pipe) -> Iterator[tuple[Any, Any]]:
    """(one to read from, which has 200 letters a to j; one to write to)."""
    data = b"abcdefghij" * 20
    path = tmp_path / "data"
    path.write_bytes(data)
    if request.param == "pipe":
        pipe[1].write(data)
        yield pipe
    elif request.param == "socket":
        one, other = socket.socketpair()
        with one, other:
            other.send(data)
            yield one, one
    else:
        buffering = 0 if request.param == "raw" else -1
        with path.open("rb", buffering) as source, (tmp_path / "out").open("wb", buffering) as sink:
            yield source, sink


@pytest.mark.parametrize("before", [0, 1, 30])
def test_reading_into_a_fault(file: tuple[Any, Any], cut: HostFile, before: int):
    other = Memory([b"....", b"untouched"])
    seq = faulting(cut, other, before, writable=True)
    with pytest.raises(BlockFaultError) as caught:
        as_reader(file[0]).read_to_blocks(seq)
    assert caught.value.loan is seq.loan
    assert caught.value.position == 4 + before
    seq.loan.end()
    assert other.bytes() == b"abcduntouched"
    with open(cut.fd, "rb", closefd=False) as written:
        assert written.read()[PAGE - before :] == (b"abcdefghij" * 4)[4 : 4 + before]


@pytest.mark.parametrize("before", [0, 1, 30])
def test_writing_from_a_fault(file: tuple[Any, Any], cut: HostFile, before: int, tmp_path: Path):
    """What comes before the fault is written, and nothing else."""
    other = Memory([b"head", b"tail"])
    seq = faulting(cut, other, before, writable=False)
    with pytest.raises(BlockFaultError) as caught:
        as_writer(file[1]).write_from_blocks(seq)
    assert caught.value.position == 4 + before
    seq.loan.end()
    if (tmp_path / "out").exists():
        file[1].flush()
        wanted = b"head" + (bytes(range(256)) * 16)[PAGE - before :]
        assert (tmp_path / "out").read_bytes() == wanted


def test_writing_less_than_what_comes_before_a_fault(cut: HostFile):
    """The earlier end wins: the writer took no more, and did not complain."""
    other = Memory([b"", b"tail"])
    seq = faulting(cut, other, 30, writable=False)
    raw = Raw([7])
    assert as_writer(raw).write_from_blocks(seq) == 7
    raw.close()


def test_big_blocks_go_through_small_buffers(tmp_path: Path):
    """200 KiB that may fault, and do not."""
    from kvmmm.memmap.host_file import HostFile

    data = os.urandom(200 << 10)
    path = tmp_path / "data"
    path.write_bytes(data)
    with HostFile.open(path, writable=True) as file:
        blocks = [Block(file.hva, len(data), may_fault=True)]
        for out in (io.BytesIO(), io.FileIO(tmp_path / "out", "w+")):
            assert as_writer(out).write_from_blocks(BlockSeq(blocks)) == len(data)
            out.seek(0)
            assert out.read() == data
            out.seek(7)
            assert as_reader(out).read_to_blocks(BlockSeq(blocks)) == len(data) - 7
            out.close()
            assert path.read_bytes()[:-7] == data[7:]
            with path.open("r+b", 0) as again:
                again.write(data)
