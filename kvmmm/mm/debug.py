"""What a person or a test wants to see of a memory manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import access_str
from kvmmm.hostarch.addr import PAGE_MASK

if TYPE_CHECKING:
    from kvmmm.mm.manager import MemoryManager


def maps(mm: MemoryManager) -> str:
    """Return the vmas as /proc/<pid>/maps shows them, with the KiB that are backed."""
    lines = []
    with mm.mapping_lock, mm.active_lock:
        for start, end, vma in mm.vmas:
            backed = sum(
                min(pma_end, end) - max(pma_start, start)
                for pma_start, pma_end, _ in mm.pmas.segments(start, end)
            )
            perms = access_str(vma.perms)
            lines.append(f"{start:012x}-{end:012x} {perms}p {backed >> 10:>10} KiB  {vma.name}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def check_invariants(mm: MemoryManager) -> None:
    """Check what the package comment promises.

    Raises:
        AssertionError: Which invariant does not hold, and where.
    """
    with mm.mapping_lock, mm.active_lock:
        mm.vmas.check_invariants()
        mm.pmas.check_invariants()
        for kind, segments in (("vma", mm.vmas), ("pma", mm.pmas)):
            for start, end, _ in segments:
                _require(
                    not (start | end) & PAGE_MASK, f"{kind} [{start:#x}, {end:#x}) is unaligned"
                )
        for start, end, pma in mm.pmas:
            for gap_start, _gap_end in mm.vmas.gaps(start, end):
                _require(False, f"a pma without a vma at {gap_start:#x}")
            fr = pma.file_range(start, end)
            for fo in (fr.start, fr.end - 1):
                _require(mm.arena.ref_count(fo) >= 1, f"the frame at {fo:#x} of {start:#x} is free")
            for vma_start, vma_end, vma in mm.vmas.segments(start, end):
                page = max(start, vma_start)
                for bit in (1, 2, 4):
                    granted = mm.address_space.is_mapped(page, bit)
                    # Memslots cannot withhold reading or execution from what they map at all.
                    _require(
                        not granted or bit != 2 or bool(vma.effective_perms & bit),
                        f"[{page:#x}, {min(end, vma_end):#x}) may be written through the AS only",
                    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
