"""Binary files and sockets as Readers and Writers.

Bytes go straight from and to the blocks, by one readv, writev, recvmsg or sendmsg where the file is
a descriptor. Blocks that may fault go through a buffer: a file object's memcpy must not meet them.

    ┌ a round ────────────────────────────────────────────────┐
    blocks ──► views, or a buffer for what may fault ──► one call ──► its count
    └ the next, while every byte was moved and another call is no wait ┘

A short count ends it, as an end of file does. An exception of the file's comes out as it is.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvmmm.safemem.block import BlockFaultError
from kvmmm.safemem.stream import checked_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

    from kvmmm.safemem.block import BlockSeq

    class ReadsInto(Protocol):
        """A file that fills buffers."""

        def readinto(self, buffer: WriteableBuffer, /) -> int | None:
            """Fill it, or some of it."""

    class Reads(Protocol):
        """A file that makes bytes."""

        def read(self, n_bytes: int, /) -> bytes | None:
            """Return no more than so many."""

    class Receives(Protocol):
        """A socket."""

        def recvmsg_into(self, buffers: list[memoryview], /) -> tuple[int, Any, Any, Any]:
            """Fill buffers, or some of them."""

    class Writes(Protocol):
        """A file that takes buffers."""

        def write(self, data: memoryview, /) -> int | None:
            """Take it, or some of it; a raw file's None means that it would have to wait."""

    class Sends(Protocol):
        """A socket."""

        def sendmsg(self, buffers: list[memoryview], /) -> int:
            """Take buffers, or some of them."""

    ReadableFile: TypeAlias = ReadsInto | Reads | Receives
    WritableFile: TypeAlias = Writes | Sends

_BUFFERS_MAX = 1024  # IOV_MAX
_BOUNCE_MAX_BYTES = 64 << 10


class FileReader:
    """Reads a file object: a raw `io.FileIO`, a socket, or whatever has `readinto` or `read`.

    Raises:
        TypeError: It is none of these, or a text file.
    """

    __slots__ = ("_file", "_read", "_vectored")

    def __init__(self, file: ReadableFile) -> None:
        _refuse_text(file)
        self._file: Any = file
        self._vectored = True
        self._read: Callable[[list[memoryview]], int]
        if type(file) is io.FileIO:
            self._read = self._readv
        elif hasattr(file, "recvmsg_into"):
            self._read = self._receive
        else:
            self._vectored = False
            if not hasattr(file, "readinto") and not hasattr(file, "read"):
                raise TypeError(f"{file!r} is no buffer, no binary file, no socket and no Reader")
            self._read = self._readinto if hasattr(file, "readinto") else self._read_bytes

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        """See `kvmmm.safemem.stream.Reader`; 0 at the end of the file.

        Raises:
            BlockingIOError: It has nothing now, and does not wait.
            TypeError, ValueError: The file returned what cannot be.
        """
        return _in_rounds(self._round, dsts, self._file, vectored=self._vectored)

    def _round(self, dsts: BlockSeq) -> tuple[int, int]:
        # (bytes wanted, bytes read) of one call.
        buffers: list[memoryview] = []
        bounce = None
        direct = 0
        for block in dsts:
            if block.may_fault:
                # The last one: nothing may be written behind a block that turns out to fault.
                bounce = memoryview(bytearray(min(block.length_bytes, _BOUNCE_MAX_BYTES)))
                buffers.append(bounce)
                break
            buffers.append(dsts.loan.view(block.hva, block.length_bytes))
            direct += block.length_bytes
            if len(buffers) == (_BUFFERS_MAX if self._vectored else 1):
                break
        wanted = sum(map(len, buffers))
        n_bytes = checked_count(self._read(buffers), wanted, self._file)
        if bounce is not None and n_bytes > direct:
            dsts.drop_first(direct).copy_from(bounce[: n_bytes - direct])
        return wanted, n_bytes

    def _readv(self, buffers: list[memoryview]) -> int:
        return os.readv(self._file.fileno(), buffers)

    def _receive(self, buffers: list[memoryview]) -> int:
        n_bytes: int = self._file.recvmsg_into(buffers)[0]
        return n_bytes

    def _readinto(self, buffers: list[memoryview]) -> int:
        n_bytes: int | None = self._file.readinto(buffers[0])
        if n_bytes is None:
            raise _would_wait(self._file)
        return n_bytes

    def _read_bytes(self, buffers: list[memoryview]) -> int:
        data = self._file.read(len(buffers[0]))
        if data is None:
            raise _would_wait(self._file)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"{self._file!r} read {type(data).__name__}, not bytes")
        n_bytes = checked_count(len(data), len(buffers[0]), self._file)
        buffers[0][:n_bytes] = data
        return n_bytes


class FileWriter:
    """Writes to a file object: a raw `io.FileIO`, a socket, or whatever has `write`.

    Raises:
        TypeError: It is none of these, or a text file.
    """

    __slots__ = ("_file", "_vectored", "_write")

    def __init__(self, file: WritableFile) -> None:
        _refuse_text(file)
        self._file: Any = file
        self._vectored = True
        self._write: Callable[[list[memoryview]], int]
        if type(file) is io.FileIO:
            self._write = self._writev
        elif hasattr(file, "sendmsg"):
            self._write = self._send
        elif hasattr(file, "write"):
            self._vectored = False
            self._write = self._write_one
        else:
            raise TypeError(f"{file!r} is no writable buffer, binary file, socket or Writer")

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        """See `kvmmm.safemem.stream.Writer`.

        Raises:
            BlockFaultError: A block cannot be read; what comes before it was written.
            BlockingIOError: It takes nothing now, and does not wait.
            TypeError, ValueError: The file returned what cannot be.
        """
        return _in_rounds(self._round, srcs, self._file, vectored=self._vectored)

    def _round(self, srcs: BlockSeq) -> tuple[int, int]:
        # (bytes wanted, bytes written) of one call.
        buffers: list[memoryview] = []
        fault = None
        wanted = bounced = 0
        for block in srcs:
            if block.may_fault:
                buffer = bytearray(min(block.length_bytes, _BOUNCE_MAX_BYTES))
                try:
                    n_bytes = srcs.drop_first(wanted).copy_to(buffer)
                except BlockFaultError as error:
                    fault, n_bytes = error, error.done
                buffers += [memoryview(buffer)[:n_bytes]] if n_bytes else []
                bounced += n_bytes
            else:
                n_bytes = block.length_bytes
                buffers.append(srcs.loan.view(block.hva, n_bytes))
            wanted += n_bytes
            if (
                fault is not None or n_bytes < block.length_bytes or bounced >= _BOUNCE_MAX_BYTES
                or len(buffers) == (_BUFFERS_MAX if self._vectored else 1)
            ):  # fmt: skip
                break
        n_bytes = checked_count(self._write(buffers), wanted, self._file) if wanted else 0
        if fault is not None and n_bytes == wanted:
            raise fault
        return wanted, n_bytes

    def _writev(self, buffers: list[memoryview]) -> int:
        return os.writev(self._file.fileno(), buffers)

    def _send(self, buffers: list[memoryview]) -> int:
        n_bytes: int = self._file.sendmsg(buffers)
        return n_bytes

    def _write_one(self, buffers: list[memoryview]) -> int:
        n_bytes: int | None = self._file.write(buffers[0])
        if n_bytes is not None:
            return n_bytes
        if isinstance(self._file, io.RawIOBase):
            raise _would_wait(self._file)
        return len(buffers[0])  # many that are no `io` files return nothing


def _in_rounds(
    move: Callable[[BlockSeq], tuple[int, int]], blocks: BlockSeq, file: Any,  # noqa: ANN401 - a file object
    *, vectored: bool,
) -> int:  # fmt: skip
    done = 0
    while not blocks.is_empty:
        try:
            wanted, n_bytes = move(blocks)
        except BlockingIOError as error:
            # A buffered writer says how much it took nevertheless.
            done += getattr(error, "characters_written", 0)
            if not done:
                raise
            break
        except BlockFaultError:
            raise
        except Exception as error:
            if done:
                error.add_note(f"after {done} bytes")
            raise
        done += n_bytes
        if n_bytes < wanted or n_bytes == blocks.n_bytes or (vectored and not _is_regular(file)):
            break
        blocks = blocks.drop_first(n_bytes)
    return done


def _is_regular(file: Any) -> bool:  # noqa: ANN401 - a file object
    # Another call after one that moved everything: on a pipe it may wait, and a socket's message is
    # one call.
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def _refuse_text(file: object) -> None:
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"{file!r} is a text file: open it in binary mode")


def _would_wait(file: object) -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, f"{file!r} would have to wait, and is set not to")
