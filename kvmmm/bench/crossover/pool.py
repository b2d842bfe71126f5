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
_MADV_HUGEPAGE = 14
_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


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
    with suppress(OSError):
        text = _THP.read_text(encoding="ascii")
        return text[text.index("[") + 1 : text.index("]")] in {
            "always", "within_size", "advise", "force",
        }  # fmt: skip
    return False


class Pool:
    """The arena of all grounds of a page size, touched before anything is measured.

    Raises:
        GroundError: 2 MiB pages were asked for and are not to be had.
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
        if self.page_bytes == HUGE_PAGE_BYTES:
            madvise = ctypes.CDLL(None, use_errno=True).madvise
            madvise(ctypes.c_void_p(hva), ctypes.c_size_t(SPAN_BYTES), _MADV_HUGEPAGE)
        content = bytes(range(1, 256)) * (_BLOCK_BYTES // 255 + 1)
        with self.arena.view_of(self.frames) as view:
            # Twice: memory that the hypervisor had taken back is given anew by the first touch.
            for _ in range(2):
                for at in range(0, SPAN_BYTES, _BLOCK_BYTES):
                    view[at : at + _BLOCK_BYTES] = content[:_BLOCK_BYTES]
        if self.page_bytes == HUGE_PAGE_BYTES and (got := _huge_bytes(hva)) < SPAN_BYTES * 9 // 10:
            raise GroundError(f"only {got >> 20} of {SPAN_BYTES >> 20} MiB are in 2 MiB pages")

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
