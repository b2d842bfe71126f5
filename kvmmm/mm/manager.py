"""`MemoryManager`: one guest address space; its methods are spread over this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.mm import (
    advice,
    asio,
    backing,
    debug,
    fault,
    fork,
    guest_file,
    heap,
    internal,
    io,
    loading,
    lock,
    mapping,
    maps,
    naming,
    pin,
    pma,
    protect,
    remap,
    structs,
    subscript,
    sync,
    text,
    unmap,
    vector,
    vma,
)
from kvmmm.mm.layout import Layout, Limits
from kvmmm.mm.policy import Policy, default_policy
from kvmmm.mm.window import Home, Window
from kvmmm.safemem.ffi import CopyCore, GuardedLock, adopt, own_faults

if TYPE_CHECKING:
    from kvmmm.arena import Arena, Reservation
    from kvmmm.hostarch.ranges import AddrRange
    from kvmmm.mm.fault_log import FaultLog
    from kvmmm.platform.base import AddressSpace


# After these KVMMM_DEBUG=1 checks all invariants. Not `invalidate`: mappables call that with their
# own locks held.
_CHECKED = (
    "brk", "copy_in", "copy_out", "fork", "handle_user_fault", "madvise", "map_resident",
    "map_stack", "mlock", "mlockall", "mmap", "mmap_all", "mprotect", "mremap", "munlock",
    "munlockall", "munmap", "pin", "pin_frames", "populate", "set_anon_name", "set_brk", "zero_out",
)  # fmt: skip


class Counters:
    """What happened so far. Guarded by active_lock; read without it for display.

    Attributes:
        reads, writes, executes: Faults by what the guest wanted.
        vma_lookups: Faults that looked for a vma: all of them.
        pma_insertions: Faults that allocated, translated or copied frames.
        pma_hits: Faults that found one, and only installed it.
        refused: Faults that could not be served.
        allocated_bytes: Frames allocated, by faults, copies and loading.
        cow_breaks: How often a window was copied on write.
        copied_bytes: What these were, together.
    """

    __slots__ = (
        "allocated_bytes", "copied_bytes", "cow_breaks", "executes", "pma_hits", "pma_insertions",
        "reads", "refused", "vma_lookups", "writes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reads = self.writes = self.executes = 0
        self.vma_lookups = self.pma_insertions = self.pma_hits = self.refused = 0
        self.allocated_bytes = self.copied_bytes = self.cow_breaks = 0

    @property
    def faults(self) -> int:
        """All faults."""
        return self.reads + self.writes + self.executes


@debug.checked_after(*_CHECKED)
@adopt
class MemoryManager(CopyCore):
    """Memory of one guest: what may be accessed (vmas), what is there (pmas), how a CPU reaches it.

    Invariants: see the package comment; `check_invariants` checks them.

    Lifetime: `close` drops every frame; the address space must not be used by a CPU any more.

    Args:
        arena: Where private memory comes from.
        address_space: What a CPU uses; addresses up to its `max_addr` can be mapped.
        reservation: Arena offsets for [0, its length), a multiple of 2 MiB up; None takes any.
        layout: Where mappings without an address of their own go; None is all there is, bottom up.
        limits: How much may be mapped; None is no limits.
        eager_bytes: Private anonymous mappings up to that length are backed and mapped at once, in
            the hope of saving faults; by default none. Worth it where a translation is cheap to
            make and small mappings are soon touched (gVisor: 2 MiB); over memslots it would spend a
            slot for each.
        policy: Which mechanism copies use; None is what calibration and environment say.
    """

    __slots__ = (
        "active_lock", "address_space", "arena", "brk_end", "brk_start", "captured", "counters",
        "data_bytes", "eager_bytes", "fault_log", "generation", "home", "last_fault", "layout",
        "limits", "lock_mode", "locked_bytes", "mapping_lock", "max_rss_bytes", "pins", "pmas",
        "policy", "unmapped", "vmas", "window",
    )  # fmt: skip

    def __init__(
        self, arena: Arena, address_space: AddressSpace, reservation: Reservation | None = None,
        *, layout: Layout | None = None, limits: Limits | None = None, eager_bytes: int = 0,
        policy: Policy | None = None,
    ) -> None:  # fmt: skip
        super().__init__(address_space.max_addr, arena.hva, arena.capacity_bytes)
        own_faults()
        self.arena = arena
        self.address_space = address_space
        self.walk = address_space.walk
        self.policy = policy or default_policy()
        self.apply_policy(self.policy.release_bytes, self.policy.mirror, self.policy.mirror_reuses)
        self.layout = layout or Layout(0, self.max_addr)
        self.limits = limits or Limits()
        self.eager_bytes = eager_bytes
        # What may be accessed. Guarded by mapping_lock.
        self.vmas = vma.new_vma_set()
        # Grows with every change of a vma: who derived page tables from vmas can see it. The same.
        self.generation = 0
        # Where the heap is, and where brk has put its end; what of the vmas is private data, and
        # what is mlocked; how new vmas are locked (mlockall(MCL_FUTURE)). The same.
        self.brk_start = self.brk_end = 0
        self.data_bytes = self.locked_bytes = 0
        self.lock_mode = vma.LOCK_NONE
        self.mapping_lock = GuardedLock(self)
        # What is backed. Guarded by active_lock.
        self.pmas = pma.new_pma_set()
        self.window = Window()
        self.last_fault = 0
        self.max_rss_bytes = 0
        self.counters = Counters()
        # Where faults fell, for whoever wants to know; None notes nothing. The same.
        self.fault_log: FaultLog | None = None
        # Ranges that copies have backed and no fault has mapped yet. The same.
        self.unmapped: list[tuple[int, int]] = []
        # Who holds frames beyond this mm's translations. The same.
        self.pins: set[pin.Pin] = set()
        # While a fork fills this mm: what mappables have told it to forget meanwhile. The same.
        self.captured: list[tuple[AddrRange, bool]] | None = None
        self.active_lock = GuardedLock(self)
        # Where frames go by preference. Immutable until close.
        self.home = Home(arena, reservation, 0) if reservation is not None else None

    mmap = mapping.mmap
    mmap_all = loading.mmap_all
    map_stack = loading.map_stack
    populate = loading.populate
    munmap = unmap.munmap
    mprotect = protect.mprotect
    mremap = remap.mremap
    set_brk = heap.set_brk
    brk = heap.brk
    madvise = advice.madvise
    mincore = advice.mincore
    mlock = lock.mlock
    munlock = lock.munlock
    mlockall = lock.mlockall
    munlockall = lock.munlockall
    msync = sync.msync
    set_anon_name = naming.set_anon_name

    handle_user_fault = fault.handle_user_fault
    map_resident = fault.map_resident
    fork = fork.fork
    pin_frames = pin.pin_frames
    pin = pin.pin

    # copy_in, copy_out, read, write, zero_out, the vectored and the atomic ones: CopyCore's.
    check_io_range = io.check_io_range
    ensure_pmas_exist = io.ensure_pmas_exist
    check_io_vec = vector.check_io_vec
    copy_out_from = vector.copy_out_from
    copy_in_to = vector.copy_in_to
    with_internal_mappings = internal.with_internal_mappings
    with_vec_internal_mappings = internal.with_vec_internal_mappings
    read_string = text.read_string
    read_int = structs.read_int
    write_int = structs.write_int
    read_struct = structs.read_struct
    write_struct = structs.write_struct
    open = guest_file.open_guest_file
    __getitem__ = subscript.getitem
    __setitem__ = subscript.setitem
    __iter__ = None  # what has items is iterated over from 0, otherwise
    handle_asio_fault = asio.handle_asio_fault
    _serve_copy = io.serve_copy
    _copy_failed = io.copy_failed
    _promote = asio.promote

    smaps = maps.smaps
    status = maps.status
    maps = maps.maps
    check_invariants = debug.check_invariants

    @property
    def usage_bytes(self) -> int:
        """Bytes of all vmas (VmSize)."""
        return self.vmas.span_bytes

    @property
    def rss_bytes(self) -> int:
        """Bytes of all pmas (VmRSS)."""
        return self.pmas.span_bytes

    def invalidate(self, ar: AddrRange, *, private: bool) -> None:
        """Forget what backs `ar`: mappables call it, as they do any `memmap.MappingSpace`.

        Args:
            ar: Guest addresses, page aligned.
            private: Also the private copies.

        Source: gVisor mm.Invalidate.
        """
        with self.active_lock:
            if self.captured is not None:
                self.captured.append((ar, private))
                return
            removal = pma.Removal()
            backing.invalidate_locked(self, ar.start, ar.end, removal, private=private)
            removal.run(self)

    def close(self) -> None:
        """Drop all frames and mappings. Idempotent.

        Preconditions:
            - No CPU uses the address space any more.
        """
        pin.release_waiting()
        with self.mapping_lock:
            dropped = unmap.unmap_locked(self, 0, self.max_addr)
            mirror, self.mirror = self.mirror, None
            if mirror is not None:
                mirror.release()
            if self.home is not None:
                self.arena.unreserve(self.home.reservation)
                self.home = None
        del dropped
