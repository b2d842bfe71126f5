"""BlockSeq: scenarios of gVisor's block and seq tests, a model, and memory that faults."""

from __future__ import annotations

import array
import errno
import itertools
import mmap
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import HostBufferError, RangeError, StateError
from kvmmm.safemem.block import Block, BlockFaultError, BlockSeq, copy_seq, zero_seq
from kvmmm.safemem.ffi import ffi
from kvmmm.safemem.loan import Loan
from tests.safemem.memory import PAGE, Memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmmm.memmap.host_file import HostFile


def test_of_empty_block():
    seq = BlockSeq([Block(0x1000, 0)])
    assert seq.is_empty
    assert (seq.n_bytes, seq.n_blocks, list(seq), bytes(seq)) == (0, 0, [], b"")
    for name in ("head", "tail"):
        with pytest.raises(IndexError):
            getattr(seq, name)


def test_of_nonempty_block():
    block = Block(0x1000, 5, may_fault=True)
    seq = BlockSeq([block])
    assert seq.head == block
    assert seq.tail.is_empty
    assert not seq.is_empty
    assert repr(block) == "<block 0x1000+0x5 may fault>"
    assert len({block, Block(0x1000, 5, may_fault=True), Block(0x1000, 5)}) == 2
    assert block != (0x1000, 5, True)


@pytest.mark.parametrize(
    ("parts", "drop", "take", "wanted"),
    [
        ([], 0, 99, b""),
        ([b"foobar"], 0, 99, b"foobar"),
        ([b"foo", b"bar"], 0, 99, b"foobar"),
        ([b"", b"foo", b"", b"", b"bar", b""], 0, 99, b"foobar"),
        ([b"foo", b"bar"], 2, 99, b"obar"),
        ([b"foo", b"bar"], 0, 5, b"fooba"),
        ([b"foo", b"bar"], 2, 3, b"oba"),
    ],
)
def test_iteration(parts: list[bytes], drop: int, take: int, wanted: bytes):
    memory = Memory(parts)
    seq = memory.seq().drop_first(drop).take_first(take)
    assert seq.n_bytes == len(wanted)
    assert bytes(seq) == wanted
    assert [bytes(view) for view in seq.views()] == [bytes(BlockSeq([block])) for block in seq]
    left, found = seq, b""
    while not left.is_empty:  # by blocks
        head = left.head
        assert head.length_bytes > 0
        found += bytes(BlockSeq([head]))
        n_bytes, left = left.n_bytes, left.tail
        assert left.n_bytes == n_bytes - head.length_bytes
    assert found == wanted
    left, found = seq, b""
    while not left.is_empty:  # by bytes
        byte = bytearray(1)
        assert left.copy_to(byte) == 1
        found += byte
        left = left.drop_first(1)
    assert found == wanted
    seq.loan.end()


def test_drop_beyond_limit():
    assert Memory([b"123", b"4"]).seq().take_first(1).drop_first(2).n_bytes == 0


def test_refused():
    seq = Memory([b"123"]).seq()
    for refused in (seq.drop_first, seq.take_first):
        with pytest.raises(RangeError):
            refused(-1)


PARTS = st.lists(st.binary(max_size=9), max_size=6)
CUTS = st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=6)


def cut_both(seq: BlockSeq, start: int, end: int, cuts: list[tuple[bool, int]]) -> tuple:
    """A window, and where it is in the whole."""
    for is_drop, n_bytes in cuts:
        if is_drop:
            seq, start = seq.drop_first(n_bytes), min(start + n_bytes, end)
        else:
            seq, end = seq.take_first(n_bytes), min(start + n_bytes, end)
    return seq, start, end


@given(PARTS, CUTS)
def test_model_windows(parts: list[bytes], cuts: list[tuple[bool, int]]):
    memory, whole = Memory(parts), b"".join(parts)
    seq, start, end = cut_both(memory.seq(), 0, len(whole), cuts)
    assert bytes(seq) == whole[start:end]
    assert (seq.n_bytes, seq.position) == (end - start, start)
    edges = itertools.accumulate(map(len, parts))
    inner = {edge for edge in edges if start < edge < end}
    assert seq.n_blocks == (len(inner) + 1 if start < end else 0)


@given(PARTS, PARTS, CUTS, CUTS)
def test_model_copy(
    to: list[bytes], at: list[bytes], to_cuts: list[tuple[bool, int]],
    at_cuts: list[tuple[bool, int]],
):  # fmt: skip
    dst, src = Memory(to), Memory(at)
    old, data = b"".join(to), b"".join(at)
    dst_seq, start, end = cut_both(dst.seq(), 0, len(old), to_cuts)
    src_seq, src_start, src_end = cut_both(src.seq(writable=False), 0, len(data), at_cuts)
    n_bytes = min(end - start, src_end - src_start)
    assert copy_seq(dst_seq, src_seq) == n_bytes
    moved = data[src_start : src_start + n_bytes]
    assert dst.bytes() == old[:start] + moved + old[start + n_bytes :]
    assert src.bytes() == data
    # The rest of it is still the destination's; and the same through buffers.
    assert zero_seq(dst_seq) == end - start
    assert dst.bytes() == old[:start] + bytes(end - start) + old[end:]
    assert dst_seq.copy_from(data, src_start) == min(len(data) - src_start, end - start)
    back = bytearray(b"." * len(data))
    assert src_seq.copy_to(back, src_start) == src_end - src_start
    assert back == b"." * src_start + data[src_start:src_end] + b"." * (len(data) - src_end)


# Faults.


def seq_of(file: HostFile, *, writable: bool = True) -> BlockSeq:
    return BlockSeq([Block(file.hva, 2 * PAGE, may_fault=True)], Loan(writable=writable))


@pytest.mark.parametrize("before", [0, 1, 31, 32, 100, PAGE])
def test_a_destination_that_ends_in_a_fault(cut: HostFile, before: int):
    other = Memory([b"abc"])
    whole = BlockSeq([*other.blocks, Block(cut.hva, 2 * PAGE, may_fault=True)])
    seq = whole.drop_first(3 + PAGE - before)
    for move in (lambda: seq.copy_from(b"x" * 200 * 25), lambda: zero_seq(seq)):
        with pytest.raises(BlockFaultError) as caught:
            move()
        error = caught.value
        assert (error.loan, error.position, error.done) == (seq.loan, 3 + PAGE, before)
        assert (error.errno, error.signal) == (errno.EFAULT, signal.SIGBUS)
        assert "SIGBUS" in str(error)
        assert f"({before} bytes done)" in str(error)
    assert other.bytes() == b"abc"


@pytest.mark.parametrize("before", [0, 1, 31, 32, 100, PAGE])
def test_a_source_that_ends_in_a_fault(cut: HostFile, before: int):
    seq = seq_of(cut, writable=False).drop_first(PAGE - before)
    out = bytearray(b"." * 2 * PAGE)
    with pytest.raises(BlockFaultError) as caught:
        seq.copy_to(out)
    assert (caught.value.position, caught.value.done) == (PAGE, before)
    content = bytes(range(256)) * 16
    assert out == content[PAGE - before :] + b"." * (2 * PAGE - before)


def test_the_callers_own_buffer_faults(tmp_path: Path):
    path = tmp_path / "own"
    path.write_bytes(b"o" * 2 * PAGE)
    memory = Memory([b"." * PAGE, b"." * PAGE])
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE) as own:
        os.truncate(path, PAGE)
        with pytest.raises(HostBufferError) as caught:
            memory.seq().copy_from(own, PAGE - 10)
        assert (caught.value.offset, caught.value.done) == (PAGE, 10)
        with pytest.raises(HostBufferError) as caught:
            memory.seq().copy_to(own)
        assert (caught.value.offset, caught.value.done) == (PAGE, PAGE)
    # And nothing holds it: it could be closed.
    assert memory.bytes() == b"o" * 10 + b"." * (2 * PAGE - 10)


# Loans.


def test_what_is_over_is_over():
    memory = Memory([b"abc"])
    seq = memory.seq()
    part = seq.drop_first(1)
    seq.loan.end()
    seq.loan.end()
    for use in (
        lambda: part.copy_from(b"x"), lambda: part.copy_to(bytearray(1)), part.views,
        lambda: bytes(part), lambda: zero_seq(part), lambda: copy_seq(memory.seq(), part),
        lambda: copy_seq(part, memory.seq()),
    ):  # fmt: skip
        with pytest.raises(StateError, match="which is over"):
            use()
    assert memory.bytes() == b"abc"


def test_what_was_lent_for_reading_is_not_written():
    memory = Memory([b"abc"])
    seq = memory.seq(writable=False)
    for use in (lambda: seq.copy_from(b"x"), lambda: zero_seq(seq)):
        with pytest.raises(StateError, match="for reading only"):
            use()
    (view,) = seq.views()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    seq.loan.end()
    assert memory.bytes() == b"abc"


def test_views_die_with_the_loan():
    memory = Memory([b"abc", b"de"])
    seq = memory.seq()
    views = seq.views()
    views[1][:] = b"xy"
    seq.loan.end()
    assert memory.bytes() == b"abcxy"
    with pytest.raises(ValueError, match="released"):
        bytes(views[0])


@pytest.mark.parametrize(
    "keep",
    [lambda view: view[1:], memoryview, lambda view: memoryview(view).cast("B"),
     ffi.from_buffer],
    ids=["slice", "memoryview", "cast", "array"],
)  # fmt: skip
@pytest.mark.parametrize("writable", [False, True])
def test_who_keeps_a_view_is_told(keep: Callable[[memoryview], object], writable: bool):
    memory = Memory([b"abc", b"de"])
    seq = memory.seq(writable=writable)
    kept = keep(seq.views()[0])
    with pytest.raises(StateError, match="1 view of memory"):
        seq.loan.end()
    del kept
    quiet = memory.seq()
    kept = keep(quiet.views()[0])
    quiet.loan.end(quietly=True)
    del kept


def test_no_views_of_what_may_fault(cut: HostFile):
    with pytest.raises(StateError, match="copy_from or copy_to"):
        seq_of(cut).views()


def test_buffers():
    numbers = array.array("I", [1, 2, 3])
    with BlockSeq.of_buffer(numbers, writable=True) as blocks:
        assert blocks.n_bytes == 12
        assert zero_seq(blocks.drop_first(4)) == 8
        with pytest.raises(BufferError):
            numbers.append(1)
    numbers.append(1)  # it was let go
    assert list(numbers) == [1, 0, 0, 1]
    with BlockSeq.of_buffer(array.array("I")) as blocks:
        assert blocks.is_empty
    with pytest.raises(KeyError), BlockSeq.of_buffer(numbers):
        raise KeyError
    numbers.append(1)


@pytest.mark.parametrize(
    ("refused", "writable"),
    [(b"const", True), (memoryview(bytes(8))[::2], False), ("text", False), (None, False),
     (7, False)],
)  # fmt: skip
def test_no_buffers(refused: Any, writable: bool):
    with pytest.raises(TypeError):
        BlockSeq.of_buffer(refused, writable=writable)
