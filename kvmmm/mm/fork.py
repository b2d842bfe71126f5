"""fork: a child with the same memory, which neither sees the other change.

    shared    private frames, copy-on-write in both from now on: one more reference on each
    copied    private frames that must not be write-protected: those of a guest kernel, because a
              CPU may walk or push to them, and pinned ones, because a device writes to them
    neither   frames of files: the child translates anew when it touches them

Source: gVisor mm.Fork.
"""

from __future__ import annotations

import copy
import errno
import os
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import WRITE, effective
from kvmmm.hostarch.addr import ADDRESS_LIMIT, HUGE_PAGE_BYTES, PAGE_BYTES, align_down
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.allocate import frames_for
from kvmmm.mm.backing import invalidate_locked
from kvmmm.mm.fault_log import FaultLog
from kvmmm.mm.pma import Pma, Removal
from kvmmm.mm.vma import LOCK_NONE, insert_locked

if TYPE_CHECKING:
    from kvmmm.arena import Reservation
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.vma import Vma
    from kvmmm.platform.base import AddressSpace


def fork(
    mm: MemoryManager, address_space: AddressSpace, reservation: Reservation | None = None
) -> MemoryManager:
    """Make a child with a copy of this memory, over the same arena.

    The child has the layout, the limits, the heap and all vmas but those with `dontfork`; nothing
    of it is mlocked. Its address space may come with translations (`AddressSpace.fork_into`), or
    empty.

    Args:
        mm: The parent.
        address_space: The child's; empty, of the parent's kind, and used by no CPU yet.
        reservation: As for `MemoryManager`: where the child's own frames go by preference.

    Preconditions:
        - Where CPUs walk frames (`walks_frames`), none of the parent's runs: its memory is copied
          as it is at some moment of this call.

    Raises:
        ArenaExhaustedError: No frames for copies, or no pages for tables. As with any failure,
            there is no child then, the parent is as it was, and the reservation is the caller's.
        OSError: What a mappable says to another mapping.
    """
    child = type(mm)(
        mm.arena, address_space, reservation,
        layout=mm.layout, limits=copy.copy(mm.limits), eager_bytes=mm.eager_bytes, policy=mm.policy,
    )  # fmt: skip
    if mm.fault_log is not None:
        child.fault_log = FaultLog(mm.fault_log.max_counts)
    # Mappables know the child from here on, and may tell it to forget what it does not have yet.
    child.captured = []
    with mm.mapping_lock:
        try:
            _copy_vmas_locked(mm, child)
            with mm.active_lock, child.active_lock:
                _Pieces(mm, child).hand_over_locked()
                _end_capture_locked(child)
        except BaseException:
            _forget_vmas(child)
            raise
    return child


def _copy_vmas_locked(mm: MemoryManager, child: MemoryManager) -> None:
    child.brk_start, child.brk_end = mm.brk_start, mm.brk_end
    child.generation = mm.generation
    for start, end, vma in mm.vmas:
        if vma.dontfork:
            continue
        if vma.mappable is not None:
            vma.mappable.add_mapping(
                child, AddrRange(start, end), start + vma.delta, writable=vma.may_write_back
            )
        copied = vma if vma.lock_mode == LOCK_NONE else vma.replaced(lock_mode=LOCK_NONE)
        insert_locked(child, start, end, copied)


def _forget_vmas(child: MemoryManager) -> None:
    for start, end, vma in child.vmas:
        if vma.mappable is not None:
            vma.mappable.remove_mapping(
                child, AddrRange(start, end), start + vma.delta, writable=vma.may_write_back
            )
    child.vmas.clear()
    child.home = None


def _end_capture_locked(child: MemoryManager) -> None:
    captured, child.captured = child.captured or [], None
    removal = Removal()
    for ar, private in captured:
        invalidate_locked(child, ar.start, ar.end, removal, private=private)
    removal.run(child)


class _Pieces:
    # The parent's pmas, by what becomes of them. Both active_locks are held throughout.

    __slots__ = ("child", "copied", "denied", "is_plain", "mm", "run", "shared", "to_copy")

    def __init__(self, mm: MemoryManager, child: MemoryManager) -> None:
        self.mm = mm
        self.child = child
        # Nothing but pmas decides: no frames that a CPU walks, none that are pinned, no dontfork.
        self.is_plain = not (
            mm.address_space.walks_frames or mm.pins or any(v.dontfork for _, _, v in mm.vmas)
        )
        self.shared: list[tuple[int, int, Pma]] = []
        self.to_copy: list[tuple[int, int, Pma, Vma]] = []
        # What the child must not reach through translations that it is given.
        self.denied = Removal()
        # What it has got for to_copy.
        self.copied: list[tuple[int, FileRange, Vma]] = []
        # The resident run of the arena that was seen last.
        self.run = (0, 0)
        self._sort_locked()

    def _sort_locked(self) -> None:
        if self.is_plain:
            for start, end, pma in self.mm.pmas:
                if pma.private:
                    self.shared.append((start, end, pma))
                else:
                    self.denied.unmap(start, end)
            return
        walks_frames = self.mm.address_space.walks_frames
        for vma_start, vma_end, vma in self.mm.vmas:
            for pma_start, pma_end, pma in self.mm.pmas.segments(vma_start, vma_end):
                start, end = max(pma_start, vma_start), min(pma_end, vma_end)
                if vma.dontfork or not pma.private:
                    self.denied.unmap(start, end)
                elif walks_frames and not vma.pure_data:
                    self._copy_later(start, end, pma, vma)
                elif self.mm.pins and not pma.need_cow:
                    self._sort_pinned_locked(start, end, pma, vma)
                else:
                    self.shared.append((start, end, pma))

    def _copy_later(self, start: int, end: int, pma: Pma, vma: Vma) -> None:
        self.denied.unmap(start, end)
        self.to_copy.append((start, end, pma, vma))

    def _sort_pinned_locked(self, start: int, end: int, pma: Pma, vma: Vma) -> None:
        # A frame that is ours alone and has several references is pinned.
        arena = self.mm.arena
        while start < end:
            fo = arena.first_shared(pma.file_range(start, end))
            stop = end if fo is None else fo - pma.delta
            if start < stop:
                self.shared.append((start, stop, pma))
            start = stop
            while stop < end and arena.ref_count(stop + pma.delta) > 1:
                stop += PAGE_BYTES
            if start < stop:
                self._copy_later(start, stop, pma, vma)
            start = stop

    def hand_over_locked(self) -> None:
        # What can fail comes first: frames for copies, then tables. References and rules follow.
        mm, child = self.mm, self.child
        is_given = False
        try:
            for start, end, pma, vma in self.to_copy:
                self._copy_locked(start, end, pma, vma)
            self._forget_locked()
            is_given = mm.address_space.fork_into(child.address_space)
            if not is_given:
                self._protect_locked()
            mm.arena.inc_ref_many([pma.file_range(s, e) for s, e, pma in self.shared])
        except BaseException:
            if is_given:
                child.address_space.unmap([AddrRange(0, child.max_addr)])
            for _, fr, _ in self.copied:
                mm.arena.dec_ref(fr)
            raise
        if is_given and self.denied.ranges:
            child.address_space.unmap(self.denied.ranges)
        self._share_locked()
        self._give_copies_locked()
        child.max_rss_bytes = child.pmas.span_bytes

    def _forget_locked(self) -> None:
        # No copy writes to what is shared from now on.
        mm = self.mm
        if self.shared:
            mm.forget(0, mm.max_addr & -PAGE_BYTES)
        if mm.mirror is not None:
            for start, end, _ in self.shared:
                mm.mirror.unmap(start, end)

    def _protect_locked(self) -> None:
        # No CPU of the parent writes to what is shared from now on.
        written = Removal()
        for start, end, pma in self.shared:
            if pma.effective_perms & WRITE:
                written.unmap(start, end)
        written.run(self.mm)

    def _share_locked(self) -> None:
        pmas, child_pmas = self.mm.pmas, self.child.pmas
        if self.is_plain:
            pmas.mutate(0, self.mm.max_addr, _as_shared)
        for start, end, pma in self.shared:
            if not self.is_plain:
                pmas.mutate(start, end, _as_shared)
            child_pmas.insert(start, end, _as_shared(start, end, pma))

    def _give_copies_locked(self) -> None:
        child = self.child
        for start, fr, vma in self.copied:
            end = start + fr.length_bytes
            child.pmas.insert(
                start, end,
                Pma(child.arena, fr.start - start, vma.effective_perms, effective(vma.max_perms)),
            )  # fmt: skip
            child.counters.allocated_bytes += end - start
            if child.address_space.walks_frames:
                # What a CPU walks must not fault: whoever runs the child maps it first.
                child.unmapped.append((start, end))

    def _copy_locked(self, start: int, end: int, pma: Pma, vma: Vma) -> None:
        # Raises ArenaExhaustedError; what was allocated is in self.copied.
        while start < end:
            fr = _frames_for(self.child, start, end)
            self.copied.append((start, fr, vma))
            self._copy_resident(start + pma.delta, fr)
            start += fr.length_bytes

    def _copy_resident(self, fo: int, dst: FileRange) -> None:
        # Holes stay holes: a range of hundreds of MiB costs no more than what is in it. By pwrite:
        # into holes it is the fastest copy.
        arena = self.mm.arena
        by = dst.start - fo
        end = fo + dst.length_bytes
        while fo < end:
            if not self.run[0] <= fo < self.run[1]:
                self.run = _resident_run(arena.fd, fo)
                fo = max(fo, self.run[0])
            stop = min(self.run[1], end)
            while fo < stop:
                fo += os.pwrite(arena.fd, arena.view[fo:stop], fo + by)


def _as_shared(_start: int, _end: int, pma: Pma) -> Pma:
    if pma.need_cow or not pma.private:
        return pma
    return pma.allowing(pma.effective_perms, pma.max_perms, need_cow=True)


def _frames_for(child: MemoryManager, start: int, end: int) -> FileRange:
    # In one piece; or a window, a page at least.
    window_end = min(align_down(start, HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES, end)
    for stop in (end, window_end):
        try:
            return frames_for(child, start, stop - start)
        except ArenaExhaustedError:
            continue
    return child.arena.allocate(PAGE_BYTES)


def _resident_run(fd: int, fo: int) -> tuple[int, int]:
    # The first run of bytes at or after `fo` that are not a hole.
    try:
        start = os.lseek(fd, fo, os.SEEK_DATA)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        # Nothing but a hole up to the end.
        return ADDRESS_LIMIT, ADDRESS_LIMIT
    return start, os.lseek(fd, start, os.SEEK_HOLE)
