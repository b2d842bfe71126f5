"""Host buffers that fault in the middle of a copy, and those that are the guest's own memory."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import threading
import time
from typing import TYPE_CHECKING

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
    from collections.abc import Iterator

DATA = random.Random(5).randbytes(N_BYTES)


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground() as made:
        made.mm.copy_out(START, DATA)
        yield made


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


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_a_cut_buffer_of_many_requests(ground: Ground, n_before: int, mechanism: str):
    """`.offset` is in the buffer of its item; `.done` counts all."""
    before = [(START + i * PAGE, b"abc" * i) for i in range(n_before)]
    n_done = sum(len(data) for _, data in before)
    with CutFile(3, 1) as cut, memoryview(cut.map)[100:12000] as part:
        requests = [*before, (START + 9 * PAGE, part), (START, b"never")]
        with pytest.raises(HostBufferError) as caught:
            ground.mm.copy_out_many(requests, **through(mechanism))
        error = caught.value
        assert (error.offset, error.done) == (PAGE - 100, n_done + PAGE - 100)
        assert error.item == n_before  # type: ignore[attr-defined]
        assert f"at byte {PAGE - 100}:" in str(error)
        assert f"({n_done + PAGE - 100} bytes done)" in str(error)
        assert ground.mm.read(START + 9 * PAGE, PAGE - 100) == bytes(part[: PAGE - 100])


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
