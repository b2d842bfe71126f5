"""Typed face of the compiled core (kvmmm/_native). Import it through `kvmmm.safemem.ffi` only."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

ffi: Any  # cffi.FFI; struct members have no static types

class _Lib(Protocol):
    def __getattr__(self, name: str) -> int:
        """A constant of <linux/kvm.h> or kvmmm_abi.h, by its own name."""
    def kvmmm_ioctl(self, fd: int, request: int, argument: int, /) -> int:
        """Call ioctl(2); -errno on failure."""
    def kvmmm_punch_hole(self, fd: int, offset: int, n_bytes: int, /) -> int:
        """Call fallocate(2) with FALLOC_FL_PUNCH_HOLE; -errno on failure."""
    def kvmmm_drop_pages(self, hva: int, n_bytes: int, /) -> int:
        """Call madvise(2) with MADV_DONTNEED, or MADV_DONTNEED_LOCKED; -errno on failure."""
    def kvmmm_sync_sregs(self, run: Any, /) -> Any:
        """Struct kvm_sregs in kvm_run's synchronised area."""
    def kvmmm_now_ns(self) -> int:
        """CLOCK_MONOTONIC in ns."""
    def kvmmm_kick_init(self) -> int:
        """Install the kick signal's handler; its number, or -errno."""
    def kvmmm_kick_signal(self) -> int:
        """The kick signal's number, 0 before kvmmm_kick_init."""
    def kvmmm_pt_map(self, t: Any, gva: int, n_bytes: int, gpa: int, flags: int, /) -> int:
        """Map a range as far as tables allow: KVMMM_PT_* bits. These nine: `pagetable.h`."""
    def kvmmm_pt_unmap(self, t: Any, gva: int, n_bytes: int, /) -> int: ...
    def kvmmm_pt_protect(self, t: Any, gva: int, n_bytes: int, flags: int, /) -> int: ...
    def kvmmm_pt_resume(self, t: Any, /) -> int: ...
    def kvmmm_pt_lookup(self, t: Any, gva: int, /) -> int: ...
    def kvmmm_pt_scan(self, t: Any, gva: int, n_bytes: int, max_bytes: int, scan: Any, /) -> int:
        """See `pagetable_scan.h`."""
    def kvmmm_pt_split(self, t: Any, gpa: int, leaf: int, level: int, /) -> None: ...
    def kvmmm_pt_copy(self, t: Any, dst_gpa: int, src_gpa: int, share: bool, /) -> None: ...
    def kvmmm_pt_store(self, entry: Any, value: int, /) -> None: ...
    def kvmmm_pt_count(self, t: Any, gpa: int, level: int, /) -> int: ...
    def memset(self, dst: object, byte: int, n_bytes: int, /) -> object:
        """Fill memory."""

lib: _Lib

class HostMapping:
    """A shared mapping of a file, at a multiple of `align_bytes`; read-write, or read-only.

    Offers the buffer protocol (format "B"). `close` unmaps, and raises BufferError while a buffer
    on it is held; the mapping also goes with its last reference.
    """

    def __init__(
        self, fd: int, length_bytes: int, align_bytes: int, writable: bool = True
    ) -> None: ...
    @property
    def hva(self) -> int:
        """Host address of the first byte; 0 once closed."""
    @property
    def length_bytes(self) -> int: ...
    def close(self) -> None: ...
    def sync(self, start: int, end: int, /) -> None:
        """Call msync(2) with MS_SYNC on page-aligned offsets; OSError on failure."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Registers:
    """General registers in kvm_run's synchronised area; a write marks them dirty."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int

class IoExit:
    """KVM_EXIT_IO. Valid until the vCPU goes on; afterwards `data` and `value` raise ValueError."""

    port: int
    size_bytes: int
    count: int
    is_write: bool
    @property
    def data(self) -> bytes: ...
    value: int

class MmioExit:
    """KVM_EXIT_MMIO, an EPT violation: no slot, or a write to a READONLY one."""

    gpa: int
    size_bytes: int
    is_write: bool
    @property
    def data(self) -> bytes: ...
    value: int
    def complete(self, hva: int, /) -> None:
        """Perform the access by hand: bytes from `hva` for a read, to it for a write."""

class PauseGate:
    """Keeps the vCPUs in `vcpus` (a list that may change) outside KVM_RUN while a `with` lasts.

    From any thread, a vCPU's own handlers among them; nests, and several may last at once. A vCPU
    in the guest is kicked, waits in C and goes on by itself; its thread's Python notices nothing.
    A stop or a deadline that comes meanwhile ends its run.
    """

    def __init__(self, vcpus: Sequence[VcpuCore]) -> None: ...
    @property
    def n_pauses(self) -> int:
        """Pauses that last now."""
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...

class VcpuCore:
    """A vCPU's descriptor, its kvm_run mapping, its ports and handlers; the KVM_RUN loop.

    Handlers run on the thread that runs the vCPU. One that answers anything but None ends the run,
    and the answer becomes the run's result.
    """

    regs: Registers
    on_mmio: Callable[[MmioExit], object] | None
    on_cold: Callable[[int], object] | None
    on_console: Callable[[], object] | None
    on_fault: Callable[[int, int], object] | None
    on_refused: Callable[[OSError, int], object] | None
    on_repeated: Callable[[int, int], object] | None
    n_faults: int
    """handler(addr, access): a guest #PF; READ, WRITE or EXECUTE of a guest-virtual address."""
    on_trap: Callable[[int, int], object] | None
    """handler(vector, error_code): any other exception; the code is 0 where there is none."""
    on_syscall: Callable[[int], object] | None
    """handler(number): SYSCALL, arguments in `regs`; an int answer goes to rax."""
    timed: bool
    handler_failed: bool
    def __init__(self, fd: int, run_bytes: int) -> None: ...
    @property
    def run_hva(self) -> int: ...
    @property
    def fd(self) -> int: ...
    @property
    def thread_id(self) -> int: ...
    @property
    def is_stopping(self) -> bool: ...
    @property
    def in_guest(self) -> bool: ...
    def close(self) -> None: ...
    def set_port(self, port: int, kind: int, handler: Callable[..., object] | None, /) -> None: ...
    def run(self, timeout_ns: int, /) -> object:
        """Run until a handler answers; a negative int is -enum kvmmm_stop."""
    def once(self, timeout_ns: int, /) -> object:
        """Run to the next exit: IoExit, MmioExit, an exit reason, or -enum kvmmm_stop."""
    def complete_pending(self) -> object:
        """Complete what the last exit left pending, serving further accesses with the handlers.

        Nothing of the guest's program runs. None when nothing is pending any more; else an exit
        that nobody handles (answer it, call again), or a handler's answer. RuntimeError on another
        thread than the one that runs the vCPU, and in the handler of an access not answered yet.
        """
    def set_root(self, gpa: int, /) -> None:
        """Have the vCPU walk from the root table at `gpa`; from any thread.

        When this returns it no longer uses the old one: it is outside KVM_RUN, or has been made to
        leave it, and loads the new one, in C, before it enters again.
        """
    def set_trap_area(self, stubs_gva: int, stack_top_hva: int, /) -> None:
        """Say where the 256 exception stubs lie, and the top of the stack that they enter on.

        For ports of kind KVMMM_PORT_KIND_TRAP. From then on special registers come with every exit.
        """
    def set_syscall_stub(self, gva: int, /) -> None:
        """Say which instruction alone may use a port of kind KVMMM_PORT_KIND_SYSCALL."""
    def set_gate(self, gate: PauseGate, /) -> None:
        """Belong to the vCPUs that `gate` pauses."""
    def set_tss_type(self, descriptor_type: int, /) -> None:
        """Have TR loaded with this type whenever special registers are (9 or 11)."""
    def fetch_sregs(self) -> None:
        """Bring the special registers in kvm_run's area up to date, by ioctl where needed."""
    def sregs_written(self, with_root: bool, /) -> None:
        """Load what was written to kvm_run's special registers at the next run.

        Without `with_root`, a root that `set_root` named and no KVM_RUN has loaded still counts.
        """
    def registers_replaced(self, with_general: bool, /) -> None:
        """Bring kvm_run's area up to date after special registers, or all, were set by ioctl."""
    def stop(self) -> None: ...
    def console_take(self) -> bytes: ...
    def set_console(
        self, shared_hva: int, ring_hva: int, ring_bytes: int, tail: int = 0, /
    ) -> None: ...
    def set_coalesced(self, page: int, /) -> None: ...
    def statistics(self) -> dict[str, Any]: ...

class PageMapper:
    """Page-table entries in tables that are there already, in one call: what most faults need.

    Args: the host address of a struct kvmmm_pt; where files lie, by file, as gpas; entry flags by
    access bits; the window [gpa, gpa + length) at hva, whose frames may be shot down by
    MADV_DONTNEED, of length 0 for none; what is drained before that.
    """

    def __init__(
        self, tables_hva: int, bases: dict[Any, int], flags: tuple[int, ...], gpa: int,
        length_bytes: int, hva: int, walk: PageWalk = ..., /,
    ) -> None: ...  # fmt: skip
    drops: bool
    n_dontneed: int
    n_stale_pages: int
    def map(self, addr: int, length_bytes: int, file: object, fo: int, perms: int, /) -> bool:
        """Map, and shoot down what that replaced; False: nothing was done."""
    def take_count(self) -> int:
        """Pages mapped since the last call."""

V = TypeVar("V")
W = TypeVar("W")

class SegmentSet(Generic[V]):
    """Ordered set of disjoint half-open segments [start, end), each with a value.

    Addresses are plain ints in [0, 2**64]; a segment is a plain tuple (start, end, value). Not
    thread-safe: the owner's lock covers it. Do not change a set while iterating over it: nothing
    breaks, but what the iterator gives then is not promised.

    A value is never None. `merge` and `split` should not raise: the exception comes out, and what
    was to be done is not done, or (`mutate`, `isolate`, `merge_range`) done in part. They may look
    at the set, which is as it was before; changing it is a RuntimeError.

    Args:
        merge: `merge(start1, end1, value1, value2)` decides whether two adjacent segments, the
            first [start1, end1) and the second starting at end1, become one: the value of both,
            or None for no. Without it nothing is merged.
        split: `split(start, end, value, at)` gives the values of [start, at) and [at, end).
            Without it both keep the value.
        block_max: Segments in a block at most. Smaller only in tests, which so see more blocks.
    """

    def __init__(
        self,
        merge: Callable[[int, int, V, V], V | None] | None = None,
        split: Callable[[int, int, V, int], tuple[V, V]] | None = None,
        *,
        block_max: int = 256,
    ) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[int, int, V]]: ...
    @property
    def span_bytes(self) -> int:
        """Sum of the segments' lengths."""
    @property
    def block_count(self) -> int:
        """Blocks that the segments lie in; for tests."""
    @staticmethod
    def merge_equal(start1: int, end1: int, value1: V, value2: V, /) -> V | None:
        """Unite equal neighbours: a `merge` that a set recognises and need not call (`==`)."""
    def find(self, addr: int, /) -> tuple[int, int, V] | None:
        """Return the segment that covers `addr`."""
    def find_value(self, addr: int, /) -> V | None:
        """Return the value of the segment that covers `addr`; the cheapest lookup."""
    def lower_bound(self, addr: int, /) -> tuple[int, int, V] | None:
        """Return the segment that covers `addr`, or else the first one after it."""
    def next_segment(self, addr: int, /) -> tuple[int, int, V] | None:
        """Return the first segment that starts at or after `addr`."""
    def prev_segment(self, addr: int, /) -> tuple[int, int, V] | None:
        """Return the last segment that ends at or before `addr`."""
    def segments(self, start: int = 0, end: int = ..., /) -> Iterator[tuple[int, int, V]]:
        """Iterate over the segments that overlap [start, end), whole, in order."""
    def gaps(self, start: int = 0, end: int = ..., /) -> Iterator[tuple[int, int]]:
        """Iterate over the largest sub-ranges of [start, end) that no segment covers, in order."""
    def find_gap(self, addr: int, /) -> tuple[int, int] | None:
        """Return the largest range around `addr` that no segment covers; None if one covers it."""
    def find_large_gap(
        self,
        start: int,
        end: int,
        length_bytes: int,
        /,
        *,
        align_bytes: int = 4096,
        top_down: bool = False,
    ) -> int | None:
        """Return where an aligned place of that length lies in [start, end) and in no segment.

        The lowest one, or with `top_down` the highest. Blocks whose longest gap (kept with each,
        computed again after a change) is shorter are passed at one step each.

        Args:
            start: First address that the place may have.
            end: One past its last.
            length_bytes: Its length.
            align_bytes: A power of two of which its address is a multiple.
            top_down: Whether to look for the highest.

        Raises:
            ValueError: The length is not above zero, or the alignment no power of two.

        Source: gVisor pkg/segment, NextLargeEnoughGap and PrevLargeEnoughGap.
        """
    def insert(self, start: int, end: int, value: V, /) -> None:
        """Add [start, end), merged with its neighbours where `merge` wants it.

        Raises:
            RangeError: It is empty, or overlaps a segment; nothing changed.
        """
    def move_fit(
        self,
        other: SegmentSet[W],
        value: W,
        hint: int,
        length_bytes: int,
        align_bytes: int,
        phase_bytes: int,
        /,
    ) -> int | None:
        """Remove a piece of one segment from here, and insert it into `other` with `value`.

        The segment is the one that covers `hint` or the next one; the piece its first that does not
        begin before `hint`, at an address % align_bytes == phase_bytes. None where it does not fit;
        other segments are not tried. What an allocator does all the time, in one call.
        """
    def remove(self, start: int, end: int, /) -> list[tuple[int, int, V]]:
        """Remove [start, end), cutting segments across its edges; return what went, in order."""
    def isolate(self, start: int, end: int, /) -> None:
        """Cut the segments across `start` and `end`, so that none crosses either."""
    def mutate(self, start: int, end: int, change: Callable[[int, int, V], V], /) -> None:
        """Give every segment in [start, end) the value `change(start, end, value)`, then merge.

        Segments across the edges are cut first. When `change` raises, no value has changed.
        """
    def merge_range(self, start: int, end: int, /) -> None:
        """Merge adjacent segments that meet in [start, end], where `merge` wants it."""
    def clear(self) -> None:
        """Remove everything."""
    def check_invariants(self) -> None:
        """Check order, disjointness, counters and longest gaps; for tests and debugging.

        Raises:
            AssertionError: The set is damaged.
        """

class PinnedWindow:
    """Pieces of files, mapped side by side: a buffer (format "B") of all of them.

    When the last reference goes, that of the last buffer included, it is unmapped, and then
    `on_release(False)` is called, by whoever drops it. When the garbage collector finds it, with
    its buffers, it calls `on_release(True)` first and unmaps when it is done: until then the pages
    must be kept. Once, in any case, unless making the window failed; what it raises is only
    reported.

    Args:
        pieces: (file descriptor, offset, length in bytes) of each, whole pages.
        on_release: See there.
        writable: Whether the buffer is.

    Raises:
        ValueError: No piece, or one that is not made of whole pages.
        OSError: The host refused a mapping: EACCES, EBADF; ENOMEM for too many pieces.
    """

    def __init__(
        self,
        pieces: list[tuple[int, int, int]],
        on_release: Callable[[bool], object],
        writable: bool = True,
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class PageWalk:
    """Host addresses by a guest's page tables, as ring 3 may use them; for copies in C.

    Args: the host address of a struct kvmmm_pt; the window [gpa, gpa + length) at hva, outside of
    which neither tables nor frames are found; what owns the struct, kept as long as this.
    """

    def __init__(
        self, tables_hva: int, gpa: int, length_bytes: int, hva: int, owner: object = ..., /
    ) -> None: ...
    @property
    def n_inside(self) -> int:
        """Walks under way without the GIL: copies, too."""
    def find(self, addr: int, n_bytes: int, access: int, /) -> tuple[int, int] | None:
        """Return where `addr` is, and how many bytes from there lie side by side; without the GIL.

        At most `n_bytes`, all of which ring 3 may access so. None where not even one is.
        """
    def drain(self) -> None:
        """Wait for all walks without the GIL that began before; by one thread at a time."""
    def close(self) -> None:
        """Find nothing any more, and drain. Idempotent."""

class IOOpts:
    """How one copy is done. Immutable.

    Args:
        ignore_permissions: What could ever be allowed counts (`max_perms`), as for a debugger.
        address_space_active: Whether the copy may go through the address space at all.
        mechanism: "internal", "walk" or "mirror", to use where it can be; None leaves it to the
            policy. For tests and benchmarks.

    Raises:
        ValueError: There is no such mechanism.

    Source: gVisor usermem.IOOpts.
    """

    def __init__(
        self,
        ignore_permissions: bool = False,
        address_space_active: bool = True,
        mechanism: str | None = None,
    ) -> None: ...
    @property
    def ignore_permissions(self) -> bool: ...
    @property
    def address_space_active(self) -> bool: ...
    @property
    def mechanism(self) -> str | None: ...

class GuardedLock:
    """A lock of an mm's, which a thread inside a Reader or Writer of that mm cannot take.

    Without an mm it is a plain lock, for paths where each call counts: `with` costs a third of what
    it does with a `threading.Lock`.

    Raises:
        StateError: It is inside one: it would wait for itself.
    """

    def __init__(self, core: CopyCore = ..., /) -> None: ...
    def acquire(self, blocking: bool = True, /) -> bool:
        """Take it; return whether it was taken. Without waiting nothing is raised."""
    def release(self) -> None: ...
    def locked(self) -> bool: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *args: object) -> None: ...

class CopyToken:
    """A thread's stay in the read section; it ends with this object at the latest."""

class _Packed(Protocol):
    @property
    def packed(self) -> bytes: ...

class CopyCore:
    """What a memory manager is made of where copies are concerned: see `kvmmm.mm.io`.

    All copies: bytes are moved in ascending order. Where not all can be, exactly those before the
    first byte that cannot be accessed have been moved, and the error says so. A range that wraps,
    or ends beyond `max_addr`, is refused before anything is moved. Buffers are C-contiguous, of any
    format. `opts` and `ignore_permissions` (short for `IOOpts(ignore_permissions=True)`) are the
    same everywhere.

    Raises:
        GuestFaultError: A byte cannot be accessed: `.addr` is the first, `.done` the bytes before
            it. `GuestBusError`: because its file ends, or the host has no memory for it.
            `NoProgressError`: although its fault was served again and again.
        HostBufferError: The caller's own buffer faulted: `.offset`, `.done`.
        ArenaExhaustedError: No memory is left to back an untouched page, or to copy it on write.
        OSError: What a mappable says.
        StateError: From inside a Reader or Writer: memory that is not there yet.

    Args: exclusive end of addresses; host address and length of the arena's linear mapping.
    """

    def __init__(self, max_addr: int, hva: int, length_bytes: int, /) -> None: ...
    @property
    def max_addr(self) -> int:
        """Exclusive end of addresses."""
    walk: PageWalk | None
    mirror: Any
    def copy_in(
        self, addr: int, dst: Any, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Copy guest memory at `addr` into a writable buffer (guest -> host); how many bytes."""
    def copy_out(
        self, addr: int, src: Any, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Copy a buffer, or a str as UTF-8, to guest memory (host -> guest); how many bytes."""
    def write(
        self, addr: int, src: Any, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """The short name of `copy_out`."""
    def read(
        self, addr: int, length_bytes: int, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> bytes:  # fmt: skip
        """Return `length_bytes` of guest memory at `addr`."""
    def zero_out(
        self, addr: int, length_bytes: int, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Zero guest memory; how many bytes."""
    def copy_in_vec(
        self, ranges: _Packed, dst: Any, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Copy an `AddrRangeSeq` into a buffer of the same length; how many bytes.

        Raises:
            ValueError: The lengths differ; nothing was moved.
        """
    def copy_out_vec(
        self, ranges: _Packed, src: Any, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Copy a buffer to an `AddrRangeSeq` of the same length; as `copy_in_vec`."""
    def copy_in_many(
        self, requests: Sequence[tuple[int, int]], /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> list[bytes]:  # fmt: skip
        """Return the bytes of each (addr, length), in a list or tuple.

        Errors carry `.item`: the number of the pair. What came before it is lost.
        """
    def copy_out_many(
        self, requests: Sequence[tuple[int, Any]], /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Copy out each (addr, src), in order; how many bytes together.

        Errors carry `.item`: the number of the pair. What came before it is done: `.done` counts
        that, too; `HostBufferError.offset` is in the pair's own buffer.
        """
    def swap_uint32(
        self, addr: int, new: int, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Store a word and return what was there, atomically.

        Raises:
            GuestAlignmentError: `addr` is not a multiple of 4.
        """
    def compare_and_swap_uint32(
        self, addr: int, old: int, new: int, /, *, opts: IOOpts | None = None,
        ignore_permissions: bool = False,
    ) -> int:  # fmt: skip
        """Store `new` if `old` is there, atomically; return what was there.

        It needs write access, and copies on write, in any case. Errors as for `swap_uint32`.
        """
    def load_uint32(
        self, addr: int, /, *, opts: IOOpts | None = None, ignore_permissions: bool = False
    ) -> int:
        """Return a word, atomically; errors as for `swap_uint32`."""
    def _move(self, hva: int, host: int, n_bytes: int, access: int, /) -> tuple[int, bool]:
        """Move bytes of a foreign file: how many, and whether the host's side failed."""
    def _move_fresh(self, fd: int, fo: int, host: int, n_bytes: int, access: int, /) -> int:
        """Move bytes of frames that nobody has touched yet: how many."""
    def _atomic(self, hva: int, word: int, /) -> bool: ...
    def fill_frames(self, start: int, end: int, fo: int, bits: int, /) -> None:
        """Have copies find [start, end) at `fo` of the arena; bits: R, W, max R, max W."""
    def forget(self, start: int, end: int, /) -> None:
        """Have no copy use what was at [start, end), those in flight included."""
    def frames(self, start: int, end: int, /) -> list[tuple[int, int, int, int]]:
        """Return (start, end, fo, bits) of what the frame table holds."""
    def drain(self) -> None:
        """Wait for copies in flight."""
    def enter_copy(self) -> CopyToken:
        """Enter the read section for a Reader or Writer; the token goes to `leave_copy`."""
    def leave_copy(self, token: CopyToken, /) -> None: ...
    def apply_policy(
        self, release_bytes: int, uses_mirror: bool, promote_after: int, /
    ) -> None: ...

_Core = TypeVar("_Core", bound=type[CopyCore])

def adopt(cls: _Core, /) -> _Core:
    """Have a subclass call CopyCore's methods as fast as CopyCore itself does."""

def safe_copy(dst_hva: int, src_hva: int, n_bytes: int, /) -> tuple[int, int, int]:
    """Copy between host addresses; return (bytes copied, signal, host address that faulted).

    Where memory cannot be accessed the copy ends: exactly the bytes before were copied, and the
    signal is SIGSEGV or SIGBUS. Else it is 0, and so is the address. The areas may not overlap. The
    GIL is released from 64 KiB on.
    """

def safe_zero(dst_hva: int, n_bytes: int, /) -> tuple[int, int, int]:
    """Clear host memory, as `safe_copy` copies."""

def safe_swap_uint32(hva: int, new: int, /) -> tuple[int | None, int, int]:
    """Store into an aligned word; return (what was there, 0, 0), or (None, signal, address)."""

def safe_compare_and_swap_uint32(hva: int, old: int, new: int, /) -> tuple[int | None, int, int]:
    """Store `new` if `old` is there; return (what was there, 0, 0), or (None, signal, address)."""

def safe_load_uint32(hva: int, /) -> tuple[int | None, int, int]:
    """Load an aligned word; return (value, 0, 0), or (None, signal, address)."""

def own_faults() -> None:
    """Have SIGSEGV and SIGBUS come to the copies first, and from there to whoever had them.

    Cheap where it is so already. Whoever installs a handler afterwards (faulthandler, say) takes
    them away again, so this is called before a copy that is likely to fault. It also unblocks both
    for the calling thread, which could not survive a fault otherwise.
    """

def tune_copies(avx2: bool, stream_bytes: int, /) -> bool:
    """Copy with AVX2 (where the CPU has it) or not, and past the caches from a size on; for tests.

    (True, 0) is what the module begins with. Return whether AVX2 is used now.
    """

class MirrorWindow:
    """Windows of 1 GiB in the host, in which pieces of files lie at the guest's own distances.

    Addresses are the guest's. Ranges are whole pages below `max_addr`; what is in no window yet
    counts as empty. Not thread-safe but for `find`; long calls release the GIL, and another change
    meanwhile is a RuntimeError. Once released, changes are a ValueError.

    Args:
        max_addr: Exclusive end of the guest's addresses, a multiple of 4 KiB, at most 2^57.

    Attributes:
        n_vmas: What it takes of vm.max_map_count, or more: neighbours of windows may merge.
        n_vmas_of_process: The same of all mirrors of the process.
        n_resident_pages: Pages that copies find.
        n_windows: Windows reserved.
        n_maps: Runs mapped so far.
        n_clears: Calls of `clear` and `clear_windows` so far that had something to do.
    """

    def __init__(self, max_addr: int, /) -> None: ...
    @property
    def max_addr(self) -> int: ...
    @property
    def n_vmas(self) -> int: ...
    @property
    def n_vmas_of_process(self) -> int: ...
    @property
    def n_resident_pages(self) -> int: ...
    @property
    def n_windows(self) -> int: ...
    @property
    def n_maps(self) -> int: ...
    @property
    def n_clears(self) -> int: ...
    def map(self, start: int, end: int, fd: int, fo: int, perms: int, /) -> None:
        """Map [start, end), within one GiB, shared from file offset `fo` on, and let copies in.

        Raises:
            OSError: The host refused: ENOMEM, no VMA or address space is left; EACCES, EBADF. What
                was mapped there still is, and is not resident.
        """
    def populate(self, start: int, end: int, /) -> None:
        """Have page-table entries made, writable ones where that is allowed (MADV_POPULATE_READ).

        Raises:
            OSError: EINVAL, Linux is older than 5.14; EFAULT, the file ends before.
        """
    def forget(self, start: int, end: int, /) -> None:
        """Have no copy find the range any more; who has found it may still be there."""
    def clear(self, start: int, end: int, /) -> None:
        """Forget the range and map nothing there: PROT_NONE, never a hole.

        Raises:
            OSError: ENOMEM, no VMA is left: forgotten, but some of it is still mapped.
        """
    def clear_windows(self, start: int, end: int, /) -> None:
        """Clear every window that the range touches; works where the process has no VMA left.

        Raises:
            OSError: Something is still mapped.
        """
    def find(self, addr: int, n_bytes: int, access: int, /) -> tuple[int, int] | None:
        """Return the host address of `addr` and how many bytes are resident from there.

        At most `n_bytes`, and not beyond the GiB. None where the page is not resident for `access`.
        """
    def victim(self, start: int, end: int, /) -> tuple[int, int, int] | None:
        """Return what to clear to be rid of a range's runs: start, end, about how many VMAs.

        Whole runs: those, and all others in the aligned blocks of 64 pages that they touch.
        """
    def vmas_needed(self, addr: int, /) -> int:
        """Return how many VMAs a run at `addr` may add: two, and two for a window."""
    def windows(self) -> list[tuple[int, int]]:
        """Return the guest's and the host's address of every window."""
    def release(self) -> None:
        """Unmap all windows. Idempotent; nobody may be inside."""
