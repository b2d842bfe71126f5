"""Numbers and records, by five libraries."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any

import cffi
import construct
import pytest

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import NO_ACCESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

PAGE = 4096
START = 0x100000
END = START + 4 * PAGE

FFI = cffi.FFI()
FFI.cdef("struct point { uint32_t x; uint64_t y; }; typedef uint16_t four[4];")


class Point(ctypes.LittleEndianStructure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint64))

    def __init__(self, x: int, y: int) -> None:
        super().__init__(x, y)


CONSTRUCT = construct.Struct("x" / construct.Int32ul, "y" / construct.Int64ul)


@pytest.fixture
def setup(make: Callable[..., Setup]) -> Setup:
    setup = make()
    setup.map(START, END)
    return setup


class TestInts:
    @pytest.mark.parametrize("n_bytes", [1, 2, 3, 4, 8, 16])
    def test_there_and_back(self, setup: Setup, n_bytes: int):
        biggest = (1 << 8 * n_bytes) - 1
        for value in (0, 1, 0x7F, biggest):
            assert setup.mm.write_int(START + PAGE - 1, value, n_bytes) == n_bytes
            assert setup.mm.read_int(START + PAGE - 1, n_bytes) == value
        assert setup.mm.read_int(START + PAGE - 1, n_bytes, signed=True) == -1
        setup.mm.write_int(START, -2, n_bytes, signed=True)
        assert setup.mm.read_int(START, n_bytes) == biggest - 1

    def test_little_endian(self, setup: Setup):
        setup.mm.write_int(START, 0x0102, 4)
        assert setup.mm.read(START, 4) == b"\x02\x01\0\0"

    def test_what_does_not_fit_is_not_written(self, setup: Setup):
        setup.mm.copy_out(START, b"kept")
        for value, signed in ((256, False), (-1, False), (128, True)):
            with pytest.raises(OverflowError):
                setup.mm.write_int(START, value, 1, signed=signed)
        assert setup.mm.read(START, 4) == b"kept"

    def test_numbers_have_bytes(self, setup: Setup):
        for n_bytes in (0, -1):
            with pytest.raises(ValueError, match="no"):
                setup.mm.read_int(START, n_bytes)
            with pytest.raises(ValueError, match="no"):
                setup.mm.write_int(START, 1, n_bytes)

    def test_faults(self, setup: Setup):
        for call in (
            lambda: setup.mm.read_int(END - 3, 8),
            lambda: setup.mm.write_int(END - 3, 1 << 40, 8),
        ):
            with pytest.raises(GuestFaultError) as caught:
                call()
            assert (caught.value.addr, caught.value.done) == (END, 3)

    def test_permissions_can_be_ignored(self, setup: Setup):
        setup.mm.mprotect(START, PAGE, NO_ACCESS)
        setup.mm.write_int(START, 5, 8, ignore_permissions=True)
        assert setup.mm.read_int(START, 8, ignore_permissions=True) == 5
        assert setup.mm.read_struct(START, "<Q", ignore_permissions=True) == (5,)
        with pytest.raises(GuestFaultError):
            setup.mm.read_int(START, 8)


def _xy(found: Any) -> tuple[int, int]:
    return found["x"], found["y"]


# (layout, a value, what the value is in bytes, to compare what is read)
LAYOUTS = {
    "format": ("<IQ", (1, 2), struct.pack("<IQ", 1, 2), tuple),
    "struct": (struct.Struct(">2H"), (3, 4), b"\0\3\0\4", tuple),
    "ctypes": (Point, Point(5, 6), struct.pack("<I4xQ", 5, 6), lambda p: (type(p), p.x, p.y)),
    "ctypes array": (ctypes.c_uint16 * 3, (ctypes.c_uint16 * 3)(7, 8, 9), b"\7\0\x08\0\t\0", list),
    "ctypes number": (ctypes.c_uint32, ctypes.c_uint32(77), b"M\0\0\0", lambda n: n.value),
    "construct": (CONSTRUCT, {"x": 1, "y": 2}, struct.pack("<IQ", 1, 2), _xy),
    "cffi": (
        (FFI, "struct point"), FFI.new("struct point *", (8, 9)), struct.pack("<I4xQ", 8, 9),
        lambda p: (p.x, p.y),
    ),
    "cffi array": ((FFI, "four"), [1, 2, 3, 4], b"\1\0\2\0\3\0\4\0", lambda p: list(p[0])
                   if not isinstance(p, list) else p),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
class TestRecords:
    def test_there_and_back(self, setup: Setup, name: str):
        layout, value, data, facts = LAYOUTS[name]
        at = START + PAGE - 2
        assert setup.mm.write_struct(at, layout, value) == len(data)
        assert setup.mm.read(at, len(data)) == data
        assert setup.mm.read(at + len(data), 4) == bytes(4)
        assert facts(setup.mm.read_struct(at, layout)) == facts(value)

    def test_faults(self, setup: Setup, name: str):
        layout, value, data, _ = LAYOUTS[name]
        at = END - len(data) + 1
        for call in (
            lambda: setup.mm.read_struct(at, layout),
            lambda: setup.mm.write_struct(at, layout, value),
        ):
            with pytest.raises(GuestFaultError) as caught:
                call()
            assert (caught.value.addr, caught.value.done) == (END, len(data) - 1)
        assert setup.mm.read(at, len(data) - 1) == data[:-1]

    def test_it_may_end_where_memory_ends(self, setup: Setup, name: str):
        layout, value, data, facts = LAYOUTS[name]
        setup.mm.write_struct(END - len(data), layout, value)
        assert facts(setup.mm.read_struct(END - len(data), layout)) == facts(value)


def test_what_cffi_takes(setup: Setup):
    layout = FFI, "struct point"
    pointer = FFI.new("struct point *", {"x": 1, "y": 2})
    for value in (pointer, pointer[0], {"x": 1, "y": 2}, (1, 2)):
        setup.mm.zero_out(START, 16)
        setup.mm.write_struct(START, layout, value)
        found = setup.mm.read_struct(START, layout)
        assert (found.x, found.y) == (1, 2)
    with pytest.raises(TypeError):
        setup.mm.write_struct(START, layout, FFI.new("uint64_t *", 1))


def test_values_that_are_none(setup: Setup):
    setup.mm.copy_out(START, b"kept")
    for layout, value, error in (
        (Point, (1, 2), TypeError),
        (Point, ctypes.c_uint32(1), TypeError),
        ("<I", ("x",), struct.error),
        ("<I", (1, 2), struct.error),
        (CONSTRUCT, {"x": 1}, KeyError),
    ):
        with pytest.raises(error):
            setup.mm.write_struct(START, layout, value)
    assert setup.mm.read(START, 4) == b"kept"


@pytest.mark.parametrize("layout", [None, 5, b"<I", object(), int, []])
def test_what_is_no_layout(setup: Setup, layout: Any):
    with pytest.raises(TypeError, match="no layout"):
        setup.mm.read_struct(START, layout)
    with pytest.raises(TypeError, match="no layout"):
        setup.mm.write_struct(START, layout, ())


class TestOfAnySize:
    """A construct that says only by its contents how long it is."""

    TEXT = construct.Struct("n" / construct.Int8ul, "text" / construct.Bytes(construct.this.n))

    def test_no_byte_more_is_touched(self, setup: Setup):
        setup.mm.write_struct(END - 4, self.TEXT, {"n": 3, "text": b"abc"})
        assert setup.mm.read_struct(END - 4, self.TEXT).text == b"abc"

    def test_a_fault_comes_out_as_it_is(self, setup: Setup):
        setup.mm.write_int(END - 2, 9, 1)
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.read_struct(END - 2, self.TEXT)
        assert caught.value.addr == END
        assert isinstance(caught.value.__cause__, construct.StreamError)

    def test_what_the_library_says_comes_out_as_it_is(self, setup: Setup):
        strict = construct.Struct(*self.TEXT.subcons, construct.Const(b"!"))
        with pytest.raises(construct.ConstError):
            setup.mm.read_struct(START, strict)

    def test_a_fault_that_the_library_takes_is_no_error(self, setup: Setup):
        layout = construct.Struct(
            "n" / construct.Int8ul,
            "rest" / construct.Optional(construct.Bytes(construct.this.n)),
            "same" / construct.Check(lambda context: context.n != 3),
        )
        setup.mm.write_int(END - 1, 9, 1)
        assert setup.mm.read_struct(END - 1, layout).rest is None
        setup.mm.write_int(END - 1, 3, 1)
        with pytest.raises(construct.CheckError):
            setup.mm.read_struct(END - 1, layout)

    def test_pointers_are_relative_to_its_start(self, setup: Setup):
        layout = construct.Struct(
            "at" / construct.Int32ul,
            "found" / construct.Pointer(construct.this.at, construct.CString("utf-8")),
        )
        setup.mm.write_int(START + 8, 100, 4)
        setup.mm.copy_out(START + 108, b"far\0")
        assert setup.mm.read_struct(START + 8, layout).found == "far"


def test_a_library_that_fails_otherwise(setup: Setup):
    class Broken:
        parse = parse_stream = build = None

        def sizeof(self) -> int:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        setup.mm.read_struct(START, Broken())
