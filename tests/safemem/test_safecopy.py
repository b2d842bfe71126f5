"""Fault-safe copies: exact counts, nothing written behind them, whoever faults and however."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from kvmmm.safemem.ffi import (
    own_faults,
    safe_compare_and_swap_uint32,
    safe_copy,
    safe_load_uint32,
    safe_swap_uint32,
    safe_zero,
    tune_copies,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
NONE, READ = 0, mmap.PROT_READ
SEGV, BUS = int(signal.SIGSEGV), int(signal.SIGBUS)
CANARY = 0xEE
PATTERN = bytes((i * 167 + i // 251 + 1) % 233 for i in range(64 << 10))  # no canary in it
_libc = ctypes.CDLL(None, use_errno=True)


class Area:
    """`n_good` pages that can be accessed, from `hva` to `edge`, and one after them that cannot."""

    def __init__(self, kind: str, n_good: int = 2) -> None:
        self._fd = os.memfd_create("area")
        n_bytes = (n_good + 1) * PAGE
        os.ftruncate(self._fd, n_bytes)
        self.memory = mmap.mmap(self._fd, n_bytes)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.edge = self.hva + n_good * PAGE
        self.n_good_bytes = n_good * PAGE
        self.signal = SEGV
        if kind == "bus":
            os.ftruncate(self._fd, self.n_good_bytes)
            self.signal = BUS
        else:
            self.protect(self.edge, PAGE, NONE if kind == "segv" else READ)

    def protect(self, hva: int, n_bytes: int, prot: int) -> None:
        assert _libc.mprotect(ctypes.c_void_p(hva), ctypes.c_size_t(n_bytes), prot) == 0

    def close(self) -> None:
        self.memory.close()
        os.close(self._fd)


@pytest.fixture(params=["segv", "bus"])
def area(request: pytest.FixtureRequest) -> Iterator[Area]:
    area = Area(request.param)
    yield area
    area.close()


@pytest.fixture(params=["avx2", "stream", "sse2"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    uses_avx2 = tune_copies(request.param != "sse2", int(request.param == "stream"))
    if request.param != "sse2" and not uses_avx2:
        pytest.skip("this CPU has no AVX2")
    yield request.param
    tune_copies(True, 0)


@pytest.fixture(autouse=True)
def _owned() -> None:
    own_faults()


def _buffer(n_bytes: int) -> tuple[memoryview, int]:
    array = (ctypes.c_char * n_bytes)()
    view = memoryview(array).cast("B")
    return view, ctypes.addressof(array)


def _cases(seed: int, n_places: int = 12) -> Iterator[tuple[int, int, int]]:
    """(size, bytes before the edge, alignment of the other side)."""
    rng = random.Random(seed)
    for n in range(601):
        places = {0, 1, n - 1, n, n + 1, *(rng.randrange(n + 2) for _ in range(n_places))}
        for before in places:
            if before >= 0:
                yield n, before, rng.randrange(64)


@pytest.mark.usefixtures("kernel")
def test_sweep_destination(area: Area):
    view, src = _buffer(8192)
    view[:] = PATTERN[:8192]
    memory, end = area.memory, area.n_good_bytes
    for n, before, align in _cases(1):
        start = end - before
        low = start - 64
        memory[low:end] = bytes([CANARY]) * (end - low)
        result = safe_copy(area.hva + start, src + align, n)
        done = min(n, before)
        assert result == ((n, 0, 0) if done == n else (done, area.signal, area.edge)), (n, before)
        expected = PATTERN[align : align + done] + bytes([CANARY]) * (before - done)
        assert memory[start:end] == expected, (n, before, align)
        assert memory[low:start] == bytes([CANARY]) * 64, (n, before, align)


@pytest.mark.usefixtures("kernel")
def test_sweep_source(area: Area):
    view, dst = _buffer(2048)
    memory, end = area.memory, area.n_good_bytes
    memory[:end] = PATTERN[:end]
    blank = bytes([CANARY]) * 2048
    for n, before, align in _cases(2):
        view[:] = blank
        result = safe_copy(dst + 64 + align, area.hva + end - before, n)
        done = min(n, before)
        assert result == ((n, 0, 0) if done == n else (done, area.signal, area.edge)), (n, before)
        at = 64 + align
        assert view[at : at + done] == PATTERN[end - before : end - before + done], (n, before)
        assert view[:at] == blank[:at], (n, before)
        assert view[at + done :] == blank[at + done :], (n, before)


@pytest.mark.usefixtures("kernel")
def test_sweep_zero(area: Area):
    memory, end = area.memory, area.n_good_bytes
    for n, before, _ in _cases(3):
        start = end - before
        memory[start - 64 : end] = bytes([CANARY]) * (before + 64)
        done = min(n, before)
        result = safe_zero(area.hva + start, n)
        assert result == ((n, 0, 0) if done == n else (done, area.signal, area.edge)), (n, before)
        assert memory[start:end] == bytes(done) + bytes([CANARY]) * (before - done), (n, before)
        assert memory[start - 64 : start] == bytes([CANARY]) * 64


@pytest.mark.usefixtures("kernel")
def test_sweep_both_sides():
    rng = random.Random(4)
    source, target = Area("bus"), Area("readonly")
    end = source.n_good_bytes
    source.memory[:end] = PATTERN[:end]
    for _ in range(5000):
        n, s, d = rng.randrange(2, 600), rng.randrange(600), rng.randrange(600)
        target.memory[end - 700 : end] = bytes([CANARY]) * 700
        done, signo, addr = safe_copy(target.edge - d, source.edge - s, n)
        assert done == min(n, s, d)
        if done < n:  # where both end, the load comes first
            assert (signo, addr) == ((BUS, source.edge) if s <= d else (SEGV, target.edge))
        assert target.memory[end - d : end - d + done] == PATTERN[end - s : end - s + done]
        assert set(target.memory[end - d + done : end]) <= {CANARY}
    source.close()
    target.close()


@pytest.mark.usefixtures("kernel")
def test_first_byte_is_bad_and_the_next_page_is_not():
    area = Area("segv", 2)
    view, other = _buffer(1024)
    area.protect(area.hva, PAGE, NONE)
    for n in (*range(1, 300), 600):
        for before in {1, 2, 3, min(n, 7), n // 2 + 1, n}:
            area.memory[PAGE : PAGE + 700] = bytes([CANARY]) * 700
            addr = area.hva + PAGE - before
            assert safe_copy(addr, other, n) == (0, SEGV, addr)
            assert safe_zero(addr, n) == (0, SEGV, addr)
            assert area.memory[PAGE : PAGE + 700] == bytes([CANARY]) * 700
            view[:] = bytes([CANARY]) * 1024
            assert safe_copy(other, addr, n) == (0, SEGV, addr)
            assert view == bytes([CANARY]) * 1024
    area.close()


@pytest.mark.usefixtures("kernel")
def test_large(area: Area):
    big = Area("segv" if area.signal == SEGV else "bus", 64)
    view, other = _buffer((64 << 10) + 256)
    view[: len(PATTERN)] = PATTERN
    rng = random.Random(5)
    end = big.n_good_bytes
    for n in (4096, 5000, 20000, 65535, 65536):
        for _ in range(20):
            before = rng.randrange(n + 10)
            start = end - before
            big.memory[start - 64 : end] = bytes([CANARY]) * (before + 64)
            done = min(n, before)
            answer = (n, 0, 0) if done == n else (done, big.signal, big.edge)
            assert safe_copy(big.hva + start, other, n) == answer
            assert big.memory[start:end] == PATTERN[:done] + bytes([CANARY]) * (before - done)
            assert safe_zero(big.hva + start, n) == answer
            assert big.memory[start:end] == bytes(done) + bytes([CANARY]) * (before - done)
            assert big.memory[start - 64 : start] == bytes([CANARY]) * 64
            big.memory[start:end] = PATTERN[:before]
            back, back_hva = _buffer(n + 64)
            back[:] = bytes([CANARY]) * (n + 64)
            assert safe_copy(back_hva, big.hva + start, n) == answer
            assert back[:done] == PATTERN[:done]
            assert set(back[done:]) == {CANARY}
    big.close()


@pytest.mark.usefixtures("kernel")
def test_a_megabyte_and_odd_bytes():
    n = (1 << 20) + 77
    source, src = _buffer(n + 64)
    target, dst = _buffer(n + 128)
    source[:] = (PATTERN * (n // len(PATTERN) + 1))[: n + 64]
    for s, d in ((0, 0), (1, 0), (0, 1), (31, 33), (5, 4)):
        target[:] = bytes([CANARY]) * (n + 128)
        assert safe_copy(dst + d, src + s, n) == (n, 0, 0)
        assert target[d : d + n] == source[s : s + n]
        assert set(target[d + n :]) == {CANARY}
        assert safe_zero(dst + d, n) == (n, 0, 0)
        assert target[d : d + n] == bytes(n)
        assert set(target[d + n :]) == {CANARY}


def test_addresses_that_are_no_addresses():
    _, other = _buffer(64)
    odd = 1 << 63  # not canonical: the CPU raises #GP, without an address
    for n in (1, 8, 40, 200, 1 << 20, 1 << 62):
        assert safe_copy(other, odd, n) == (0, SEGV, 0)
        assert safe_copy(odd, other, n) == (0, SEGV, 0)
        assert safe_zero(odd, n) == (0, SEGV, 0)
        assert safe_copy(other, 0, n) == (0, SEGV, 0)
        assert safe_copy(8, other, n) == (0, SEGV, 8)
    assert safe_load_uint32(odd) == (None, SEGV, 0)
    assert safe_copy(odd, 0, 0) == (0, 0, 0)
    assert safe_zero(0, 0) == (0, 0, 0)


@pytest.mark.parametrize("bad", [(), (1,), (1, 2, 3, 4), (-1, 0, 0), (0, 1 << 64, 0), ("", 0, 0)])
def test_arguments(bad: tuple[object, ...]):
    with pytest.raises((TypeError, OverflowError)):
        safe_copy(*bad)  # type: ignore[call-arg, arg-type]


def test_words(area: Area):
    word = area.edge - 4
    ctypes.c_uint32.from_address(word).value = 5
    assert safe_load_uint32(word) == (5, 0, 0)
    assert safe_swap_uint32(word, 0xFFFFFFFF) == (5, 0, 0)
    assert safe_compare_and_swap_uint32(word, 1, 2) == (0xFFFFFFFF, 0, 0)
    assert safe_load_uint32(word) == (0xFFFFFFFF, 0, 0)
    assert safe_compare_and_swap_uint32(word, 0xFFFFFFFF, 2) == (0xFFFFFFFF, 0, 0)
    assert safe_load_uint32(word) == (2, 0, 0)
    for offset in (0, 4, 4092):
        failed = (None, area.signal, area.edge + offset)
        assert safe_load_uint32(area.edge + offset) == failed
        assert safe_swap_uint32(area.edge + offset, 1) == failed
        assert safe_compare_and_swap_uint32(area.edge + offset, 0, 1) == failed


def test_words_read_only():
    area = Area("readonly")
    assert safe_load_uint32(area.edge) == (0, 0, 0)
    assert safe_swap_uint32(area.edge, 1) == (None, SEGV, area.edge)
    assert safe_compare_and_swap_uint32(area.edge, 7, 1) == (None, SEGV, area.edge)
    area.close()


def _copy_and_fault(seed: int, problems: list[object]) -> None:
    rng = random.Random(seed)
    area = Area("segv" if seed % 2 else "bus", 64)
    end = area.n_good_bytes
    area.memory[:end] = (PATTERN * 4)[:end]
    view, dst = _buffer(end + PAGE)
    for _ in range(100):
        before = rng.randrange(end) if rng.random() < 0.5 else rng.randrange(300)
        n = before + rng.randrange(PAGE) - 100
        n = max(n, 1)
        done = min(n, before)
        answer = (n, 0, 0) if done == n else (done, area.signal, area.edge)
        result = safe_copy(dst, area.edge - before, n)
        if result != answer or view[:done] != area.memory[end - before : end - before + done]:
            problems.append((seed, n, before, result))
    area.close()


def test_threads_copy_and_fault_at_once():
    problems: list[object] = []
    threads = [threading.Thread(target=_copy_and_fault, args=(seed, problems)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_memory_that_comes_and_goes():
    """A fault whose cause has gone when the copy looks again: the copy goes on, and is whole."""
    area = Area("segv", 65)
    n = 64 * PAGE
    view, src = _buffer(n)
    view[:] = PATTERN * 4
    stop = threading.Event()

    def toggle() -> None:
        rng = random.Random(6)
        while not stop.is_set():
            page = area.hva + rng.randrange(64) * PAGE
            area.protect(page, PAGE, NONE)
            area.protect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)

    thread = threading.Thread(target=toggle)
    thread.start()
    counts = [safe_copy(area.hva, src, n) for _ in range(300)]
    stop.set()
    thread.join()
    for done, signo, addr in counts:
        assert (done == n) == (signo == 0)
        assert signo in {0, SEGV}
        # Anywhere: a page may go while the copy is in the middle of it.
        assert done == n or addr == area.hva + done
    assert safe_copy(area.hva, src, n) == (n, 0, 0)
    assert area.memory[:n] == view
    area.close()
