"""Hostile host buffers: of every shape, gone, cut short, changed under the copy. Never a crash."""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import pickle
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from tests.mm.copying import (
    MECHANISMS,
    N_BYTES,
    PAGE,
    START,
    Ground,
    through,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA = random.Random(5).randbytes(N_BYTES)


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground() as made:
        made.mm.copy_out(START, DATA)
        yield made


class Exporter:
    """PEP 688, Python 3.12; before that, no buffer at all."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def __buffer__(self, _flags: int) -> memoryview:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def released() -> memoryview:
    view = memoryview(bytearray(64))
    view.release()
    return view


def closed() -> mmap.mmap:
    made = mmap.mmap(-1, PAGE)
    made.close()
    return made


def released_pickle_buffer() -> pickle.PickleBuffer:
    made = pickle.PickleBuffer(bytearray(64))
    made.release()
    return made


NO_BUFFERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "int": lambda: 64,
    "list": lambda: [1, 2, 3],
    "type": lambda: bytearray,
    "released": released,
    "closed": closed,
    "released PickleBuffer": released_pickle_buffer,
    "every second": lambda: memoryview(bytearray(64))[::2],
    "backwards": lambda: memoryview(bytearray(64))[::-1],
    "columns": lambda: memoryview(bytearray(64)).cast("B", [8, 8])[::2],
    "raises": lambda: Exporter(ZeroDivisionError("mine")),
    "answers with a number": lambda: Exporter(5),
}
READ_ONLY: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(64),
    "readonly": lambda: memoryview(bytearray(64)).toreadonly(),
    "readonly map": lambda: mmap.mmap(-1, PAGE, access=mmap.ACCESS_READ),
    "str": lambda: "x" * 64,
}


def vec(n_bytes: int) -> AddrRangeSeq:
    return AddrRangeSeq([AddrRange(START, START + n_bytes)])


@pytest.mark.parametrize("make", NO_BUFFERS.values(), ids=NO_BUFFERS)
def test_what_is_no_contiguous_buffer_is_refused(ground: Ground, make: Callable[[], Any]):
    mm, thing = ground.mm, make()
    kinds = (TypeError, ValueError, BufferError, ZeroDivisionError)
    for call in (
        lambda: mm.copy_in(START, thing),
        lambda: mm.copy_out(START, thing),
        lambda: mm.copy_in_vec(vec(64), thing),
        lambda: mm.copy_out_vec(vec(64), thing),
        lambda: mm.copy_out_many([(START, b"1234"), (START, thing)]),
    ):
        with pytest.raises(kinds):
            call()
    # The one before it in the list was copied.
    assert mm.read(START, 8) == b"1234" + DATA[4:8]


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_what_is_read_only_is_no_destination(ground: Ground, make: Callable[[], Any]):
    thing = make()
    for call in (
        lambda: ground.mm.copy_in(START, thing),
        lambda: ground.mm.copy_in_vec(vec(64), thing),
    ):
        with pytest.raises((TypeError, BufferError)):
            call()
    if isinstance(thing, mmap.mmap):
        thing.close()


class Structure(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint64), ("b", ctypes.c_uint16 * 4))


SHAPES: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(16),
    "subclass": lambda: type("Sub", (bytearray,), {})(16),
    "array": lambda: array.array("d", [0.0, 1.0]),
    "rows": lambda: memoryview(bytearray(16)).cast("B", [2, 2, 4]),
    "floats": lambda: memoryview(bytearray(16)).cast("f", [2, 2]),
    "bools": lambda: memoryview(bytearray(16)).cast("?"),
    "chars": lambda: memoryview(bytearray(16)).cast("c"),
    "structure": Structure,
    "ctypes array": ctypes.c_uint32 * 4,
    "slice": lambda: memoryview(bytearray(100))[3:19],
    "PickleBuffer": lambda: pickle.PickleBuffer(bytearray(16)),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_any_contiguous_format_and_shape_will_do(ground: Ground, mechanism: str):
    mm, opts = ground.mm, through(mechanism)
    for what, make in SHAPES.items():
        thing = make()
        assert mm.copy_in(START + 5, thing, **opts) == 16, what
        assert bytes(memoryview(thing).cast("B")) == DATA[5:21], what
        assert mm.copy_out(START + PAGE, thing, **opts) == 16, what
        assert mm.read(START + PAGE, 16) == DATA[5:21], what
        assert mm.copy_in_vec(vec(16), thing, **opts) == 16, what
        assert bytes(memoryview(thing).cast("B")) == DATA[:16], what


def test_without_bytes_nothing_is_done(ground: Ground):
    for thing in (b"", "", bytearray(), array.array("I"), memoryview(b"").cast("I")):
        assert ground.mm.copy_out(START, thing) == 0
        assert ground.mm.copy_out(0, thing) == 0
        assert ground.mm.copy_out_many([(0, thing)] * 3) == 0
        if isinstance(thing, (bytearray, array.array)):
            assert ground.mm.copy_in(0, thing) == 0


def test_a_text_that_is_no_utf8(ground: Ground):
    with pytest.raises(UnicodeEncodeError):
        ground.mm.copy_out(START, "abc\ud800")
    assert ground.mm.read(START, 3) == DATA[:3]


def test_references_are_those_from_before(ground: Ground):
    mm, things = ground.mm, [bytearray(64), b"x" * 64, memoryview(bytearray(64)), "\u20ac" * 9]
    hole = START - PAGE
    before = [sys.getrefcount(thing) for thing in things]
    for thing in things:
        for addr in (START, hole, -1, None, 1 << 64):
            for call in (mm.copy_in, mm.copy_out):
                with contextlib.suppress(TypeError, BufferError, GuestFaultError):
                    call(addr, thing)  # type: ignore[arg-type]
            with contextlib.suppress(TypeError, GuestFaultError):
                mm.copy_out_many([(START, thing), (addr, thing), (START, None)])  # type: ignore[list-item]
    del thing, call
    assert [sys.getrefcount(thing) for thing in things] == before
    things[0].append(1)  # type: ignore[attr-defined]  # nobody holds its buffer


# ---- changed in the middle of the call ----


class Act:
    """An address that does something when it is asked for."""

    def __init__(self, act: Callable[[], object], addr: int = START) -> None:
        self.act = act
        self.addr = addr

    def __index__(self) -> int:
        self.act()
        return self.addr


def test_a_buffer_that_is_gone_when_the_address_is_known(ground: Ground):
    mm = ground.mm
    for make in (lambda: bytearray(8192), lambda: memoryview(bytearray(8192))):
        for call in (mm.copy_in, mm.copy_out):
            thing = make()
            act = thing.clear if isinstance(thing, bytearray) else thing.release
            with contextlib.suppress(BufferError, ValueError):
                # Whichever is looked at first: the buffer is empty, or cannot be emptied.
                assert call(Act(act), thing) in {0, 8192}
    grown = bytearray(16)
    with contextlib.suppress(BufferError):
        assert mm.copy_in(Act(lambda: grown.extend(bytes(1 << 20))), grown) in {16, (1 << 20) + 16}


@pytest.mark.parametrize("direction", ["in", "out"])
def test_nobody_resizes_or_releases_a_buffer_under_a_copy(ground: Ground, direction: str):
    buffer = bytearray(N_BYTES)
    view = memoryview(bytearray(N_BYTES))
    call = ground.mm.copy_in if direction == "in" else ground.mm.copy_out
    end = threading.Event()
    failures: list[BaseException] = []

    def copy() -> None:
        try:
            while not end.is_set():
                # At least what was there when it began.
                assert call(START, buffer) >= N_BYTES - 64
                with contextlib.suppress(ValueError):  # it was released in between
                    assert call(START, view) == N_BYTES
        except BaseException as e:  # noqa: BLE001 - told below
            failures.append(e)

    thread = threading.Thread(target=copy)
    thread.start()
    n_refused = 0
    try:
        deadline = time.monotonic() + 20
        while n_refused < 20 and time.monotonic() < deadline and not failures:
            try:
                del buffer[-1:]
                buffer.append(0)
            except BufferError:
                n_refused += 1
        with contextlib.suppress(BufferError):
            view.release()
    finally:
        end.set()
        thread.join()
    assert not failures
    assert n_refused
