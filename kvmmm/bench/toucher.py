"""A user guest that touches pages, and the same pages without us: for `bench mm`."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.guest import MARK_END, TIMEOUT_S, BenchmarkError, guest_path
from kvmmm.hostarch.access import READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.pagetables.pte import PTE_ADDRESS_MASK, flags_of
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.safemem.ffi import address_of, ffi, lib
from kvmmm.vmm.user_vm import UserVM

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import FileRange

_C = cast("Any", lib)
_TIMEOUT_NS = int(TIMEOUT_S * 1e9)

# rdi = rsi; rcx = rdx; 1: touch (rdi); rdi += r8; if (--rcx) goto 1b; out %al, $MARK_END; again
_WRITER = bytes.fromhex("4889f7 4889d1 c60701 4c01c7 48ffc9 75f5 e6b2 ebeb")
_READER = bytes.fromhex("4889f7 4889d1 8a07   4c01c7 48ffc9 75f6 e6b2 ebec")
_CODE = 0x1000_0000
_PIECE = 0x80
PIECES = _READER.ljust(_PIECE, b"\xf4") + _WRITER
"""Both programs, to be put at the start of a page: rdx places from rsi on, r8 bytes apart."""
START = 0x4000_0000
"""Where it touches: far from everything else, a multiple of 1 GiB."""


def piece_of(*, write: bool) -> int:
    """Return where in PIECES a program begins."""
    return _PIECE if write else 0


class Toucher(UserVM):
    """A VM with one process, whose code touches `n` pages and makes an `out`.

    Args:
        memory: As in `UserVM`.
        max_leaf_bytes: The largest leaves of its page tables; None as kvmmm likes.
        lazy_slots: As in `UserVM`.
    """

    def __init__(
        self, memory: str, *, max_leaf_bytes: int | None = None, lazy_slots: bool = False
    ) -> None:
        self._leaf_bytes = max_leaf_bytes
        super().__init__(memory, lazy_slots=lazy_slots)
        self.load(guest_path("user_hello"))
        self.space = self.process.space
        code = self.mm.mmap(PAGE_BYTES, READ_EXECUTE, addr=_CODE, fixed=True)
        self.mm.copy_out(code.start, PIECES, ignore_permissions=True)
        self.on_out(MARK_END, lambda _port, _value: True, value_only=True)

    def _new_space(self) -> PageTableAddressSpace:
        return PageTableAddressSpace(
            self.physical, self._kernel.fixed, max_leaf_bytes=self._leaf_bytes
        )

    def new_space(self) -> PageTableAddressSpace:
        """Return page tables for a child."""
        return self._new_space()

    def aim(self, start: int, n: int, stride_bytes: int = PAGE_BYTES, *, write: bool) -> None:
        """Have the next run touch `n` places from `start` on."""
        regs = self.vcpu.regs
        regs.rip = _CODE + piece_of(write=write)
        regs.rsi, regs.rdx, regs.r8 = start, n, stride_bytes

    def touch(self, start: int, n: int, stride_bytes: int = PAGE_BYTES, *, write: bool) -> int:
        """Touch `n` places, one after the other; returns ns."""
        self.aim(start, n, stride_bytes, write=write)
        start_ns = perf_counter_ns()
        answer = self.vcpu.run(_TIMEOUT_NS)
        taken_ns = perf_counter_ns() - start_ns
        if answer is not True:
            raise BenchmarkError(f"the guest did not come to its mark: {answer!r} {answer}")
        return taken_ns

    def touch_code(self) -> None:
        """Run, so that what every run needs is there: a root, and translations of the code."""
        self.touch(_CODE, 1, write=False)

    def touch_by_floor(
        self, n: int, stride_pages: int, frames: FileRange, copy_from: FileRange | None = None
    ) -> int:
        """Touch as `touch(START, ...)` does, each fault served in C by one entry; returns ns.

        Args:
            n: How many faults.
            stride_pages: From one to the next.
            frames: `n` frames of the arena, one for each place touched.
            copy_from: Frames whose bytes they are filled with before; None for nothing.
        """
        length = n * stride_pages * PAGE_BYTES
        tables = self.empty_tables(length)
        recipe = ffi.new("struct kvmmm_floor_faults *")
        recipe.vcpu_fd = self.vcpu.fd
        recipe.run = ffi.cast("struct kvm_run *", self.vcpu.run_hva)
        recipe.trap_port, recipe.mark_port = lib.KVMMM_PORT_TRAP, MARK_END
        recipe.tss_type = self.vcpu.trial.tss_type
        recipe.stack_top_hva = self.stack_top_hva
        recipe.gva, recipe.n_pages, recipe.stride_pages = START, n * stride_pages, stride_pages
        hvas = ffi.new("uintptr_t[]", tables)
        recipe.tables_hva = hvas
        gpa = self.physical.gpa_of(self.arena, frames.start)
        recipe.first_pte = gpa | flags_of(READ_WRITE, user=True)
        recipe.copy_fd = -1
        if copy_from is not None:
            recipe.copy_fd, recipe.copy_offset = self.arena.fd, frames.start
            recipe.copy_src_hva = self.arena.hva + copy_from.start
        n_faults = ffi.new("uint64_t *")
        # The run loop loads a new root, the floor does not.
        self.touch_code()
        self.aim(START, n, stride_pages * PAGE_BYTES, write=True)
        taken_ns = int(_C.kvmmm_floor_serve_faults(recipe, _TIMEOUT_NS, n_faults))
        if taken_ns < 0 or n_faults[0] != n:
            raise BenchmarkError(f"the floor served {n_faults[0]} faults of {n}: {taken_ns}")
        # What the tables say now is nobody's: out with it.
        self.space.unmap([AddrRange(START, START + length)])
        return taken_ns

    @property
    def stack_top_hva(self) -> int:
        """Where the ring-0 stack ends under which the CPU pushes, on the host."""
        return self._kernel.stack_top_hva(0)

    def empty_tables(self, length_bytes: int) -> list[int]:
        """Have level-1 tables without entries over [START, + length); their host addresses."""
        space, frames = self.space, self.physical.frames
        span = -(-length_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        fr = self.arena.allocate(PAGE_BYTES)
        try:
            hvas = []
            for addr in range(START, START + span, HUGE_PAGE_BYTES):
                space.map_file(addr, self.arena, fr, READ_WRITE)
                entries = frames.entries(space.root_gpa)
                for shift in (39, 30, 21):
                    entries = frames.entries(entries[addr >> shift & 511] & PTE_ADDRESS_MASK)
                entries[0] = 0
                hvas.append(address_of(ffi.from_buffer(entries)))
        finally:
            self.arena.dec_ref(fr)
        return hvas
