"""What works on host addresses: the fault-safe copies, and the mirror's windows."""
# ruff: noqa: S101 - who calls looks for AssertionError

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.safemem import ffi

from .entries import Call
from .world import MARGIN_BYTES, MAX_ADDR, SOLID_PAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from .draw import Draw

_NOWHERE = (0, 8, 4096, 1 << 47, 1 << 63, (1 << 64) - 64, (1 << 64) - 1, 0xDEAD_BEEF_0000_0000)
_SIGNALS = (0, signal.SIGSEGV, signal.SIGBUS)
_GIANT = 1 << 30


def _own(d: Draw, n_bytes: int) -> tuple[int, int]:
    # (host address, bytes) in a buffer of ours, from its margin on or up to it.
    buffer = d.world.buffers[-1]
    room = len(buffer) - 2 * MARGIN_BYTES
    n_bytes = min(n_bytes, room)
    start = MARGIN_BYTES + d.rng.choice((0, (room - n_bytes) & -16))
    return ffi.address_of(ffi.ffi.from_buffer(buffer)) + start, n_bytes


def _length(d: Draw) -> int:
    return d.rng.choice((0, 1, 8, 63, 64, 255, 256, 4096, 5000, 33_000, 70_000, 300 << 10))


def _source(d: Draw, n_bytes: int) -> tuple[int, int]:
    # Bytes that can be read, or those of a file that may be cut short.
    rng = d.rng
    if rng.random() < 0.4:
        return _own(d, n_bytes)
    at, size = d.world.host_map_at
    start = rng.choice((0, 1, 4090, 4096, 12_300))
    return at + start, min(n_bytes, size - start)


def _safe_copy(d: Draw) -> Call:
    n_bytes = _length(d)
    (dst, room), (src, there) = _own(d, n_bytes), _source(d, n_bytes)
    n_bytes = min(room, there)
    kind = d.rng.random()
    if kind < 0.15:
        dst = d.rng.choice(_NOWHERE)
    elif kind < 0.3:
        src = d.rng.choice(_NOWHERE)
    if kind < 0.3 and d.rng.random() < 0.5:
        n_bytes = d.rng.choice((1 << 20, 1 << 63, (1 << 64) - 1))
    return Call(_moves, "safe_copy", dst, src, n_bytes)


def _safe_zero(d: Draw) -> Call:
    dst, n_bytes = _own(d, _length(d)) if d.rng.random() < 0.5 else _source(d, _length(d))
    if d.rng.random() < 0.2:
        dst = d.rng.choice(_NOWHERE)
    return Call(_moves, "safe_zero", dst, n_bytes)


def _moves(name: str, *args: int) -> None:
    done, signo, hva = getattr(ffi, name)(*args)
    n_bytes, areas = args[-1], args[:-1]
    assert 0 <= done <= n_bytes, f"{done} bytes done"
    assert signo in _SIGNALS, f"signal {signo}"
    assert (done == n_bytes) == (not signo), f"{done} bytes done, signal {signo}"
    if hva:
        at = [(area + done) % (1 << 64) for area in areas]
        assert hva in at, f"a fault at {hva:#x} after {done} bytes, not at one of {at}"


def _safe_word(d: Draw) -> Call:
    rng = d.rng
    at = (_own(d, 64) if rng.random() < 0.5 else _source(d, 64))[0] & -4
    if rng.random() < 0.2:
        at = rng.choice(_NOWHERE) & -4
    name = rng.choice(("safe_swap_uint32", "safe_compare_and_swap_uint32", "safe_load_uint32"))
    n_words = {"safe_swap_uint32": 1, "safe_compare_and_swap_uint32": 2}.get(name, 0)
    words = [rng.choice((0, 1, 0xFFFF_FFFF)) for _ in range(n_words)]
    return Call(_works, name, at, *words)


def _works(name: str, *args: int) -> None:
    old, signo, _ = getattr(ffi, name)(*args)
    assert (old is None) == bool(signo), f"{old}, signal {signo}"
    assert signo in _SIGNALS, f"signal {signo}"


def _wrong(d: Draw) -> Call:
    # Never that many numbers which are an address.
    names = ("safe_copy", "safe_zero", "safe_swap_uint32", "safe_load_uint32", "own_faults")
    wrong: tuple[Any, ...] = (None, "x", 1.5, -1, 1 << 64, b"", [], d.world)
    args = [d.rng.choice(wrong) for _ in range(d.rng.randrange(1, 5))]
    return Call(getattr(ffi, d.rng.choice(names)), *args)


# ---- the mirror ----


def _mirror(d: Draw) -> Call:
    rng, window = d.rng, d.world.window
    kind = rng.random()
    if kind < 0.02:
        return Call(ffi.MirrorWindow, rng.choice((0, 1, -1, 1 << 58, 1 << 64, None, "x", 5000)))
    if kind < 0.05:
        blank = ffi.MirrorWindow.__new__(ffi.MirrorWindow)
        return Call(blank.find, rng.choice((0, 4096, 1 << 40)), 8, 1)
    if kind < 0.3:
        return Call(_find, d, rng.choice((_page(d) + rng.choice((0, 1, 4095)), MAX_ADDR, 1 << 63)))
    start = _page(d)
    end = start + PAGE_BYTES * rng.choice((0, 1, 2, 8, 64, 600))
    if rng.random() < 0.1:
        start, end = rng.choice(((end, start - 1), (start + 1, end), (start, 1 << 63), (-1, 5)))
    if kind < 0.6:
        fo = PAGE_BYTES * rng.randrange(SOLID_PAGES)
        end = min(end, start + SOLID_PAGES * PAGE_BYTES - fo) if rng.random() < 0.9 else start + 1
        fd = d.world.solid_fd if rng.random() < 0.95 else rng.choice((-1, 9999, 1 << 40))
        return Call(window.map, start, end, fd, fo, rng.choice((1, 1, 3, 3, 0, 8, -1)))
    name = rng.choice(("populate", "forget", "clear", "clear", "clear_windows", "victim"))
    return Call(getattr(window, name), start, end)


def _page(d: Draw) -> int:
    # Few pages, over the edge between two windows: so that things meet.
    first = d.rng.choice((0, 0, _GIANT, 2 * _GIANT - 16 * PAGE_BYTES))
    return first + PAGE_BYTES * d.rng.randrange(16)


def _find(d: Draw, addr: int) -> None:
    # What is found must be there, and be the file's: each of its pages is filled with a number.
    found = d.world.window.find(addr, d.rng.choice((1, 4096, 9000, 1 << 40)), d.rng.choice((1, 2)))
    if found is None or not d.is_alone:
        return
    hva, n_bytes = found
    n_bytes = min(n_bytes, 32 * PAGE_BYTES)
    seen = bytearray(n_bytes)
    done, signo, _ = ffi.safe_copy(ffi.address_of(ffi.ffi.from_buffer(seen)), hva, n_bytes)
    assert (done, signo) == (n_bytes, 0), f"signal {signo} after {done} of {n_bytes} bytes"
    at = -addr % PAGE_BYTES
    for page in [seen[:at], *(seen[i : i + PAGE_BYTES] for i in range(at, n_bytes, PAGE_BYTES))]:
        marks: Any = set(page)
        assert len(marks) <= 1, "bytes of two pages in one"
        assert not marks or 1 <= marks.pop() <= SOLID_PAGES, "bytes of no page of the file"


RAW: dict[str, tuple[int, Callable[[Draw], Call]]] = {
    "safe_copy": (4, _safe_copy),
    "safe_zero": (2, _safe_zero),
    "safe words": (2, _safe_word),
    "safe, wrong": (1, _wrong),
    "MirrorWindow": (6, _mirror),
}
"""By name: how often, and what makes one."""
