"""Scenarios of gVisor's usermem_test.go, and the alignment ones of safecopy_test.go; same names.

There memory is an array whose end is the end of the world; here its last byte is the last one
before a hole. Each mechanism that there is without a guest's page tables comes to the same.
"""

from __future__ import annotations

import errno
import io
import re
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestAlignmentError, GuestFaultError, StringTooLongError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm import IOOpts

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm import MemoryManager
    from kvmmm.safemem.block import BlockSeq
    from tests.mm.conftest import Setup

PAGE = 4096
END = 64 * PAGE
INCREMENT, INITIAL_BYTES = 64, 256
"""Steps in which gVisor reads strings, and what it has room for at first."""


class Bytes:
    """Memory that begins with some bytes and ends behind them. Offsets are from its beginning."""

    def __init__(self, mm: MemoryManager, content: bytes, opts: IOOpts) -> None:
        self.mm = mm
        self.opts = opts
        self.n_bytes = len(content)
        self.start = END - len(content)
        mm.copy_out(self.start, content)

    def at(self, offset: int) -> int:
        return self.start + offset

    def ranges(self, *offsets: tuple[int, int]) -> AddrRangeSeq:
        return AddrRangeSeq(AddrRange(self.at(start), self.at(end)) for start, end in offsets)

    @property
    def content(self) -> bytes:
        return self.mm.read(self.start, self.n_bytes)

    def fails(self, call: Callable[[], object], done: int) -> None:
        """It has done so much, up to the end."""
        with pytest.raises(GuestFaultError) as caught:
            call()
        assert caught.value.errno == errno.EFAULT
        assert (caught.value.done, caught.value.addr) == (done, END)


@pytest.fixture(params=[None, "internal", "mirror"])
def of(request: pytest.FixtureRequest, make: Callable[..., Setup]) -> Callable[[bytes], Bytes]:
    setup = make()
    setup.map(END - PAGE, END)
    return lambda content: Bytes(setup.mm, content, IOOpts(mechanism=request.param))


# ---- BytesIO ----


def test_bytes_io_copy_out_success(of: Callable[[bytes], Bytes]):
    b = of(b"ABCDE")
    assert b.mm.copy_out(b.at(1), b"foo", opts=b.opts) == 3
    assert b.content == b"AfooE"


def test_bytes_io_copy_out_failure(of: Callable[[bytes], Bytes]):
    b = of(b"ABC")
    b.fails(lambda: b.mm.copy_out(b.at(1), b"foo", opts=b.opts), 2)
    assert b.content == b"Afo"


def test_bytes_io_copy_in_success(of: Callable[[bytes], Bytes]):
    b = of(b"AfooE")
    dst = bytearray(3)
    assert b.mm.copy_in(b.at(1), dst, opts=b.opts) == 3
    assert dst == b"foo"


def test_bytes_io_copy_in_failure(of: Callable[[bytes], Bytes]):
    b = of(b"Afo")
    dst = bytearray(3)
    b.fails(lambda: b.mm.copy_in(b.at(1), dst, opts=b.opts), 2)
    assert dst == b"fo\0"


def test_bytes_io_zero_out_success(of: Callable[[bytes], Bytes]):
    b = of(b"ABCD")
    assert b.mm.zero_out(b.at(1), 2, opts=b.opts) == 2
    assert b.content == b"A\0\0D"


def test_bytes_io_zero_out_failure(of: Callable[[bytes], Bytes]):
    b = of(b"ABC")
    b.fails(lambda: b.mm.zero_out(b.at(1), 3, opts=b.opts), 2)
    assert b.content == b"A\0\0"


def test_bytes_io_copy_out_from_success(of: Callable[[bytes], Bytes]):
    b = of(b"ABCDEFGH")
    ars = b.ranges((4, 7), (1, 4))
    assert b.mm.copy_out_from(ars, io.BytesIO(b"barfoo"), opts=b.opts) == 6
    assert b.content == b"AfoobarH"


def test_bytes_io_copy_out_from_failure(of: Callable[[bytes], Bytes]):
    b = of(b"ABCDE")
    ars = b.ranges((1, 4), (4, 7))
    b.fails(lambda: b.mm.copy_out_from(ars, io.BytesIO(b"foobar"), opts=b.opts), 4)
    assert b.content == b"Afoob"


def test_bytes_io_copy_in_to_success(of: Callable[[bytes], Bytes]):
    b = of(b"AfoobarH")
    dst = io.BytesIO()
    assert b.mm.copy_in_to(b.ranges((4, 7), (1, 4)), dst, opts=b.opts) == 6
    assert dst.getvalue() == b"barfoo"


def test_bytes_io_copy_in_to_failure(of: Callable[[bytes], Bytes]):
    b = of(b"Afoob")
    dst = io.BytesIO()
    b.fails(lambda: b.mm.copy_in_to(b.ranges((1, 4), (4, 7)), dst, opts=b.opts), 4)
    assert dst.getvalue() == b"foob"


# ---- strings ----


def test_copy_string_in_short(of: Callable[[bytes], Bytes]):
    want = b"A" * (INCREMENT - 2)
    b = of(want + b"\0")
    assert b.mm.read_string(b.start, 2 * INCREMENT, opts=b.opts) == want


def test_copy_string_in_long(of: Callable[[bytes], Bytes]):
    want = b"A" * (INCREMENT * 3 // 4) + b"B" * (INCREMENT * 3 // 4)
    b = of(want + b"\0")
    assert b.mm.read_string(b.start, 2 * INCREMENT, opts=b.opts) == want


def test_copy_string_in_very_long(of: Callable[[bytes], Bytes]):
    want = b"A" * (INITIAL_BYTES * 3 // 4) + b"B" * (INITIAL_BYTES * 3 // 4)
    b = of(want + b"\0")
    assert b.mm.read_string(b.start, 2 * INITIAL_BYTES, opts=b.opts) == want


def test_copy_string_in_no_terminating_zero_byte(of: Callable[[bytes], Bytes]):
    want = b"A" * (INCREMENT - 1)
    b = of(want)
    with pytest.raises(GuestFaultError) as caught:
        b.mm.read_string(b.start, 2 * INCREMENT, opts=b.opts)
    assert (caught.value.prefix, caught.value.done) == (want, len(want))
    assert (caught.value.addr, caught.value.errno) == (END, errno.EFAULT)


def test_copy_string_in_truncated_by_maxlen(of: Callable[[bytes], Bytes]):
    b = of(b"A" * 10)
    with pytest.raises(StringTooLongError) as caught:
        b.mm.read_string(b.start, 5, opts=b.opts)
    assert (caught.value.prefix, caught.value.errno) == (b"A" * 5, errno.ENAMETOOLONG)


class Numbers:
    """A Writer that takes as many numbers, written as text, as it has places for, and no more."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def write_from_blocks(self, srcs: BlockSeq) -> int:
        taken = 0
        text = bytes(srcs)
        for i, found in enumerate(re.finditer(rb"\s*(-?\d+)(\s+|$)", text)):
            if i == len(self.values) or found.start() != taken:
                break
            self.values[i] = int(found[1])
            taken = found.end()
        if not taken:
            raise OSError(errno.EINVAL, f"no number: {text!r}")
        return taken


@pytest.mark.parametrize(
    ("text", "n_bytes", "values"),
    [
        (b"100 200", 7, [100, 200]),
        (b"100", 3, [100, 2]),
        (b"100 200 300", 8, [100, 200]),
        (b" 100\t200\n", 9, [100, 200]),
    ],
)
def test_copy_int32_strings_in_vec(
    of: Callable[[bytes], Bytes], text: bytes, n_bytes: int, values: list[int]
):
    """Parsing is the Writer's; what it takes is what is said to be copied."""
    b = of(text)
    numbers = Numbers(1, 2)
    half = len(text) // 2
    ars = b.ranges((0, half), (half, len(text)))
    assert b.mm.copy_in_to(ars, numbers, opts=b.opts) == n_bytes
    assert numbers.values == values


@pytest.mark.parametrize("text", [b"", b"\n", b"a123"])
def test_copy_int32_strings_in_vec_requires_one_valid_value(
    of: Callable[[bytes], Bytes], text: bytes
):
    b = of(text)
    numbers = Numbers(1, 2)
    ars = b.ranges((0, len(text)))
    if text:
        with pytest.raises(OSError, match="no number") as caught:
            b.mm.copy_in_to(ars, numbers, opts=b.opts)
        assert caught.value.errno == errno.EINVAL
    else:
        # Nobody is asked about nothing.
        assert b.mm.copy_in_to(ars, numbers, opts=b.opts) == 0
    assert numbers.values == [1, 2]


# ---- IOSequence: ranges, and as much of them as there are bytes ----


def test_io_sequence_copy_out(of: Callable[[bytes], Bytes]):
    b = of(b"ABCD")
    s = b.ranges((0, 4))
    # Limited by the source.
    assert b.mm.copy_out_from(s, b"fo", opts=b.opts) == 2
    assert b.content == b"foCD"
    s = s.drop_first(2)
    assert s.n_bytes == 2
    # Limited by the sequence.
    assert b.mm.copy_out_from(s, b"obar", opts=b.opts) == 2
    assert b.content == b"foob"
    assert s.drop_first(2).n_bytes == 0


def test_io_sequence_copy_in(of: Callable[[bytes], Bytes]):
    b = of(b"foob")
    s = b.ranges((0, 4))
    dst = bytearray(b"ABCDEF")
    with memoryview(dst) as view:
        assert b.mm.copy_in_to(s, view[:2], opts=b.opts) == 2
        assert dst == b"foCDEF"
        s = s.drop_first(2)
        assert s.n_bytes == 2
        assert b.mm.copy_in_to(s, view[2:], opts=b.opts) == 2
    assert dst == b"foobEF"
    assert s.drop_first(2).n_bytes == 0


def test_io_sequence_zero_out(of: Callable[[bytes], Bytes]):
    b = of(b"ABCD")
    s = b.ranges((0, 1), (1, 4))

    def zero(s: AddrRangeSeq, n_bytes: int) -> int:
        some: Any = s.take_first(n_bytes)
        return sum(b.mm.zero_out(ar.start, ar.length_bytes, opts=b.opts) for ar in some)

    assert zero(s, 2) == 2
    assert b.content == b"\0\0CD"
    s = s.drop_first(2)
    assert s.n_bytes == 2
    assert zero(s, 4) == 2
    assert b.content == b"\0\0\0\0"
    assert s.drop_first(2).n_bytes == 0


def test_io_sequence_take_first(of: Callable[[bytes], Bytes]):
    b = of(b"foobar")
    s = b.ranges((0, 6))
    assert s.n_bytes == 6
    s = s.take_first(3)
    assert s.n_bytes == 3
    s = s.take_first(9)
    assert s.n_bytes == 3
    dst = bytearray(3)
    assert b.mm.copy_in_vec(s, dst, opts=b.opts) == 3
    assert dst == b"foo"
    assert s.drop_first(3).n_bytes == 0


# ---- pkg/safecopy: words that are not aligned ----


def test_swap_uint32_alignment_error(of: Callable[[bytes], Bytes]):
    b = of(b"ABCDEFGH")
    with pytest.raises(GuestAlignmentError) as caught:
        b.mm.swap_uint32(b.at(1), 1, opts=b.opts)
    assert (caught.value.addr, caught.value.done) == (b.at(1), 0)
    assert "multiple of 4" in str(caught.value)
    assert b.content == b"ABCDEFGH"


def test_compare_and_swap_uint32_alignment_error(of: Callable[[bytes], Bytes]):
    b = of(b"ABCDEFGH")
    with pytest.raises(GuestAlignmentError) as caught:
        b.mm.compare_and_swap_uint32(b.at(1), 0x45444342, 1, opts=b.opts)
    assert (caught.value.addr, caught.value.done) == (b.at(1), 0)
    assert b.content == b"ABCDEFGH"
