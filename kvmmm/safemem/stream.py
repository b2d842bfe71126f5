"""`Reader` and `Writer`: where bytes come from and go to, a block sequence at a time.

What a caller has (a buffer, a file, a socket) becomes one of them by `as_reader`, `as_writer`.

Source: gVisor pkg/safemem/io.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard

from kvmmm.safemem.block import copy_seq

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer, WriteableBuffer

    from kvmmm.safemem.block import BlockSeq
    from kvmmm.safemem.file_stream import ReadableFile, WritableFile

    Source: TypeAlias = "Reader | ReadableFile | ReadableBuffer | str"
    Destination: TypeAlias = "Writer | WritableFile | WriteableBuffer"


class Reader(Protocol):
    """Where bytes come from."""

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        """Put bytes into `dsts`, from its beginning.

        It is called once at most for a copy, while others that want to unmap memory wait: it must
        not call operations of the memory manager (they raise), nor keep `dsts` or parts of it.

        Keep off other memory managers too. One that maps the same file and has it looked at again
        (`HostFile.revalidate`) tells this one, where that raises, with the work half done; and two
        threads whose Readers unmap memory of each other's memory manager wait for ever.

        Returns:
            How many: fewer than there is room for is no error.
        """


class Writer(Protocol):
    """Where bytes go to."""

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        """Take bytes out of `srcs`, from its beginning; the rest as in `Reader`."""


def as_reader(src: Source) -> Reader:
    """Return a Reader of a buffer's bytes, a text's in UTF-8, a binary file's, or a socket's.

    Raises:
        TypeError: It is none of these.
    """
    if _is_reader(src):
        return src
    if isinstance(src, str):
        return BufferReader(src.encode())
    if is_buffer(src):
        return BufferReader(src)
    from kvmmm.safemem.file_stream import FileReader

    return FileReader(src)  # type: ignore[arg-type]


def as_writer(dst: Destination) -> Writer:
    """Return a Writer into a buffer, a binary file, or a socket.

    Raises:
        TypeError: It is none of these, or cannot be written.
    """
    if _is_writer(dst):
        return dst
    if is_buffer(dst):
        return BufferWriter(dst)
    from kvmmm.safemem.file_stream import FileWriter

    return FileWriter(dst)  # type: ignore[arg-type]


def _is_reader(what: object) -> TypeGuard[Reader]:
    # isinstance with a protocol takes as long as copying a page.
    return hasattr(what, "read_to_blocks")


def _is_writer(what: object) -> TypeGuard[Writer]:
    return hasattr(what, "write_from_blocks")


def is_buffer(what: object) -> TypeGuard[bytearray]:
    """Return whether something exports its bytes, as a bytearray does; maybe for reading only."""
    try:
        memoryview(what).release()  # type: ignore[arg-type]
    except TypeError:
        return False
    # Who is a Reader or Writer is that first.
    return not hasattr(what, "read_to_blocks") and not hasattr(what, "write_from_blocks")


def checked_count(n_bytes: int | None, limit: int, who: object) -> int:
    """Return how many bytes a Reader, Writer or file says it has moved, if that can be.

    Raises:
        TypeError: It is no number.
        ValueError: It is below 0, or more than `limit`.
    """
    if not isinstance(n_bytes, int) or isinstance(n_bytes, bool):
        raise TypeError(f"{who!r} returned {n_bytes!r}, not how many bytes it has moved")
    if not 0 <= n_bytes <= limit:
        raise ValueError(f"{who!r} says it has moved {n_bytes} bytes of {limit}")
    return n_bytes


class BufferReader:
    """Reads a buffer, from its beginning to its end.

    Raises (when it reads):
        HostBufferError: The buffer itself faults.
        TypeError: It is no contiguous buffer.
    """

    __slots__ = ("_data", "_position")

    def __init__(self, data: ReadableBuffer) -> None:
        self._data = data
        self._position = 0

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        """See `Reader`."""
        n_bytes = dsts.copy_from(self._data, self._position)
        self._position += n_bytes
        return n_bytes


class BufferWriter:
    """Fills a buffer, from its beginning to its end.

    Raises (when it writes):
        HostBufferError: The buffer itself faults.
        TypeError: It is no contiguous buffer, or read-only.
    """

    __slots__ = ("_data", "_position")

    def __init__(self, data: WriteableBuffer) -> None:
        self._data = data
        self._position = 0

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        """See `Writer`."""
        n_bytes = srcs.copy_to(self._data, self._position)
        self._position += n_bytes
        return n_bytes


class BlockSeqReader:
    """Reads a block sequence, which shrinks.

    Attributes:
        blocks: What is left.
    """

    __slots__ = ("blocks",)

    def __init__(self, blocks: BlockSeq) -> None:
        self.blocks = blocks

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        """See `Reader`."""
        n_bytes = copy_seq(dsts, self.blocks)
        self.blocks = self.blocks.drop_first(n_bytes)
        return n_bytes


class BlockSeqWriter:
    """Fills a block sequence, which shrinks. When it is full, it takes nothing, without an error.

    Attributes:
        blocks: What is left.
    """

    __slots__ = ("blocks",)

    def __init__(self, blocks: BlockSeq) -> None:
        self.blocks = blocks

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        """See `Writer`."""
        n_bytes = copy_seq(self.blocks, srcs)
        self.blocks = self.blocks.drop_first(n_bytes)
        return n_bytes


def read_full(reader: Reader, dsts: BlockSeq) -> int:
    """Read until `dsts` is full, or nothing more comes; how many bytes that are.

    Raises:
        TypeError, ValueError: The reader returned what cannot be.

    Source: gVisor safemem.ReadFullToBlocks.
    """
    return _again(reader.read_to_blocks, dsts, reader)


def write_full(writer: Writer, srcs: BlockSeq) -> int:
    """Write until all of `srcs` is taken, or nothing more is; how many bytes that are.

    Raises:
        TypeError, ValueError: The writer returned what cannot be.

    Source: gVisor safemem.WriteFullFromBlocks.
    """
    return _again(writer.write_from_blocks, srcs, writer)


def _again(move: Callable[[BlockSeq], int], blocks: BlockSeq, who: object) -> int:
    # Ends with the first 0: whoever goes on returning that would never end.
    done = 0
    while not blocks.is_empty:
        n_bytes = checked_count(move(blocks), blocks.n_bytes, who)
        if not n_bytes:
            break
        done += n_bytes
        blocks = blocks.drop_first(n_bytes)
    return done
