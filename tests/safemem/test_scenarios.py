"""Scenarios of gVisor's pkg/safemem and pkg/safecopy; named after theirs."""

from __future__ import annotations

import io
import random
import signal
from typing import TYPE_CHECKING

import pytest

from kvmmm.safemem.block import Block, BlockSeq, copy_seq
from kvmmm.safemem.ffi import (
    address_of,
    ffi,
    own_faults,
    safe_compare_and_swap_uint32,
    safe_copy,
    safe_swap_uint32,
    safe_zero,
)
from kvmmm.safemem.stream import as_reader, as_writer, read_full, write_full
from tests.safemem.memory import PAGE, Memory
from tests.safemem.test_safecopy import Area

if TYPE_CHECKING:
    from collections.abc import Iterator

# ---- block sequences ----


def test_block_seq_of_empty_block():
    assert BlockSeq([Block(0, 0)]).is_empty


def test_block_seq_of_nonempty_block():
    memory = Memory([b"x"])
    seq = BlockSeq(memory.blocks)
    assert not seq.is_empty
    assert seq.head == memory.blocks[0]
    assert seq.tail.is_empty


ALL = 1 << 62
WINDOWS = pytest.mark.parametrize(
    ("pieces", "offset", "limit", "want"),
    [
        ([], 0, ALL, []),
        ([b"foobar"], 0, ALL, [b"foobar"]),
        ([b"foo", b"bar"], 0, ALL, [b"foo", b"bar"]),
        ([b"", b"foo", b"", b"", b"bar", b""], 0, ALL, [b"foo", b"bar"]),
        ([b"foo", b"bar"], 2, ALL, [b"o", b"bar"]),
        ([b"foo", b"bar"], 0, 5, [b"foo", b"ba"]),
        ([b"foo", b"bar"], 2, 3, [b"o", b"ba"]),
    ],
    ids=["none", "one", "two", "empty ones", "offset", "limit", "offset and limit"],
)


@WINDOWS
def test_block_seq_num_bytes(pieces: list[bytes], offset: int, limit: int, want: list[bytes]):
    seq = Memory(pieces).seq().drop_first(offset).take_first(limit)
    assert seq.n_bytes == len(b"".join(want))


@WINDOWS
def test_block_seq_iter_blocks(pieces: list[bytes], offset: int, limit: int, want: list[bytes]):
    memory = Memory(pieces)
    seq = memory.seq().drop_first(offset).take_first(limit)
    found = []
    while not seq.is_empty:
        head = seq.head
        found.append(bytes(BlockSeq([head])))
        assert seq.tail.n_bytes == seq.n_bytes - head.length_bytes
        seq = seq.tail
    assert found == want


@WINDOWS
def test_block_seq_iter_bytes(pieces: list[bytes], offset: int, limit: int, want: list[bytes]):
    memory = Memory(pieces)
    seq = memory.seq().drop_first(offset).take_first(limit)
    found = b""
    while not seq.is_empty:
        byte = Memory([b"?"])
        assert copy_seq(byte.seq(), BlockSeq([seq.head])) == 1
        found += byte.bytes()
        assert seq.drop_first(1).n_bytes == seq.n_bytes - 1
        seq = seq.drop_first(1)
    assert found == b"".join(want)


def test_block_seq_drop_beyond_limit():
    seq = Memory([b"123", b"4"]).seq()
    assert seq.n_bytes == 4
    seq = seq.take_first(1)
    assert seq.n_bytes == 1
    assert seq.drop_first(2).n_bytes == 0


# ---- readers and writers ----


class OneByte(io.BytesIO):
    """A file that moves one byte at a time."""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with memoryview(buffer)[:1] as part:
            return super().readinto(part)

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        with memoryview(data)[:1] as part:
            return super().write(part)


class Limited(io.BytesIO):
    """A file that has room for four bytes."""

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        with memoryview(data)[: 4 - self.tell()] as part:
            return super().write(part)


@pytest.fixture
def dsts() -> Memory:
    return Memory([bytes(3), bytes(3)])


@pytest.fixture
def srcs() -> Memory:
    return Memory([b"foo", b"bar"])


def test_from_io_reader_full_read(dsts: Memory):
    assert as_reader(io.BytesIO(b"foobar")).read_to_blocks(dsts.seq()) == 6
    assert dsts.bytes() == b"foobar"


def test_from_io_reader_partial_read(dsts: Memory):
    assert as_reader(io.BytesIO(b"foob")).read_to_blocks(dsts.seq()) == 4
    assert dsts.bytes() == b"foob\0\0"


def test_single_byte_reader(dsts: Memory):
    assert as_reader(OneByte(b"foobar")).read_to_blocks(dsts.seq()) == 1
    assert dsts.bytes() == b"f\0\0\0\0\0"


def test_read_full_to_blocks(dsts: Memory):
    assert read_full(as_reader(OneByte(b"foobar")), dsts.seq()) == 6
    assert dsts.bytes() == b"foobar"


def test_from_io_writer_full_write(srcs: Memory):
    dst = io.BytesIO()
    assert as_writer(dst).write_from_blocks(srcs.seq(writable=False)) == 6
    assert dst.getvalue() == b"foobar"


def test_from_io_writer_partial_write(srcs: Memory):
    dst = Limited()
    assert as_writer(dst).write_from_blocks(srcs.seq(writable=False)) == 4
    assert dst.getvalue() == b"foob"


def test_single_byte_writer(srcs: Memory):
    dst = OneByte()
    assert as_writer(dst).write_from_blocks(srcs.seq(writable=False)) == 1
    assert dst.getvalue() == b"f"


def test_write_full_to_blocks(srcs: Memory):
    dst = OneByte()
    assert write_full(as_writer(dst), srcs.seq(writable=False)) == 6
    assert dst.getvalue() == b"foobar"


# ---- safecopy: everything can be accessed ----

N_BYTES = 2 * PAGE
RANDOM = random.Random(45)
SEGV, BUS = int(signal.SIGSEGV), int(signal.SIGBUS)


class Buffer:
    """Host memory, and where it is."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)
        self._held = ffi.from_buffer(self.bytes)
        self.hva = address_of(self._held)


def copied() -> None:
    # Into guest memory, out of it, within the host: one function copies.
    a, b = Buffer(RANDOM.randbytes(N_BYTES)), Buffer(bytes(N_BYTES))
    assert safe_copy(b.hva, a.hva, N_BYTES) == (N_BYTES, 0, 0)
    assert a.bytes == b.bytes


def test_copy_in_success():
    copied()


def test_copy_out_success():
    copied()


def test_copy_success():
    copied()


def test_zero_out_success():
    b = Buffer(RANDOM.randbytes(N_BYTES))
    assert safe_zero(b.hva, N_BYTES) == (N_BYTES, 0, 0)
    assert b.bytes == bytes(N_BYTES)


def test_swap_uint32_success():
    b = Buffer((0x12345678).to_bytes(4, "little"))
    assert safe_swap_uint32(b.hva, 0x9ABCDEF0) == (0x12345678, 0, 0)
    assert b.bytes == (0x9ABCDEF0).to_bytes(4, "little")


def test_compare_and_swap_uint32_success():
    b = Buffer((0x12345678).to_bytes(4, "little"))
    assert safe_compare_and_swap_uint32(b.hva, 0x12345678, 0x9ABCDEF0) == (0x12345678, 0, 0)
    assert b.bytes == (0x9ABCDEF0).to_bytes(4, "little")


# ---- safecopy: the second page cannot be ----

BEFORE = range(32)
"""Copies begin so many bytes before it: twice the widest register, as upstream."""


@pytest.fixture
def segv() -> Iterator[Area]:
    own_faults()
    area = Area("segv", 1)
    yield area
    area.close()


@pytest.fixture
def bus() -> Iterator[Area]:
    own_faults()
    area = Area("bus", 1)
    yield area
    area.close()


def source_faults(area: Area) -> None:
    # The bytes before it are there, and nothing behind them was written.
    area.memory[:PAGE] = content = RANDOM.randbytes(PAGE)
    for k in BEFORE:
        old = RANDOM.randbytes(PAGE)
        dst = Buffer(old)
        assert safe_copy(dst.hva, area.edge - k, PAGE) == (k, area.signal, area.edge)
        assert dst.bytes == content[PAGE - k :] + old[k:]


def destination_faults(area: Area) -> None:
    for k in BEFORE:
        area.memory[:PAGE] = old = RANDOM.randbytes(PAGE)
        src = Buffer(RANDOM.randbytes(PAGE))
        assert safe_copy(area.edge - k, src.hva, PAGE) == (k, area.signal, area.edge)
        assert area.memory[:PAGE] == old[: PAGE - k] + src.bytes[:k]


def zeroing_faults(area: Area) -> None:
    for k in BEFORE:
        area.memory[:PAGE] = old = RANDOM.randbytes(PAGE)
        assert safe_zero(area.edge - k, PAGE) == (k, area.signal, area.edge)
        assert area.memory[:PAGE] == old[: PAGE - k] + bytes(k)


def test_copy_in_segv_error(segv: Area):
    source_faults(segv)


def test_copy_in_bus_error(bus: Area):
    source_faults(bus)


def test_copy_out_segv_error(segv: Area):
    destination_faults(segv)


def test_copy_out_bus_error(bus: Area):
    destination_faults(bus)


def test_copy_source_segv_error(segv: Area):
    source_faults(segv)


def test_copy_source_bus_error(bus: Area):
    source_faults(bus)


def test_copy_destination_segv_error(segv: Area):
    destination_faults(segv)


def test_copy_destination_bus_error(bus: Area):
    destination_faults(bus)


def test_zero_out_segv_error(segv: Area):
    zeroing_faults(segv)


def test_zero_out_bus_error(bus: Area):
    zeroing_faults(bus)


def test_swap_uint32_segv_error(segv: Area):
    assert safe_swap_uint32(segv.edge, 1) == (None, SEGV, segv.edge)


def test_swap_uint32_bus_error(bus: Area):
    assert safe_swap_uint32(bus.edge, 1) == (None, BUS, bus.edge)


def test_compare_and_swap_uint32_segv_error(segv: Area):
    assert safe_compare_and_swap_uint32(segv.edge, 0, 1) == (None, SEGV, segv.edge)


def test_compare_and_swap_uint32_bus_error(bus: Area):
    assert safe_compare_and_swap_uint32(bus.edge, 0, 1) == (None, BUS, bus.edge)
