"""Which shootdowns work on the host's KVM: tried on a running vCPU, once a process, in a few ms.

    guest, ring 3                           host
    loop: result = *page; turns += 1        page → another frame, by an edit of its table entry
                                            the shootdown
                                            two more turns later: is it the other frame's word?

What was loaded two turns after the shootdown had returned was loaded after it. A vCPU that makes no
turns within the time limit proves nothing, and nothing is taken for granted.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import TYPE_CHECKING

from kvmmm.arena import Arena
from kvmmm.errors import KvmmmError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE
from kvmmm.hostarch.addr import GIANT_PAGE_BYTES, HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables import PageTables
from kvmmm.pagetables.pte import LEVEL_SHIFTS, PTE_ADDRESS_MASK, TABLE_FLAGS, flags_of
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.kernel_half import KernelHalf
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import drop_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.device import Device

ROUNDS = 3
_TURNS_TIMEOUT_S = 0.5
_RUN_TIMEOUT_NS = 10_000_000_000
_ARENA_BYTES = 2 << 20
_CODE_GVA, _PAGE_GVA, _RESULT_GVA = 0x40_0000, 0x40_1000, 0x40_2000
# Frames, behind each other in the arena.
_CODE, _RESULT, _FRAMES = 0, PAGE_BYTES, 2 * PAGE_BYTES
# 1: mov (%rsi), %rax;  mov %rax, (%rdi);  incq 8(%rdi);  jmp 1b
_LOOP = bytes.fromhex("48 8b 06 48 89 07 48 ff 47 08 eb f4")
_RESULT_WORDS = struct.Struct("<QQ")


class Proven:
    """What was found. Immutable.

    Attributes:
        dontneed: MADV_DONTNEED of the frame works.
        zap: A slot that comes and goes works.
        root: A new root with new tables down to the entry works.
        is_nested: A new root is enough to have an entry below it looked at again: the CPU walks the
            guest's own tables. With shadowed ones it is not.
    """

    __slots__ = ("dontneed", "is_nested", "root", "zap")

    def __init__(self, *, dontneed: bool, zap: bool, root: bool, is_nested: bool) -> None:
        self.dontneed = dontneed
        self.zap = zap
        self.root = root
        self.is_nested = is_nested

    def __repr__(self) -> str:
        names = [name for name in self.__slots__ if getattr(self, name)]
        return f"<proven: {', '.join(names) or 'nothing'}>"

    def best_leaf_bytes(self, *, giant_pages: bool) -> int:
        """Return how large leaves may become.

        Where tables are shadowed, KVM splits large leaves into 4 KiB of its own: nothing is gained,
        and a change of a part costs a new root.
        """
        if not self.is_nested:
            return PAGE_BYTES
        return GIANT_PAGE_BYTES if giant_pages else HUGE_PAGE_BYTES


_lock = threading.Lock()
_found: dict[str, Proven] = {}


def proven_on(device: Device) -> Proven:
    """Return what works on a device, tried at the first call.

    Raises:
        KvmmmError: Nothing does, or ring 3 does not run: page tables cannot be edited safely.
    """
    proven = _found.get(device.path)
    if proven is None:
        with _lock:
            proven = _found.get(device.path)
            if proven is None:
                proven = _found[device.path] = try_out(device)
    if not proven.root or not (proven.zap or proven.dontneed):
        raise KvmmmError(
            f"{device.path}: no way was found to have a running vCPU forget a translation "
            f"({proven!r}), so user guests cannot be run on this KVM"
        )
    return proven


def try_out(device: Device) -> Proven:
    """Try everything, in a VM of its own."""
    with Arena(_ARENA_BYTES, used_bytes=4 * PAGE_BYTES) as arena, Vm(device) as vm:
        trial = _ShootdownTrial(vm, arena)
        try:
            return trial.result()
        finally:
            trial.close()


class _ShootdownTrial:
    """A vCPU that turns in its loop, on a thread of its own, and tables to edit under it."""

    def __init__(self, vm: Vm, arena: Arena) -> None:
        self._vm = vm
        self._arena = arena
        self._physical = GuestPhysical(vm, arena)
        self._half = KernelHalf(self._physical)
        self._frames = self._physical.frames
        self._gpa = self._physical.gpa_of(arena, 0)
        view = arena.view
        view[_CODE : _CODE + len(_LOOP)] = _LOOP
        for number in (0, 1):
            struct.pack_into("<Q", view, _FRAMES + number * PAGE_BYTES, number)
        tables = PageTables(self._frames, max_leaf_bytes=PAGE_BYTES, fixed=self._half.fixed)
        self._tables = tables
        tables.map(_CODE_GVA, PAGE_BYTES, self._gpa + _CODE, flags_of(READ | EXECUTE, user=True))
        tables.map(_RESULT_GVA, PAGE_BYTES, self._gpa + _RESULT, flags_of(READ_WRITE, user=True))
        tables.map(_PAGE_GVA, PAGE_BYTES, self._gpa + _FRAMES, flags_of(READ, user=True))
        self._number = 0
        self._root_gpa = tables.root_gpa
        self._copies: list[int] = []
        self._vcpu = vm.create_vcpu()
        self._half.load(self._vcpu, self._root_gpa, rip=_CODE_GVA, rsp=_RESULT_GVA)
        self._vcpu.regs.rsi, self._vcpu.regs.rdi = _PAGE_GVA, _RESULT_GVA
        self._thread = threading.Thread(
            target=self._vcpu.run, args=(_RUN_TIMEOUT_NS,), name="kvmmm-trial", daemon=True
        )

    def result(self) -> Proven:
        self._thread.start()
        works = self._has_turned() and self._word() == 0
        return Proven(
            dontneed=works and self._works(self._dontneed),
            zap=works and self._works(self._zap),
            root=works and self._works(self._new_path),
            is_nested=works and self._works(self._new_root),
        )

    def close(self) -> None:
        self._vcpu.stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._vm.close()
        for gpa in self._copies:
            self._frames.free(gpa)
        self._tables.release()
        self._half.close()
        self._physical.close()

    # ---- one way, some rounds ----

    def _works(self, shoot: Callable[[int], None]) -> bool:
        for _ in range(ROUNDS):
            before = self._number
            self._number = 1 - before
            if shoot != self._new_path:
                self._edit(self._root_gpa)
            shoot(before)
            if not self._has_turned() or self._word() != self._number:
                # As if nothing had been: the slots go and come, which is an ordinary change.
                self._physical.replace_slots()
                return False
        return True

    def _dontneed(self, before: int) -> None:
        drop_pages(self._arena.hva + _FRAMES + before * PAGE_BYTES, PAGE_BYTES)

    def _zap(self, _before: int) -> None:
        self._physical.zap()

    def _new_path(self, _before: int) -> None:
        """New tables down to the entry, edited before a CPU sees them."""
        root_gpa = self._copy_path(levels=4)
        self._edit(root_gpa)
        self._load(root_gpa)

    def _new_root(self, _before: int) -> None:
        self._load(self._copy_path(levels=1))

    def _load(self, root_gpa: int) -> None:
        self._root_gpa = root_gpa
        self._vcpu.set_root(root_gpa)

    # ---- the tables, by hand: in place is what PageTables avoids ----

    def _edit(self, root_gpa: int) -> None:
        entries = self._frames.entries(root_gpa)
        for shift in LEVEL_SHIFTS[:1:-1]:
            gpa = entries[(_PAGE_GVA >> shift) & 511] & PTE_ADDRESS_MASK
            entries = self._frames.entries(gpa)
        frame_gpa = self._gpa + _FRAMES + self._number * PAGE_BYTES
        entries[(_PAGE_GVA >> LEVEL_SHIFTS[1]) & 511] = frame_gpa | flags_of(READ, user=True)

    def _copy_path(self, levels: int) -> int:
        """Copy the root, and `levels` - 1 tables below it on the way to the entry."""
        source = self._frames.entries(self._root_gpa)
        root_gpa, copy = self._allocate_copy(source)
        for shift in LEVEL_SHIFTS[4 : 4 - levels + 1 : -1]:
            index = (_PAGE_GVA >> shift) & 511
            source = self._frames.entries(copy[index] & PTE_ADDRESS_MASK)
            gpa, below = self._allocate_copy(source)
            copy[index] = gpa | TABLE_FLAGS
            copy = below
        return root_gpa

    def _allocate_copy(self, source: memoryview) -> tuple[int, memoryview]:
        gpa, copy = self._frames.allocate()
        self._copies.append(gpa)
        copy[:] = source
        return gpa, copy

    # ---- what the guest says ----

    def _word(self) -> int:
        return int(_RESULT_WORDS.unpack_from(self._arena.view, _RESULT)[0])

    def _turns(self) -> int:
        return int(_RESULT_WORDS.unpack_from(self._arena.view, _RESULT)[1])

    def _has_turned(self) -> bool:
        wanted = self._turns() + 2
        deadline = time.monotonic() + _TURNS_TIMEOUT_S
        while self._turns() < wanted:
            if time.monotonic() > deadline or not self._thread.is_alive():
                return False
            time.sleep(0)
        return True
