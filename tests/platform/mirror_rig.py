"""What the tests of the mirror share: looking into windows, and at what the kernel has there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ
from kvmmm.safemem.ffi import address_of, ffi, safe_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.mirror import Mirror
    from kvmmm.safemem.ffi import MirrorWindow

    NewMirror = Callable[..., Mirror]

PAGE = 4096
GIB = 1 << 30
MAX_ADDR = 1 << 47
BASE = 5 * GIB + 0x40_0000
N_PAGES = 256
"""Of the file that is mirrored; each begins with its stamp."""


def stamp(page: int) -> bytes:
    return b"page %4d" % page


def window_vmas(mirror: MirrorWindow) -> dict[int, list[tuple[int, int, str]]]:
    """Guest address of each window -> its VMAs: (guest start, guest end, rwxp), ascending."""
    maps = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        span, kind = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        maps.append((start, end, kind))
    windows = {}
    for addr, hva in mirror.windows():
        windows[addr] = [
            (max(start, hva) - hva + addr, min(end, hva + GIB) - hva + addr, kind)
            for start, end, kind in maps
            if start < hva + GIB and end > hva
        ]
    return windows


def check_windows(mirror: MirrorWindow) -> None:
    """No hole in any window, and no more VMAs than the mirror believes."""
    n_vmas = 0
    for addr, vmas in window_vmas(mirror).items():
        at = addr
        for start, end, _kind in vmas:
            assert start == at, f"a hole at {at:#x}"
            at = end
        assert at == addr + GIB
        n_vmas += len(vmas)
    assert n_vmas + mirror.n_windows <= mirror.n_vmas


def peek(hva: int, n_bytes: int = 9) -> bytes | int:
    """The bytes there, or the signal that they gave."""
    buf = ffi.new("char[]", n_bytes)
    n_done, signum, _addr = safe_copy(address_of(buf), hva, n_bytes)
    return bytes(ffi.buffer(buf)) if n_done == n_bytes else signum


def poke(hva: int, data: bytes) -> int:
    """0, or the signal that it gave."""
    return safe_copy(hva, address_of(ffi.from_buffer(data)), len(data))[1]


def at(mirror: MirrorWindow, addr: int, access: int = READ) -> int:
    found = mirror.find(addr, 1, access)
    assert found is not None
    return found[0]


def hva_of(mirror: MirrorWindow, addr: int) -> int:
    """Where the address lies in its window, resident or not."""
    return dict(mirror.windows())[addr & -GIB] + addr % GIB
