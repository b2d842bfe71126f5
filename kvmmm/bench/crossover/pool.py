"""The frames of all grounds of a page size: an arena, touched before anything is measured."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from kvmmm.arena import Arena
from kvmmm.bench.crossover.geometry import SPAN_BYTES
from kvmmm.errors import KvmmmError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES

_TABLES_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_GIVEN = {"always", "within_size", "advise"}


class GroundError(KvmmmError, RuntimeError):
    """A state of memory that a cell needs cannot be had, or is not what it should be.

    Attributes:
        why: What is not.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)


def offers_huge_pages() -> bool:
    """Return whether shared memory is given 2 MiB pages here, when it asks for them."""
    of_all = _chosen(_THP / "shmem_enabled")
    if of_all in {None, "deny", "force"}:
        return of_all == "force"
    # Since Linux 6.11 each size has its own.
    of_size = _chosen(_THP / "hugepages-2048kB" / "shmem_enabled")
    return (of_all if of_size in {None, "inherit"} else of_size) in _GIVEN


def _chosen(path: Path) -> str | None:
    # Of a line in which what is chosen stands in brackets.
    with suppress(OSError, ValueError):
        text = path.read_text(encoding="ascii")
        return text[text.index("[") + 1 : text.index("]")]
    return None


class Pool:
    """The arena of all grounds of a page size, touched before anything is measured.

    Raises:
        GroundError: Pages of that size are not to be had.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES) -> None:
        self.page_bytes = page_bytes
        self.arena = Arena(SPAN_BYTES + _TABLES_BYTES, debug=False)
        self.frames = self.arena.allocate(SPAN_BYTES, align_bytes=HUGE_PAGE_BYTES)
        try:
            self._touch()
        except BaseException:
            self.close()
            raise

    def _touch(self) -> None:
        hva = self.arena.hva + self.frames.start
        is_huge = self.page_bytes == HUGE_PAGE_BYTES
        # Where nobody can be given huge pages, both are refused, and nothing is to be done.
        advice = _MADV_HUGEPAGE if is_huge else _MADV_NOHUGEPAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(hva), ctypes.c_size_t(SPAN_BYTES), advice)
        content = bytes(range(1, 256)) * (_BLOCK_BYTES // 255 + 1)
        with self.arena.view_of(self.frames) as view:
            # Twice: memory that the hypervisor had taken back is given anew by the first touch.
            for _ in range(2):
                for at in range(0, SPAN_BYTES, _BLOCK_BYTES):
                    view[at : at + _BLOCK_BYTES] = content[:_BLOCK_BYTES]
        got = _huge_bytes(hva)
        if got != (SPAN_BYTES if is_huge else 0):
            only = "only " if is_huge else ""
            raise GroundError(f"{only}{got >> 20} of {SPAN_BYTES >> 20} MiB are in 2 MiB pages")

    def close(self) -> None:
        """Give the frames back."""
        self.arena.dec_ref(self.frames)
        self.arena.close()


def _huge_bytes(hva: int) -> int:
    is_here = False
    found = 0
    with Path("/proc/self/smaps").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, _, high = first.partition("-")
                is_here = int(low, 16) <= hva < int(high, 16)
            elif is_here and first in {"ShmemPmdMapped:", "FilePmdMapped:"}:
                found += int(line.split()[1]) << 10
    return found
