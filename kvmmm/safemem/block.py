"""`BlockSeq`: host memory in pieces, lent for one call, and moving its bytes."""

from __future__ import annotations

import errno
import signal as _signal
from typing import TYPE_CHECKING, Self

from kvmmm.errors import HostBufferError, KvmmmError, RangeError, StateError
from kvmmm.safemem.ffi import own_faults, safe_copy, safe_zero
from kvmmm.safemem.loan import Loan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer


class BlockFaultError(KvmmmError, OSError):
    """Host memory could not be accessed: a mapping of a file that was cut short.

    The memory manager makes a `GuestBusError` of it, with the guest's address.

    Attributes:
        loan: Whose memory it is.
        position: Of the byte, in the sequence that was lent.
        done: Bytes that the call moved before it.
        signal: SIGBUS or SIGSEGV.
        errno: EFAULT.
    """

    def __init__(self, loan: Loan, position: int, done: int, signal: int) -> None:
        self.loan = loan
        self.position = position
        self.done = done
        self.signal = signal
        name = "SIGSEGV" if signal == _signal.SIGSEGV else "SIGBUS"
        super().__init__(
            errno.EFAULT,
            f"the host cannot access byte {position} of this memory: {name} ({done} bytes done)",
        )

    def __str__(self) -> str:
        return str(self.strerror)


class Block:
    """A piece of host memory. Immutable.

    Attributes:
        hva: Host address.
        length_bytes: Its length.
        may_fault: Whether touching it may be a SIGBUS. Then only `copy_seq` and its like may.
    """

    __slots__ = ("hva", "length_bytes", "may_fault")

    def __init__(self, hva: int, length_bytes: int, *, may_fault: bool = False) -> None:
        self.hva = hva
        self.length_bytes = length_bytes
        self.may_fault = may_fault

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return (self.hva, self.length_bytes, self.may_fault) == (
            other.hva, other.length_bytes, other.may_fault,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.hva, self.length_bytes, self.may_fault))

    def __repr__(self) -> str:
        return f"<block {self.hva:#x}+{self.length_bytes:#x}{' may fault' * self.may_fault}>"


class BlockSeq:
    """A window over blocks, one after the other. Immutable; blocks without bytes are not seen.

    A Reader gets one to put bytes into, a Writer one to take bytes from, for the time of one call:
    afterwards it raises. `copy_from` and `copy_to` go for all of them; `views` are for those that
    hand buffers to somebody else.

    Attributes:
        loan: Whose memory it is, and until when.
        may_fault: Whether a block may fault, of all that it was made from.
        n_bytes: Bytes in it.
        position: How many bytes come before it, in the sequence that it was made from.

    Source: gVisor safemem.BlockSeq.
    """

    # The blocks from _index on, the first without its first _offset bytes, n_bytes of all these.
    __slots__ = ("_blocks", "_index", "_offset", "loan", "may_fault", "n_bytes", "position")

    def __init__(self, blocks: Iterable[Block] = (), loan: Loan | None = None) -> None:
        self._blocks = tuple([block for block in blocks if block.length_bytes])
        self._index = self._offset = self.position = 0
        self.n_bytes = sum([block.length_bytes for block in self._blocks])
        self.may_fault = any(block.may_fault for block in self._blocks)
        self.loan = loan or Loan(writable=True)

    @classmethod
    def of_buffer(cls, buffer: ReadableBuffer, *, writable: bool = False) -> Self:
        """Return a buffer's memory. As a context manager it lets go of the buffer at the end.

        Raises:
            TypeError: It is no buffer, not contiguous, or read-only.
        """
        loan = Loan(writable=writable)
        hva, length_bytes = loan.hold(buffer)
        # Anything else may be the mapping of a file.
        exporter = buffer.obj if isinstance(buffer, memoryview) else buffer
        may_fault = not isinstance(exporter, bytes | bytearray)
        return cls([Block(hva, length_bytes, may_fault=may_fault)], loan)

    def _part(self, index: int, offset: int, n_bytes: int, position: int) -> Self:
        part = object.__new__(type(self))
        part._blocks = self._blocks
        part._index = index
        part._offset = offset
        part.n_bytes = n_bytes
        part.position = position
        part.loan = self.loan
        part.may_fault = self.may_fault
        return part

    @property
    def is_empty(self) -> bool:
        """Whether there are no bytes."""
        return not self.n_bytes

    @property
    def n_blocks(self) -> int:
        """Blocks with bytes."""
        return sum(1 for _ in self)

    @property
    def head(self) -> Block:
        """The first block.

        Raises:
            IndexError: There is none.
        """
        for block in self:
            return block
        raise IndexError("an empty sequence has no first block")

    @property
    def tail(self) -> Self:
        """All but the first block.

        Raises:
            IndexError: There is none.
        """
        return self.drop_first(self.head.length_bytes)

    def drop_first(self, n_bytes: int) -> Self:
        """Return what follows the first `n_bytes`; nothing, if there are no more than that.

        Raises:
            RangeError: `n_bytes` is below 0.
        """
        if n_bytes < 0:
            raise RangeError(0, n_bytes, "bytes to drop cannot be fewer than none")
        n_bytes = min(n_bytes, self.n_bytes)
        index, offset = self._index, self._offset + n_bytes
        while index < len(self._blocks) and offset >= self._blocks[index].length_bytes:
            offset -= self._blocks[index].length_bytes
            index += 1
        return self._part(index, offset, self.n_bytes - n_bytes, self.position + n_bytes)

    def take_first(self, n_bytes: int) -> Self:
        """Return no more than the first `n_bytes`.

        Raises:
            RangeError: `n_bytes` is below 0.
        """
        if n_bytes < 0:
            raise RangeError(0, n_bytes, "bytes to take cannot be fewer than none")
        return self._part(self._index, self._offset, min(n_bytes, self.n_bytes), self.position)

    def __iter__(self) -> Iterator[Block]:
        """Yield each block that has bytes."""
        left, offset, index = self.n_bytes, self._offset, self._index
        while left:
            block = self._blocks[index]
            length = min(block.length_bytes - offset, left)
            if length < block.length_bytes:
                block = Block(block.hva + offset, length, may_fault=block.may_fault)
            yield block
            left -= length
            offset = 0
            index += 1

    def __repr__(self) -> str:
        return f"<{self.n_bytes} bytes: {list(self)}>"

    def copy_from(self, src: ReadableBuffer, offset: int = 0) -> int:
        """Copy a buffer's bytes from `offset` on into this memory, as many as both have.

        Returns:
            How many that are.

        Raises:
            BlockFaultError: This memory cannot be accessed.
            HostBufferError: The buffer cannot.
            StateError: The call that it was lent for is over, or it was lent for reading.
            TypeError: `src` is no contiguous buffer.
        """
        with BlockSeq.of_buffer(src) as blocks:
            return _blaming(blocks.loan, self, blocks.drop_first(offset))

    def copy_to(self, dst: WriteableBuffer, offset: int = 0) -> int:
        """Copy this memory's bytes into a buffer from `offset` on, as many as both have.

        Returns and raises as `copy_from`.
        """
        with BlockSeq.of_buffer(dst, writable=True) as blocks:
            return _blaming(blocks.loan, blocks.drop_first(offset), self)

    def __bytes__(self) -> bytes:
        """Return the bytes; raises as `copy_to`."""
        found = bytearray(self.n_bytes)
        self.copy_to(found)
        return bytes(found)

    def views(self) -> list[memoryview]:
        """Return the blocks themselves, for somebody who fills or reads buffers.

        They end with the call that the memory was lent for: who still has one then (a slice of it,
        an array over it) gets an error for that.

        Raises:
            StateError: A block may fault, or the call is over.
        """
        blocks = list(self)
        for block in blocks:
            if block.may_fault:
                raise StateError(
                    f"{block} has no view, because touching it could kill the process: "
                    "use copy_from or copy_to"
                )
        return [self.loan.view(block.hva, block.length_bytes) for block in blocks]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.loan.end(quietly=kind is not None)


def copy_seq(dst: BlockSeq, src: BlockSeq) -> int:
    """Copy from block to block, upwards, as many bytes as both have.

    Returns:
        How many that are.

    Raises:
        BlockFaultError: A byte cannot be accessed; what comes before it was copied.
        StateError: Either is over, or the destination was lent for reading.

    Source: gVisor safemem.CopySeq.
    """
    dst.loan.check(writing=True)
    src.loan.check()
    wanted = min(dst.n_bytes, src.n_bytes)
    done = 0
    dst_blocks, src_blocks = iter(dst), iter(src)
    to = at = to_left = at_left = 0
    if dst.may_fault or src.may_fault:
        own_faults()
    while done < wanted:
        if not to_left:
            block = next(dst_blocks)
            to, to_left = block.hva, block.length_bytes
        if not at_left:
            block = next(src_blocks)
            at, at_left = block.hva, block.length_bytes
        n_bytes = min(to_left, at_left, wanted - done)
        moved, signal, fault_hva = safe_copy(to, at, n_bytes)
        done += moved
        if moved < n_bytes:
            # Where a CPU does not say which side it was, it was the source: that is read first.
            is_dst = to + moved <= fault_hva < to + n_bytes
            whose = dst if is_dst else src
            raise BlockFaultError(whose.loan, whose.position + done, done, signal)
        to, at = to + n_bytes, at + n_bytes
        to_left, at_left = to_left - n_bytes, at_left - n_bytes
    return done


def zero_seq(dst: BlockSeq) -> int:
    """Zero all bytes, upwards; returns and raises as `copy_seq`.

    Source: gVisor safemem.ZeroSeq.
    """
    dst.loan.check(writing=True)
    done = 0
    if dst.may_fault:
        own_faults()
    for block in dst:
        moved, signal, _ = safe_zero(block.hva, block.length_bytes)
        done += moved
        if moved < block.length_bytes:
            raise BlockFaultError(dst.loan, dst.position + done, done, signal)
    return done


def _blaming(own: Loan, dst: BlockSeq, src: BlockSeq) -> int:
    # copy_seq between memory that was lent and a buffer of the caller's own.
    try:
        return copy_seq(dst, src)
    except BlockFaultError as error:
        if error.loan is not own:
            raise
        raise HostBufferError(error.position, error.done) from error
