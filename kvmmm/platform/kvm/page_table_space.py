"""`PageTableAddressSpace`: an mm address is a guest-virtual one, a translation is a table entry.

    #PF in ring 3 ──► mm.handle_user_fault ──► map_file: entries ──► resume

What is mapped for the first time is one walk of the tables. What replaces or removes something ends
with a shootdown: when `map_file` or `unmap` returns, no vCPU uses the old translation.

The tables never change a present entry above the last level in place: they get a new root instead,
down to the place of the change (`kvmmm.pagetables`). So after every change the root may be another
one, and the vCPUs that are in this space are given it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_SHIFT
from kvmmm.pagetables import PageTables
from kvmmm.pagetables.pte import PML4E_SPAN_BYTES, PTE_NX, PTE_W, access_of, flags_of
from kvmmm.pagetables.runs import RunScan
from kvmmm.pagetables.walk import walk_of
from kvmmm.platform.kvm.shootdown import Shootdown, SpaceStatistics
from kvmmm.platform.kvm.shootdown_trial import proven_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmmm.hostarch.ranges import AddrRange, FileRange
    from kvmmm.memmap.file import File
    from kvmmm.platform.base import AddressSpace
    from kvmmm.platform.kvm.guest_physical import GuestPhysical
    from kvmmm.platform.kvm.vcpu import Vcpu

USER_END = 1 << 47
_FLAGS = tuple(flags_of(perms, user=True) for perms in range(8))
_QUARANTINE_MIN = 256
"""So many tables (1 MiB), and a quarter of those in use, may wait for a zap before one is made."""


class PageTableAddressSpace:
    """The user half of a guest-virtual address space, for guests in ring 3.

    Not locked: the mm calls it with its own lock held. Only `activate` and `deactivate` come from
    the vCPUs' threads as they like.

    Lifetime: `release` gives the tables back; the VM may go on with other spaces.

    Args:
        physical: Where frames lie in the VM.
        fixed: Entries of every root that are not ours: `KernelHalf.fixed`.
        max_addr: Exclusive end of what can be mapped.
        map_unit_bytes: A fault maps the aligned unit around it.
        max_leaf_bytes: The largest leaves; by default what does best here.
        has_shootdown: False to leave shootdowns out, which is wrong, and shows in a test.

    Attributes:
        max_addr: See there.
        map_unit_bytes: See there.
        min_window_bytes: 2 MiB: more would cost nothing and gain nothing.
        walks_frames: False: the tables are in frames of our own.
        root_gpa: What goes into CR3; another one after some changes.
        map_quickly: See `AddressSpace`.
        walk: See `AddressSpace`. When an operation returns, no walk without the GIL uses what it
            took away; after `release` nothing is found.
    """

    min_window_bytes = HUGE_PAGE_BYTES
    walks_frames = False

    def __init__(
        self,
        physical: GuestPhysical,
        fixed: Mapping[int, int] | None = None,
        *,
        max_addr: int = USER_END,
        map_unit_bytes: int = HUGE_PAGE_BYTES,
        max_leaf_bytes: int | None = None,
        has_shootdown: bool = True,
    ) -> None:
        device = physical.vm.device
        proven = proven_on(device)
        giant_pages = device.cpuid.has_giant_pages
        self.max_addr = max_addr
        self.map_unit_bytes = map_unit_bytes
        self._statistics = SpaceStatistics()
        self._physical = physical
        self._bases = physical.bases
        self._shootdown = Shootdown(physical, proven) if has_shootdown else None
        self._tables = PageTables(
            physical.frames,
            giant_pages=giant_pages,
            max_leaf_bytes=max_leaf_bytes or proven.best_leaf_bytes(giant_pages=giant_pages),
            fixed=dict(fixed or {}),
        )
        self._scan = RunScan(self._tables)
        # Most of map_file, for who is in a hurry; what it has mapped is counted at the next change.
        arena = physical.arena
        base = physical.bases[arena]
        self.walk = walk_of(self._tables, base, arena.capacity_bytes, arena.hva)
        can_drop = proven.dontneed or not has_shootdown
        self._mapper = self._tables.mapper(
            physical.bases, _FLAGS, base, arena.capacity_bytes if can_drop else 0, arena.hva,
            self.walk,
        )  # fmt: skip
        self.map_quickly = self._mapper.map
        self.root_gpa = self._tables.root_gpa
        # vCPUs that have our root in CR3, and whether one ever had: then KVM may keep translations
        # for as long as the tables live. Guarded by _roots_lock, as is root_gpa.
        self._vcpus: set[Vcpu] = set()
        self._was_loaded = False
        self._roots_lock = threading.Lock()
        # Pages mapped, at least: what replaces others is counted twice.
        self._n_pages = 0

    @property
    def statistics(self) -> SpaceStatistics:
        """What it has cost."""
        told = self._statistics
        told.n_dontneed, told.n_pages = self._mapper.n_dontneed, self._mapper.n_stale_pages
        return told

    # ---- the interface to the mm ----

    def map_file(self, addr: int, file: File, fr: FileRange, perms: int) -> None:
        """Have [addr, addr + fr.length_bytes) reach `fr`, whatever was there.

        Raises:
            ArenaExhaustedError: No page for a table; some of it may be mapped.
            MmError: ENOMEM: the file needs a window, and there is no room for it.
        """
        base = self._bases.get(file)
        if base is None:
            base = self._physical.window_of(file).base
        start = fr.start
        length = fr.end - start
        n_pages = length >> PAGE_SHIFT
        if self._was_loaded and self._scan.has_any(addr, length):
            self._replace(addr, length, base + start, _FLAGS[perms])
            return
        tables = self._tables
        try:
            changed = tables.map(addr, length, base + start, _FLAGS[perms])
        except ArenaExhaustedError:
            self._reclaim()
            changed = tables.map(addr, length, base + start, _FLAGS[perms])
        self._n_pages += n_pages
        self._physical.n_pages += n_pages
        if changed or tables.root_gpa != self.root_gpa:
            # Something was there: so nobody was, when this began. Perhaps somebody is by now.
            self._finish(None if changed else [], n_pages)

    def _replace(self, addr: int, length: int, gpa: int, flags: int) -> None:
        """Map where something is mapped that a vCPU may be using.

        A new frame is set before the old one is shot down, so several vCPUs may see both for a
        moment. The mm does not replace frames this way: it unmaps first, or uses `map_quickly`,
        which clears, shoots down and then sets.
        """
        self._count(0)
        delta = gpa - addr
        stale = []
        n_kept = n_stale = 0
        for run_addr, run_gpa, n_bytes, before in self._scan.runs(addr, length)[0]:
            n_kept += n_bytes
            # What keeps its frame and loses no permission may be used on.
            lost = (before & ~flags & PTE_W) | (flags & ~before & PTE_NX)
            if run_gpa - run_addr != delta or lost:
                stale.append((run_gpa, n_bytes))
                n_stale += n_bytes
        try:
            try:
                self._tables.map(addr, length, gpa, flags)
            except ArenaExhaustedError:
                self._reclaim()
                self._tables.map(addr, length, gpa, flags)
        finally:
            self._count(length - n_kept >> PAGE_SHIFT)
            if stale or self._tables.root_gpa != self.root_gpa:
                self._finish(stale, n_stale >> PAGE_SHIFT)

    def unmap(self, ranges: Sequence[AddrRange]) -> None:
        """Remove every translation in `ranges`, with one shootdown for all of them."""
        self._count(0)
        spans = [
            (ar.start, min(ar.end, self.max_addr))
            for ar in ranges
            if ar.start < min(ar.end, self.max_addr)
        ]
        stale: list[tuple[int, int]] | None = []
        n_stale = 0
        was_loaded = self._was_loaded
        if was_loaded:
            stale, n_stale = self._frames_in(spans)
            if not n_stale:
                return
        changed = False
        for start, end in spans:
            try:
                changed |= self._tables.unmap(start, end - start)
            except ArenaExhaustedError:
                # A superpage, or a table that is shared, must be cut.
                changed = True
                if not self._unmap_urgently(start, end):
                    stale = None
        if changed:
            if not was_loaded and self._was_loaded:
                stale = None  # somebody has come meanwhile
            if not stale:
                n_stale = max(n_stale, sum(end - start for start, end in spans) >> PAGE_SHIFT)
                n_stale = min(n_stale, self._n_pages)
            self._count(-n_stale)
            self._finish(stale, n_stale)

    def _unmap_urgently(self, start: int, end: int) -> bool:
        """Unmap with the stock of tables; False: with all around it, which takes a root alone."""
        frames = self._physical.frames
        try:
            with frames.urgent():
                self._tables.unmap(start, end - start)
        except ArenaExhaustedError:
            self._reclaim()
            start &= -PML4E_SPAN_BYTES
            end = -(-end // PML4E_SPAN_BYTES) * PML4E_SPAN_BYTES
            with frames.urgent(last=True):
                self._tables.unmap(start, end - start)
            return False
        return True

    def _frames_in(self, spans: list[tuple[int, int]]) -> tuple[list[tuple[int, int]] | None, int]:
        """Return the frames mapped in `spans`, None for too many; and how many pages at least."""
        left = self._max_dropped_pages() << PAGE_SHIFT
        stale: list[tuple[int, int]] = []
        n_bytes = 0
        for start, end in spans:
            runs, is_all = self._scan.runs(start, end - start, left)
            found = sum(run[2] for run in runs)
            n_bytes += found
            left -= found
            if not is_all:
                return None, n_bytes >> PAGE_SHIFT
            stale += [(gpa, length) for _, gpa, length, _ in runs]
        return stale, n_bytes >> PAGE_SHIFT

    def is_mapped(self, addr: int, access: int) -> bool:
        """Whether a CPU's `access` to this address finds a translation that permits it."""
        found = self._tables.lookup(addr) if addr < self.max_addr else None
        return found is not None and not access & ~access_of(found.flags)

    def gpa_at(self, addr: int) -> int | None:
        """Return the guest-physical address that `addr` leads to, or None.

        For whoever has an address of the guest's and needs the frame's: an instruction that KVM
        could not emulate, with `lazy_slots`.
        """
        found = self._tables.lookup(addr) if addr < self.max_addr else None
        return None if found is None else found.gpa + addr - found.gva

    def fork_into(self, child: AddressSpace) -> bool:
        """Share all tables with `child`, on the same VM, and take WRITE from both.

        Returns:
            False where `child` is of another kind, or of another VM.

        Raises:
            ArenaExhaustedError: No pages for the roots; nothing happened.
        """
        if not isinstance(child, PageTableAddressSpace):
            return False
        return child._become_fork_of(self)  # noqa: SLF001 - one of our own

    def _become_fork_of(self, parent: PageTableAddressSpace) -> bool:
        if parent._physical is not self._physical:
            return False
        parent._count(0)
        parent._tables.fork_into(self._tables)
        # What KVM keeps of the parent's lower tables, it keeps of ours.
        self._was_loaded |= parent._was_loaded
        self._mapper.drops |= parent._mapper.drops
        self._finish([], 0)
        self._count(parent._n_pages)
        parent._finish([], 0)
        return True

    def release(self) -> None:
        """Give the tables back. Idempotent; no vCPU runs on them any more."""
        with self._roots_lock:
            for vcpu in self._vcpus:
                self._physical.loaded.pop(vcpu, None)
            self._vcpus.clear()
            self.root_gpa = 0
        self.walk.close()
        with self._physical.recycling:
            self._tables.release()
        self._count(0)
        self._count(-self._n_pages)

    # ---- which vCPUs are in it ----

    def activate(self, vcpu: Vcpu) -> None:
        """Have a vCPU run in this space from its next instruction on; it leaves its old one."""
        loaded = self._physical.loaded
        before = loaded.get(vcpu)
        if before is self:
            return
        if before is not None:
            before.deactivate(vcpu)
        with self._roots_lock:
            if not self.root_gpa:
                raise StateError("this address space was released")
            loaded[vcpu] = self
            self._vcpus.add(vcpu)
            self._was_loaded = True
            self._mapper.drops = self._shootdown is not None
            vcpu.set_root(self.root_gpa)

    def deactivate(self, vcpu: Vcpu) -> None:
        """Note that a vCPU leaves: it is given no new roots, and must not run until activated."""
        with self._roots_lock:
            self._vcpus.discard(vcpu)
            if self._physical.loaded.get(vcpu) is self:
                del self._physical.loaded[vcpu]

    # ---- the end of every change ----

    def _finish(self, stale: list[tuple[int, int]] | None, n_stale: int) -> None:
        """Have no vCPU use an old translation, and let go of the tables that held them.

        Args:
            stale: (gpa, length) of the frames that they led to; None for too many to name.
            n_stale: How many pages that was, at least.
        """
        tables = self._tables
        if tables.root_gpa != self.root_gpa:
            self._load_root()
        self.walk.drain()
        is_crowded = tables.n_quarantined > _QUARANTINE_MIN + (tables.n_tables >> 2)
        shootdown = self._shootdown
        if shootdown is None or not self._was_loaded:
            stale = []
        elif stale is None or (stale and not shootdown.is_small(stale)):
            is_crowded = True
        elif stale:
            shootdown.drop(stale)
            self._mapper.n_dontneed += 1
        if self._was_loaded:
            self._mapper.n_stale_pages += n_stale
        with self._physical.recycling:
            if is_crowded:
                self._zap()
            tables.recycle(zapped=is_crowded)

    def _reclaim(self) -> None:
        """Have tables back that wait for a zap."""
        if self._tables.root_gpa != self.root_gpa:
            self._load_root()
        self.walk.drain()
        with self._physical.recycling:
            self._zap()
            self._tables.recycle(zapped=True)

    def _zap(self) -> None:
        if self._shootdown is not None:
            self._shootdown.drop_all()
        self._statistics.n_zaps += 1

    def _load_root(self) -> None:
        with self._roots_lock:
            self.root_gpa = self._tables.root_gpa
            for vcpu in self._vcpus:
                vcpu.set_root(self.root_gpa)
        self._statistics.n_roots += 1

    def _max_dropped_pages(self) -> int:
        return self._shootdown.max_pages() if self._shootdown is not None else 0

    def _count(self, n_pages: int) -> None:
        n_pages += self._mapper.take_count()
        self._n_pages += n_pages
        self._physical.n_pages += n_pages
