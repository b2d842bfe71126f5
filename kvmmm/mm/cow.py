"""Copy on write: what is shared until it is written becomes this mm's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, GuestBusError
from kvmmm.hostarch.access import EXECUTE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES, align_down, align_up
from kvmmm.mm.pma import Pma

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Removal
    from kvmmm.mm.vma import Vma


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
    if pma.private and mm.arena.has_unique_ref(pma.file_range(pma_start, pma_end)):
        _own_locked(mm, pma_start, pma_end)
        return
    start, stop = _window(addr, end, vma)
    start, stop = max(start, pma_start, vma_start), min(stop, pma_end, vma_end)
    # Of a shared pma a window may be ours alone: a relative has copied it, or is gone.
    is_part = stop - start < pma_end - pma_start
    if is_part and pma.private and mm.arena.has_unique_ref(pma.file_range(start, stop)):
        _own_locked(mm, start, stop)
        return
    start, fr = _copy(mm, addr, start, stop, pma)
    if start + fr.length_bytes <= addr:
        if fr:
            mm.arena.dec_ref(fr)
        raise GuestBusError(addr, access)
    _replace_locked(mm, start, fr, vma, removal)


def _window(addr: int, end: int, vma: Vma) -> tuple[int, int]:
    if vma.effective_perms & EXECUTE:
        return addr, end
    if vma.is_stack or vma.grows_down:
        return addr - PAGE_BYTES, end + PAGE_BYTES
    return align_down(addr, HUGE_PAGE_BYTES), align_up(end, HUGE_PAGE_BYTES)


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
    mm: MemoryManager, start: int, fr: FileRange, vma: Vma, removal: Removal
) -> None:
    stop = start + fr.length_bytes
    removal.unmap(start, stop)
    for piece_start, piece_end, pma in mm.pmas.remove(start, stop):
        removal.drop(piece_start, piece_end, pma)
    mm.pmas.insert(
        start, stop,
        Pma(mm.arena, fr.start - start, vma.effective_perms, vma.effective_max_perms),
    )  # fmt: skip
    mm.counters.allocated_bytes += stop - start
    mm.counters.copied_bytes += stop - start
    mm.counters.cow_breaks += 1
