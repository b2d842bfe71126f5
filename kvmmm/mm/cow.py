"""Copy on write: what is shared until it is written becomes this mm's own."""

# ruff: noqa: FURB136 - a call of min() costs more than an if, right after an exit
from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestBusError
from kvmmm.hostarch.access import EXECUTE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_down
from kvmmm.mm.pma import Pma

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Removal
    from kvmmm.mm.vma import Vma


_HUGE_MASK = HUGE_PAGE_BYTES - 1


def break_locked(
    mm: MemoryManager, addr: int, end: int, vma_segment: tuple[int, int, Vma], access: int,
    removal: Removal,
) -> None:  # fmt: skip
    """Make the page of `addr`, and what is sensible around it, this mm's own.

    Frames that nobody else holds any more are taken as they are. Others are copied, a window at a
    time: neighbours of what is written are likely to be written, and a copy of 2 MiB costs less
    than a handful of faults. Not so around code, where a debugger or a loader writes here and
    there, and on stacks.

    Args:
        mm: The address space.
        addr: Page aligned; a pma that needs the copy is there.
        end: What is to be written is [addr, end), page aligned; may reach beyond the pma.
        vma_segment: (start, end, vma) around `addr`.
        access: What it is wanted for.
        removal: Unmaps what was there, then drops it.

    Preconditions:
        - mapping_lock and active_lock are held.

    Raises:
        GuestBusError: The file's bytes at `addr` cannot be read any more; nothing was changed.
        ArenaExhaustedError: No frame is left for the page of `addr`; the same.

    Source:
        gVisor mm.breakCopyOnWriteLocked and mm.isPMASoleOwner (HasUniqueRef).
    """
    found = mm.pmas.find(addr)
    if found is None:
        raise AssertionError(f"no pma at {addr:#x}")
    pma_start, pma_end, pma = found
    vma_start, vma_end, vma = vma_segment
    # Cold, after an exit: what is usual comes first, and one look often says that it is shared.
    arena = mm.arena
    may_be_ours = pma.private and arena.ref_count(addr + pma.delta) == 1
    if may_be_ours and arena.has_unique_ref(pma.file_range(pma_start, pma_end)):
        _own_locked(mm, pma_start, pma_end)
        return
    start, stop = _window(addr, end, vma)
    if start < pma_start or start < vma_start:
        start = pma_start if vma_start < pma_start else vma_start
    if stop > pma_end or stop > vma_end:
        stop = pma_end if pma_end < vma_end else vma_end
    # Of a shared pma a window may be ours alone: a relative has copied it, or is gone.
    if may_be_ours and arena.has_unique_ref(pma.file_range(start, stop)):
        _own_locked(mm, start, stop)
        return
    fo = None
    if pma.file is arena:
        fo = arena.take_copy(start + pma.delta, stop - start, HUGE_PAGE_BYTES, start & _HUGE_MASK)
    if fo is None:
        start, fr = _copy(mm, addr, start, stop, pma)
        stop, fo = start + fr.length_bytes, fr.start
        if stop <= addr:
            if fr:
                arena.dec_ref(fr)
            raise GuestBusError(addr, access)
    _replace_locked(mm, start, stop, fo, vma, removal)


def _window(addr: int, end: int, vma: Vma) -> tuple[int, int]:
    if vma.effective_perms & EXECUTE:
        return addr, end
    if vma.is_stack or vma.grows_down:
        return addr - PAGE_BYTES, end + PAGE_BYTES
    return addr & -HUGE_PAGE_BYTES, end + _HUGE_MASK & -HUGE_PAGE_BYTES


def _own_locked(mm: MemoryManager, start: int, end: int) -> None:
    # Translations stay: they are read-only at worst, and the next write fault replaces them.
    for vma_start, vma_end, vma in list(mm.vmas.segments(start, end)):
        mm.pmas.mutate(max(start, vma_start), min(end, vma_end), _owned_in(vma))


def _owned_in(vma: Vma) -> Callable[[int, int, Pma], Pma]:
    perms, max_perms = vma.effective_perms, vma.effective_max_perms
    return lambda _start, _end, pma: pma.allowing(perms, max_perms, need_cow=False)


def _copy(mm: MemoryManager, addr: int, start: int, stop: int, pma: Pma) -> tuple[int, FileRange]:
    # A small arena shrinks the window, down to the page that is needed. No reference is taken on
    # the source: the pma has one, and active_lock is held. The pages may come to an end before
    # `stop`, or before they have begun, where a file was cut off meanwhile.
    huge = align_down(addr, HUGE_PAGE_BYTES)
    windows = [(start, stop)]
    if stop - start > HUGE_PAGE_BYTES:
        windows.append((max(start, huge), min(stop, huge + HUGE_PAGE_BYTES)))
    for at, until in windows:
        try:
            return at, mm.arena.copy_from(
                pma.file, at + pma.delta, until - at,
                align_bytes=HUGE_PAGE_BYTES, phase_bytes=at % HUGE_PAGE_BYTES,
            )[0]  # fmt: skip
        except ArenaExhaustedError:
            continue
    return addr, mm.arena.copy_from(pma.file, addr + pma.delta, PAGE_BYTES)[0]


def _replace_locked(
    mm: MemoryManager, start: int, stop: int, fo: int, vma: Vma, removal: Removal
) -> None:
    pmas, counters, length = mm.pmas, mm.counters, stop - start
    removal.unmap(start, stop)
    for piece_start, piece_end, pma in pmas.remove(start, stop):
        removal.drop(piece_start, piece_end, pma)
    pma = Pma(mm.arena, fo - start, vma.effective_perms, vma.effective_max_perms)
    pmas.insert(start, stop, pma)
    counters.allocated_bytes += length
    counters.copied_bytes += length
    counters.cow_breaks += 1
