"""Frames of what is mapped: asking a mappable where its bytes lie, and keeping the answer."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import READ, WRITE, effective
from kvmmm.hostarch.ranges import FileRange
from kvmmm.mm import debug
from kvmmm.mm.pma import Pma

if TYPE_CHECKING:
    from kvmmm.memmap.file import Translation
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Removal
    from kvmmm.mm.vma import Vma


def translate_locked(
    mm: MemoryManager, addr: int, end: int, vma_segment: tuple[int, int, Vma], access: int, *,
    exact: bool,
) -> None:  # fmt: skip
    """Back `addr`, and as much of [addr, end) as one translation gives, by the vma's mappable.

    Args:
        mm: The address space.
        addr: Page aligned; no pma is there.
        end: What is wanted is [addr, end), page aligned; may reach beyond the vma.
        vma_segment: (start, end, vma) around `addr`; the vma has a mappable.
        access: What it is wanted for.
        exact: Nothing but what is wanted; otherwise the mappable may give what lies around it.

    Preconditions:
        - mapping_lock and active_lock are held.

    Raises:
        GuestBusError: The mappable has no bytes at `addr`.
        OSError: What else it answers.

    Source:
        gVisor mm.getPMAsInternalLocked, the part with Mappable.Translate.
    """
    vma_start, vma_end, vma = vma_segment
    gap_start, gap_end = mm.pmas.find_gap(addr) or (vma_start, vma_end)
    gap_start, gap_end = max(gap_start, vma_start), min(gap_end, vma_end)
    end = min(end, gap_end)
    if exact:
        gap_start, gap_end = addr, end
    # READ always, for copies on write; and a private mapping never writes to the file.
    wanted = (access | READ) & ~WRITE if vma.private else access | READ
    for t in _ask(vma, (addr, end), (gap_start, gap_end), wanted, access):
        start = t.start - vma.delta
        t.file.inc_ref(FileRange(t.offset, t.offset + t.end - t.start))
        mm.pmas.insert(start, t.end - vma.delta, _pma(t, start, vma))
    mm.max_rss_bytes = max(mm.max_rss_bytes, mm.pmas.span_bytes)


def translate_again_locked(
    mm: MemoryManager, addr: int, end: int, vma_segment: tuple[int, int, Vma], access: int,
    removal: Removal,
) -> None:  # fmt: skip
    """Have the pma at `addr` translated anew, because its translation is not good for `access`.

    A file that was read so far is to be written, say, and wants to know.

    Args and errors: as for `translate_locked`; a pma of that mappable is at `addr`. Frames that
    changed are unmapped and dropped by `removal`.
    """
    vma_start, vma_end, vma = vma_segment
    found = mm.pmas.find(addr)
    if found is None:
        raise AssertionError(f"no pma at {addr:#x}")
    old_start, old_end, old = max(found[0], vma_start), min(found[1], vma_end), found[2]
    wanted = old.translate_perms | access | READ
    if vma.private:
        wanted &= ~WRITE
    for t in _ask(vma, (addr, min(end, old_end)), (old_start, old_end), wanted, access):
        start, stop = t.start - vma.delta, t.end - vma.delta
        fr = FileRange(t.offset, t.offset + stop - start)
        if t.file is old.file and t.offset == start + old.delta:
            # The same frames: the reference is there, and no CPU may do less than before.
            mm.pmas.remove(start, stop)
        else:
            t.file.inc_ref(fr)
            removal.unmap(start, stop)
            for piece_start, piece_end, pma in mm.pmas.remove(start, stop):
                removal.drop(piece_start, piece_end, pma)
        mm.pmas.insert(start, stop, _pma(t, start, vma))


def _pma(t: Translation, start: int, vma: Vma) -> Pma:
    return Pma(
        t.file, t.offset - start, vma.effective_perms, effective(vma.max_perms),
        translate_perms=t.perms, need_cow=vma.private, private=False,
    )  # fmt: skip


def _ask(
    vma: Vma, required: tuple[int, int], optional: tuple[int, int], wanted: int, access: int
) -> list[Translation]:
    # One or more translations, the first of which has required[0]. Ranges are addresses.
    if vma.mappable is None:
        raise AssertionError("anonymous memory is not translated")
    by = vma.delta
    required_fr = FileRange(required[0] + by, required[1] + by)
    optional_fr = FileRange(optional[0] + by, optional[1] + by)
    translations, error = vma.mappable.translate(required_fr, optional_fr, wanted)
    if debug.ENABLED:
        from kvmmm.memmap.check import check_translations

        check_translations(required_fr, optional_fr, wanted, translations, error)
    if translations:
        return translations
    if error is None or error.errno == errno.EIO:
        raise GuestBusError(required[0], access)
    raise error
