"""`GuestPhysical`: where the frames of files lie in the guest-physical address space of one VM.

    0          4 GiB                                                            1 << MAXPHYADDR
    |  nothing  | arena, rounded up to 1 GiB | a file | another file |   free    |
                ▲
                frame at offset fo: gpa = window.base + fo, host address = file.hva + fo

Every file has a window, 1 GiB aligned, and keeps it until `forget`. Nothing lies below 4 GiB, where
the APIC page and, on VMX, KVM's own slots are. A window is covered by few, large slots over the
file's host mapping, registered when the file gets it; with `lazy_slots` only when a CPU gets there,
an EPT violation, chunk by chunk.

All address spaces of a VM share one of these. Lock order: an mm's active_lock, then ours.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from kvmmm.errors import GuestFaultError, KvmmmError, MmError
from kvmmm.hostarch.access import READ, WRITE, access_str
from kvmmm.hostarch.addr import GIANT_PAGE_BYTES, HUGE_PAGE_BYTES, PAGE_BYTES, align_up
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.table_frames import TableFrames
from kvmmm.segment import SegmentSet

if TYPE_CHECKING:
    from kvmmm.arena import Arena
    from kvmmm.memmap.file import File
    from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.platform.kvm.vm import Vm
    from kvmmm.safemem.ffi import MmioExit

WINDOWS_START = 1 << 32
"""Where the arena's window begins."""
_ZAP_GPA = 1 << 28
"""Where the slot of `zap` lies: below all windows, so that it holds no legal memory."""
_SLOT_MAX_BYTES = 64 << 30
_CHUNK_MAX_BYTES = 64 << 20
_SLOTS_KEPT_FREE = 2
"""One for `zap`, and one for the next file."""


class ViolationError(KvmmmError):
    """An EPT violation at an address that no page table of ours can have led to.

    So it is a defect of kvmmm, or a guest's own wild physical address.

    Attributes:
        gpa: Where.
        access: What was wanted there (`kvmmm.hostarch.access` bits).
    """

    def __init__(self, gpa: int, access: int, why: str) -> None:
        self.gpa = gpa
        self.access = access
        super().__init__(f"EPT violation at guest-physical {gpa:#x}, {access_str(access)}: {why}")


class Window:
    """Where one file lies. Immutable.

    Attributes:
        file: Whose frames these are.
        base: gpa of its offset 0.
        end: One past the last gpa that has a frame.
        delta: Host address minus gpa.
        flags: KVM_MEM_READONLY where this process itself may not write to the file.
    """

    __slots__ = ("base", "delta", "end", "file", "flags")

    def __init__(self, file: File, base: int) -> None:
        self.file = file
        self.base = base
        self.end = base + align_up(file.capacity_bytes, PAGE_BYTES)
        self.delta = file.hva - base
        self.flags = 0 if getattr(file, "writable", True) else abi.KVM_MEM_READONLY

    def __repr__(self) -> str:
        return f"<window [{self.base:#x}, {self.end:#x}) of {self.file!r}>"


class GuestPhysical:
    """The windows of one VM's files, and the slots over them. Thread-safe.

    Lifetime: the VM is closed first, then this, then the files.

    Attributes:
        vm: The VM.
        arena: Its own memory, in the first window.
        lazy_slots: Whether slots wait for the EPT violation.
        chunk_bytes: How much an EPT violation then registers, a power of two; 0 is what does best.
        bases: gpa of offset 0, by file. To be read only; the fault path does.
        frames: Where page tables come from.
        n_pages: Pages mapped by all spaces together; an estimate.
        loaded: Which space a vCPU is in. The spaces keep it.
        n_violations: EPT violations served.
        n_slots: Slots registered.
        n_zaps: How often everything was dropped, by `zap` or `replace_slots`.
        recycling: Held from a zap until the tables that it sets free are, and whenever a space
            gives tables up: what one gives up after the zap is not free.
    """

    def __init__(self, vm: Vm, arena: Arena, *, lazy_slots: bool = False) -> None:
        self.vm = vm
        self.arena = arena
        self.lazy_slots = lazy_slots
        self.chunk_bytes = 0
        self.bases: dict[File, int] = {}
        self.n_violations = 0
        self.n_slots = 0
        self.n_zaps = 0
        self.n_pages = 0
        self.loaded: dict[Vcpu, PageTableAddressSpace] = {}
        self._end_gpa = 1 << vm.device.cpuid.physical_bits
        # By gpa, rounded up to 1 GiB. Guarded by _lock, as are the VM's slots.
        self._windows: SegmentSet[Window] = SegmentSet()
        self._lock = threading.Lock()
        self.recycling = threading.Lock()
        self.window_of(arena)
        self.frames = TableFrames(self)

    def gpa_of(self, file: File, fo: int) -> int:
        """Return the gpa of offset `fo` of a file, which is given a window if it has none yet.

        Raises:
            MmError: ENOMEM: the windows do not fit below 1 << MAXPHYADDR.
        """
        base = self.bases.get(file)
        return (self.window_of(file).base if base is None else base) + fo

    def window_of(self, file: File) -> Window:
        """Return a file's window, made and registered when there is none.

        Raises:
            MmError: ENOMEM: the windows do not fit below 1 << MAXPHYADDR, or slots have run out.
            IoctlError: KVM refused a slot.
        """
        with self._lock:
            base = self.bases.get(file)
            if base is not None:
                return self._windows.find_value(base)  # type: ignore[return-value]
            for known in [known for known in self.bases if not known.hva]:
                self._forget(known)  # it has been closed
            window = Window(file, self._find_room(file.capacity_bytes))
            if not self.lazy_slots:
                self._register(window, window.base, window.end)
            self._windows.insert(window.base, align_up(window.end, GIANT_PAGE_BYTES), window)
            self.bases[file] = window.base
            return window

    def window_at(self, gpa: int) -> Window | None:
        """Return the window with a frame at `gpa`, or None."""
        window = self._windows.find_value(gpa)
        return window if window is not None and gpa < window.end else None

    def forget(self, file: File) -> None:
        """Take back a file's window and slots; another file may get the addresses.

        Preconditions:
            - No address space of the VM maps it.
        """
        with self._lock:
            self._forget(file)

    def zap(self) -> None:
        """Drop every translation of the VM, by a slot that comes and goes; vCPUs may run.

        Source: Linux arch/x86/kvm/mmu/mmu.c, kvm_mmu_zap_all_fast.
        """
        with self._lock:
            slots = self.vm.memslots
            slots.remove(slots.add(_ZAP_GPA, PAGE_BYTES, self.arena.hva))
            self.n_zaps += 1

    def close(self) -> None:
        """Give the table frames back. Idempotent.

        Preconditions:
            - The VM is closed, and its address spaces are released.
        """
        self.frames.close()

    def replace_slots(self) -> None:
        """Do the same where `zap` does not: every slot goes and comes, with the vCPUs paused."""
        with self._lock, self.vm.paused():
            slots = self.vm.memslots
            for slot in slots.overlapping(0, self._end_gpa):
                slots.remove(slot)
                slots.add(slot.gpa, slot.length_bytes, slot.hva, slot.flags)
            self.n_zaps += 1

    # ---- lazy slots ----

    def ensure_slots(self, gpa: int, length_bytes: int) -> None:
        """Register what a CPU walks or pushes to: it must never be missing, lazy slots or not."""
        window = self.window_at(gpa)
        if window is None:
            raise ViolationError(gpa, READ | WRITE, "no file has its window there")
        start = max(window.base, gpa & -HUGE_PAGE_BYTES)
        with self._lock:
            self._register(
                window, start, min(window.end, align_up(gpa + length_bytes, HUGE_PAGE_BYTES))
            )

    def serve_violation(self, gpa: int, access: int) -> None:
        """Register the chunk around `gpa`, an address that a CPU used and that has no slot yet.

        A gpa that has a slot by now is normal: a later fragment of one access, or another vCPU's.
        After an MMIO exit the access itself is still to be done: `complete`.

        Raises:
            ViolationError: No window is there, or nobody owns the frame.
        """
        window = self.window_at(gpa)
        if window is None:
            raise ViolationError(gpa, access, "no file has its window there")
        fo = gpa - window.base
        if not window.file.ref_count(fo):
            raise ViolationError(gpa, access, f"nobody owns the frame at offset {fo:#x}")
        if access & WRITE and window.flags:
            raise ViolationError(gpa, access, "its file is open for reading only")
        with self._lock:
            if self.vm.memslots.find(gpa) is None:
                self._register(window, *self._chunk(window, gpa))
            self.n_violations += 1

    def complete(self, exit_: MmioExit) -> None:
        """Perform the access of an MMIO exit by hand; KVM goes on from there.

        Preconditions:
            - `serve_violation` has been called for every page that it touches.

        Raises:
            GuestFaultError: No slot is there; `.addr` is the gpa.
        """
        slot = self.vm.memslots.find(exit_.gpa)
        if slot is None or exit_.gpa + exit_.size_bytes > slot.end:
            raise GuestFaultError(exit_.gpa, WRITE if exit_.is_write else READ, mapped=False)
        exit_.complete(exit_.gpa + slot.delta)

    def _chunk(self, window: Window, gpa: int) -> tuple[int, int]:
        # 2 MiB, doubled as long as slots end where the chunk begins, up to 64 MiB: so sequential
        # touching needs few. Large enough in any case for the slots that are left.
        if self.chunk_bytes:
            start = max(window.base, gpa & -self.chunk_bytes)
            return start, min(start + self.chunk_bytes, window.end)
        memslots = self.vm.memslots
        n_free = max(1, memslots.limit - len(memslots) - _SLOTS_KEPT_FREE - len(self.bases))
        start = max(window.base, gpa & -HUGE_PAGE_BYTES)
        before = memslots.find(start - 1)
        length = 2 * before.length_bytes if before is not None else HUGE_PAGE_BYTES
        length = min(length, _CHUNK_MAX_BYTES)
        least = (window.end - window.base) // n_free
        while length < least:
            length <<= 1
        return start, min(start + length, window.end)

    # ---- called with the lock held ----

    def _register(self, window: Window, start: int, end: int) -> None:
        """Cover what has no slot yet in [start, end), whole pages of the window."""
        memslots = self.vm.memslots
        gaps = list(memslots.by_gpa.gaps(start, end))
        pieces = [
            (at, min(_SLOT_MAX_BYTES, stop - at))
            for first, stop in gaps
            for at in range(first, stop, _SLOT_MAX_BYTES)
        ]
        if len(memslots) + len(pieces) > memslots.limit - 1:
            raise MmError(
                errno.ENOMEM, "map", start, f"{window!r} needs {len(pieces)} of "
                f"{memslots.limit} memslots, and {len(memslots)} are taken",
            )  # fmt: skip
        for at, length in pieces:
            memslots.add(at, length, at + window.delta, window.flags)
            self.n_slots += 1

    def _forget(self, file: File) -> None:
        base = self.bases.pop(file, None)
        window = None if base is None else self._windows.find_value(base)
        if window is None:
            return
        self._windows.remove(window.base, align_up(window.end, GIANT_PAGE_BYTES))
        slots = self.vm.memslots.overlapping(window.base, window.end)
        if slots and self.vm.fd >= 0:
            # Nothing points into them; but KVM drops every translation, as for any slot.
            with self.vm.paused():
                for slot in slots:
                    self.vm.memslots.remove(slot)

    def _find_room(self, length_bytes: int) -> int:
        for start, end in self._windows.gaps(WINDOWS_START, self._end_gpa):
            if length_bytes <= end - start:
                return start
        raise MmError(
            errno.ENOMEM, "map", WINDOWS_START,
            f"a file of {length_bytes >> 20} MiB has no room in the guest-physical addresses of "
            f"this CPU, which end at {self._end_gpa:#x}",
        )  # fmt: skip
