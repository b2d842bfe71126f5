"""Hostile host buffers: of every shape, gone, cut short, changed under the copy. Never a crash."""

from __future__ import annotations

import array
import contextlib
import ctypes
import itertools
import mmap
import os
import pickle
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError, HostBufferError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from tests.mm.copying import (
    MECHANISMS,
    N_BYTES,
    PAGE,
    RELEASES_GIL,
    START,
    CutFile,
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


# ---- a buffer that faults ----


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("n_left", [0, 1, 3, 70])
class TestCutShort:
    """A mapping of a file that has lost its end: exactly what comes before it is copied."""

    N_PAGES = 80
    OFFSETS = (0, 1, 4000, PAGE)

    def test_destination(self, ground: Ground, n_left: int, mechanism: str):
        with CutFile(self.N_PAGES, n_left) as cut:
            for offset in self.OFFSETS:
                left = max(cut.end - offset, 0)
                with memoryview(cut.map)[offset:] as dst:
                    with pytest.raises(HostBufferError) as caught:
                        ground.mm.copy_in(START + 3, dst, **through(mechanism))
                    assert (caught.value.done, caught.value.offset) == (left, left)
                    assert bytes(dst[:left]) == DATA[3 : 3 + left]

    def test_source(self, ground: Ground, n_left: int, mechanism: str):
        with CutFile(self.N_PAGES, n_left) as cut:
            for offset in self.OFFSETS:
                ground.mm.copy_out(START, DATA)
                left = max(cut.end - offset, 0)
                with memoryview(cut.map)[offset:] as src:
                    with pytest.raises(HostBufferError) as caught:
                        ground.mm.copy_out(START + 3, src, **through(mechanism))
                    assert (caught.value.done, caught.value.offset) == (left, left)
                    assert ground.mm.read(START + 3, left) == bytes(src[:left])
                # Nothing behind it was written.
                assert ground.mm.read(START + 3 + left, 100) == DATA[3 + left : 103 + left]


@pytest.mark.parametrize("n_bytes", [1, 8, 64, 5000, RELEASES_GIL])
def test_a_few_bytes_over_the_end(ground: Ground, n_bytes: int):
    with CutFile(80, 2) as cut:
        for before in (0, 1, 7, 63):
            at = cut.end - before
            with memoryview(cut.map)[at : at + before + n_bytes] as part:
                for call in (ground.mm.copy_in, ground.mm.copy_out):
                    with pytest.raises(HostBufferError) as caught:
                        call(START, part)
                    assert (caught.value.done, caught.value.offset) == (before, before)


def test_a_cut_buffer_of_many_ranges(ground: Ground):
    ranges = AddrRangeSeq([AddrRange(START + i * 9000, START + i * 9000 + 3000) for i in range(4)])
    with CutFile(3, 1) as cut, memoryview(cut.map)[:12000] as part:
        for call in (ground.mm.copy_in_vec, ground.mm.copy_out_vec):
            with pytest.raises(HostBufferError) as caught:
                call(ranges, part)
            assert (caught.value.done, caught.value.offset) == (PAGE, PAGE)
        with pytest.raises(HostBufferError) as caught:
            ground.mm.copy_out_many([(START, b"abc"), (START + PAGE, part)])
        assert caught.value.done == 3 + PAGE


def test_which_of_two_ends_comes_first(ground: Ground):
    """The guest's memory ends, and the buffer: the error is of the earlier byte."""
    end = START + N_BYTES
    with CutFile(8, 2) as cut:
        with pytest.raises(HostBufferError):
            ground.mm.copy_in(end - 3 * PAGE, cut.map)
        with pytest.raises(GuestFaultError) as caught:
            ground.mm.copy_in(end - PAGE, cut.map)
        assert (caught.value.addr, caught.value.done) == (end, PAGE)


def test_a_file_cut_under_copies_that_run(ground: Ground):
    fd = os.memfd_create("cut")
    os.ftruncate(fd, N_BYTES)
    end = threading.Event()

    def cut() -> None:
        while not end.is_set():
            os.ftruncate(fd, PAGE)
            os.ftruncate(fd, N_BYTES)

    thread = threading.Thread(target=cut)
    n_cut = 0
    with mmap.mmap(fd, N_BYTES) as mapping:
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while n_cut < 30 and time.monotonic() < deadline:
                for call in (ground.mm.copy_in, ground.mm.copy_out):
                    try:
                        assert call(START, mapping) == N_BYTES
                    except HostBufferError as e:
                        # Not whole pages: it may be cut again while the last bytes are counted.
                        n_cut += 1
                        assert PAGE <= e.done == e.offset < N_BYTES  # noqa: PT017
        finally:
            end.set()
            thread.join()
    os.close(fd)
    assert n_cut


def test_nobody_closes_a_mapping_under_a_copy(ground: Ground):
    """mmap.close while a buffer of it is out is refused; and so the mapping stays."""
    mapping = mmap.mmap(-1, N_BYTES)
    end = threading.Event()
    failures: list[BaseException] = []

    def copy() -> None:
        try:
            while not end.is_set():
                assert ground.mm.copy_in(START, mapping) == N_BYTES
        except ValueError:
            pass  # closed between two copies
        except BaseException as e:  # noqa: BLE001 - told below
            failures.append(e)

    thread = threading.Thread(target=copy)
    thread.start()
    n_refused = 0
    for _ in range(10_000):
        try:
            mapping.close()
            break
        except BufferError:
            n_refused += 1
    end.set()
    thread.join()
    with contextlib.suppress(BufferError):
        mapping.close()
    assert not failures


# ---- the guest's own memory ----


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("n_bytes", [100, 9000, RELEASES_GIL])
def test_source_and_destination_overlap(ground: Ground, n_bytes: int, mechanism: str):
    """Which of its bytes an overlap gets is nobody's promise; all others are untouched."""
    mm, at = ground.mm, START + 8 * PAGE
    for by, is_in in itertools.product((-4096, -100, -1, 0, 1, 100, 4096), (False, True)):
        mm.copy_out(START, DATA)
        with mm.pin(at, n_bytes) as view:
            call, other = (mm.copy_in, at + by) if is_in else (mm.copy_out, at + by)
            assert call(other, view, **through(mechanism)) == n_bytes
        src, dst = (other, at) if is_in else (at, other)
        low, high = dst - START, dst - START + n_bytes
        after = mm.read(START, N_BYTES)
        assert (after[:low], after[high:]) == (DATA[:low], DATA[high:])
        assert set(after[low:high]) <= set(DATA[src - START : src - START + n_bytes])
        if not by or abs(by) >= n_bytes:
            assert after[low:high] == DATA[src - START : src - START + n_bytes]


def test_the_arenas_own_view(ground: Ground):
    with ground.arena.view[: 64 * PAGE] as view:
        assert ground.mm.copy_out(START, view) == 64 * PAGE
