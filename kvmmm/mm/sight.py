"""What there is to see of an address space at one moment, for texts and pictures of it.

`look` takes the mm's locks only to copy its two maps; whose the frames are is found out after that.
So a guest may run, and what is said of shares may be a moment younger than the rest.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

from kvmmm.errors import KvmmmError
from kvmmm.hostarch.access import WRITE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.mm.fault_log import FaultPlace
    from kvmmm.mm.manager import Counters, MemoryManager
    from kvmmm.mm.pma import Pma
    from kvmmm.mm.vma import Vma

OWN, RELATIVE, FILE, SHARED = range(4)
"""Whose a resident page is: this mm's alone; a relative's as well, since a fork, until one of them
writes; a file's, mapped privately, until it is written; or shared for good."""

KIND_NAMES = ("own", "shared with a relative", "a file's", "shared")


class Piece(NamedTuple):
    """A resident part of a mapping.

    Attributes:
        start: Guest address.
        end: One past its last byte.
        kind: OWN, RELATIVE, FILE or SHARED.
        n_holders: How many translations have these frames; a pin of a file's counts as one.
        is_private: Whether the frames are anonymous memory (`Pma.private`).
    """

    start: int
    end: int
    kind: int
    n_holders: int
    is_private: bool


class SeenMapping:
    """A vma, and what of it is resident.

    Attributes:
        start: Guest address.
        end: One past its last byte.
        vma: What holds for it.
        pieces: What is resident, ascending.
        by_kind: How many bytes that is, by kind.
        pss_bytes: The same, each page divided by those who have it.
    """

    __slots__ = ("by_kind", "end", "pieces", "pss_bytes", "start", "vma")

    def __init__(self, start: int, end: int, vma: Vma, pieces: list[Piece]) -> None:
        self.start = start
        self.end = end
        self.vma = vma
        self.pieces = pieces
        self.by_kind = [0, 0, 0, 0]
        self.pss_bytes = 0
        for piece in pieces:
            n_bytes = piece.end - piece.start
            self.by_kind[piece.kind] += n_bytes
            self.pss_bytes += n_bytes // piece.n_holders

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    @property
    def rss_bytes(self) -> int:
        """What of it is resident."""
        return sum(self.by_kind)

    def is_dirty(self, piece: Piece) -> bool:
        """Return whether the guest may have written it: writable, and not a file's own page."""
        return bool(self.vma.effective_perms & WRITE) and piece.kind != FILE


class Sight:
    """An address space at one moment. Immutable.

    Attributes:
        mappings: All of it, ascending.
        min_addr, max_addr: Where there can be mappings.
        usage_bytes, rss_bytes, max_rss_bytes, data_bytes, locked_bytes, pinned_bytes: Sums.
        counters: What happened so far.
        faults: Where faults fell; None if nobody logs it (`mm.fault_log`).
    """

    __slots__ = (
        "counters", "data_bytes", "faults", "locked_bytes", "mappings", "max_addr",
        "max_rss_bytes", "min_addr", "pinned_bytes", "rss_bytes", "usage_bytes",
    )  # fmt: skip

    counters: Counters
    faults: list[FaultPlace] | None
    mappings: list[SeenMapping]

    def __init__(self, mm: MemoryManager) -> None:
        self.min_addr, self.max_addr = mm.layout.min_addr, mm.max_addr
        with mm.mapping_lock, mm.active_lock:
            vmas, pmas = list(mm.vmas), list(mm.pmas)
            self.usage_bytes, self.rss_bytes = mm.usage_bytes, mm.rss_bytes
            self.max_rss_bytes = mm.max_rss_bytes
            self.data_bytes, self.locked_bytes = mm.data_bytes, mm.locked_bytes
            self.pinned_bytes = sum(ar.length_bytes for pin in mm.pins for ar, _, _ in pin.ranges)
            self.counters = copy.copy(mm.counters)
            self.faults = mm.fault_log.places() if mm.fault_log is not None else None
        self.mappings = [
            SeenMapping(start, end, vma, [p for part in parts for p in _pieces(mm, *part)])
            for start, end, vma, parts in _joined(vmas, pmas)
        ]

    @property
    def by_kind(self) -> list[int]:
        """What is resident, in bytes by kind."""
        return [sum(mapping.by_kind[kind] for mapping in self.mappings) for kind in range(4)]


def look(mm: MemoryManager) -> Sight:
    """Return what there is to see of an address space now; the guest may run.

    Preconditions:
        - The caller holds no lock of the mm.
    """
    return Sight(mm)


def _joined(
    vmas: list[tuple[int, int, Vma]], pmas: list[tuple[int, int, Pma]]
) -> Iterator[tuple[int, int, Vma, list[tuple[int, int, Pma]]]]:
    # Each vma with the parts of pmas in it. A pma may reach over several vmas.
    at = 0
    for start, end, vma in vmas:
        parts = []
        while at < len(pmas) and pmas[at][0] < end:
            pma_start, pma_end, pma = pmas[at]
            if pma_end > start:
                parts.append((max(start, pma_start), min(end, pma_end), pma))
            if pma_end > end:
                break
            at += 1
        yield start, end, vma, parts


def _pieces(mm: MemoryManager, start: int, end: int, pma: Pma) -> Iterator[Piece]:
    if pma.private and not pma.need_cow:
        yield Piece(start, end, OWN, 1, is_private=True)
        return
    # Shared memory holds a reference of its own on each of its frames.
    n_kept = int(pma.file is mm.arena and not pma.private)
    for run_start, run_end, count in _runs(start, end, pma):
        n_holders = max(count - n_kept, 1)
        if pma.private:
            # Once its relatives are gone, or have copied it, it is its own.
            kind = RELATIVE if n_holders > 1 else OWN
        else:
            kind = FILE if pma.need_cow else SHARED
        yield Piece(run_start, run_end, kind, n_holders, pma.private)


def _runs(start: int, end: int, pma: Pma) -> Iterator[tuple[int, int, int]]:
    # What has been dropped since counts as one's own.
    try:
        counts = pma.file.ref_counts(pma.file_range(start, end))
    except KvmmmError:
        counts = []
    for fo_start, fo_end, count in counts:
        run_start, run_end = fo_start - pma.delta, fo_end - pma.delta
        if start < run_start:
            yield start, run_start, 1
        yield run_start, run_end, count
        start = run_end
    if start < end:
        yield start, end, 1
