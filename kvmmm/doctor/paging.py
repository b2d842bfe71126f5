"""Changing translations under a guest: edits of page tables by the host, shootdowns, slots that go.

A CPU keeps translations. With nested paging these go with a CR3 load; a KVM that shadows page
tables keeps its own copy, and does not see that the host has edited the guest's.
"""

from __future__ import annotations

import mmap
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Self

from kvmmm.doctor.code import (
    BASE,
    ELSEWHERE,
    ENTER_RING3,
    LOAD,
    RELOAD_CR3,
    STACK_TOP,
    STEP,
    UNTOUCHED,
    jump_back,
    u32,
)
from kvmmm.doctor.finding import Check, Finding, differs, missing, ok
from kvmmm.doctor.lab import Lab
from kvmmm.errors import KvmmmError
from kvmmm.hostarch.access import READ
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm.boot import RFLAGS_RESERVED
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.shootdown_trial import proven_on
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from kvmmm.doctor.lab import Script

    AfterEdit = Callable[[Lab, "_SharedPages", int], None]

_FRAMES = 0x2000_0000
"""Guest-physical address of the two frames between which a page is moved."""
_DUMMY = 0x3000_0000
_ROUNDS = 4


class _SharedPages:
    """Pages of host memory that a slot can be put over, and that madvise can drop.

    Attributes:
        hva: Host address of the first.
    """

    def __init__(self, n_pages: int) -> None:
        self.memory = mmap.mmap(-1, n_pages * PAGE_BYTES)
        for page in range(n_pages):
            self.memory[page * PAGE_BYTES] = page + 1  # tells them apart, and commits them
        self._buffer: Any = ffi.from_buffer(self.memory, require_writable=True)
        self.hva = int(ffi.cast("uintptr_t", self._buffer))

    def drop(self, page: int) -> None:
        """Drop every translation of a page; shared memory keeps its contents."""
        self.memory.madvise(mmap.MADV_DONTNEED, page * PAGE_BYTES, PAGE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        ffi.release(self._buffer)
        self.memory.close()


def _move(lab: Lab, page: int) -> None:
    """Have ELSEWHERE reach frame `page`, as an editor of page tables does: no more than that."""
    tables: Any = lab.vm.area.tables
    tables.map(ELSEWHERE, PAGE_BYTES, _FRAMES + page * PAGE_BYTES, flags_of(READ, user=True))


def _go_on(_lab: Lab) -> None:
    pass


def _count_stale(
    code: bytes, ring: int, after_edit: AfterEdit, resume: Callable[[Lab], None] = _go_on
) -> int:
    """Move a present page to and fro; returns how often the guest still read the old one.

    Args:
        code: Steps first of all; then, after each step, reads ELSEWHERE into rax and steps again.
        ring: In which it begins.
        after_edit: Called with the page that ELSEWHERE reached before, when that has been changed.
        resume: Says where the guest goes on after a step, if not behind it.
    """

    def script(lab: Lab, pages: _SharedPages) -> Script:
        stale = 0
        _move(lab, 0)
        resume(lab)
        yield
        for number in range(1, _ROUNDS + 1):
            before, after = (number - 1) % 2, number % 2
            _move(lab, after)
            after_edit(lab, pages, before)
            resume(lab)
            seen = yield
            stale += seen & 0xFF != after + 1
            # So that the next round begins alike: whatever was kept is dropped, and read again.
            _replace_slot(lab, pages)
            resume(lab)
            yield
        return stale

    with _SharedPages(2) as pages, Lab(code, ring=ring) as lab:
        lab.vm.vm.memslots.add(_FRAMES, 2 * PAGE_BYTES, pages.hva)
        stale = lab.play(script(lab, pages))
    assert isinstance(stale, int)  # noqa: S101 - the script above answers a count
    return stale


def _replace_slot(lab: Lab, pages: _SharedPages) -> None:
    slots = lab.vm.vm.memslots
    slot = slots.find(_FRAMES)
    if slot is not None:
        slots.remove(slot)
        slots.add(_FRAMES, 2 * PAGE_BYTES, pages.hva)


_READ_LOOP = STEP + LOAD + u32(ELSEWHERE) + jump_back(10)
# Ring 0 only reloads CR3: what it reads may be emulated, and that looks at the tables each time.
_RELOAD_LOOP = STEP + RELOAD_CR3 + ENTER_RING3 + LOAD + u32(ELSEWHERE) + STEP


def _nothing(_lab: Lab, _pages: _SharedPages, _before: int) -> None:
    pass


def _drop_data(_lab: Lab, pages: _SharedPages, before: int) -> None:
    pages.drop(before)


def _dummy_slot(lab: Lab, pages: _SharedPages, _before: int) -> None:
    slots = lab.vm.vm.memslots
    slots.remove(slots.add(_DUMMY, PAGE_BYTES, pages.hva))


def _edit() -> Finding:
    stale = _count_stale(_READ_LOOP, 3, _nothing)
    if stale:
        return differs(f"{stale} of {_ROUNDS} unseen without a shootdown", value=False)
    return ok(f"{_ROUNDS} of {_ROUNDS} seen at once", value=True)


def _paging() -> Finding:
    stale = _count_stale_after_reload()
    if stale:
        return differs(
            f"shadowed tables: {stale} of {_ROUNDS} edits unseen after a CR3 load",
            "an edit of a present entry needs a shootdown, below",
            value="shadow",
        )
    return ok("nested: the CPU walks the guest's own tables", value="nested")


def _count_stale_after_reload() -> int:
    def back_to_ring0(lab: Lab) -> None:
        vcpu = lab.vm.vcpu
        vcpu.return_to_frame(
            vcpu.get_sregs(), rip=BASE + len(STEP), cs=lib.KVMMM_KERNEL_CS, rflags=RFLAGS_RESERVED,
            rsp=STACK_TOP, ss=lib.KVMMM_KERNEL_DS,
        )  # fmt: skip

    return _count_stale(_RELOAD_LOOP, 0, _nothing, back_to_ring0)


def _shootdown(after_edit: AfterEdit) -> Finding:
    stale = _count_stale(_READ_LOOP, 3, after_edit)
    if stale:
        return missing(f"{stale} of {_ROUNDS} old translations were still used")
    return ok(f"{_ROUNDS} of {_ROUNDS} old translations gone")


def _running() -> Finding:
    try:
        proven = proven_on(open_device())
    except KvmmmError as e:
        return missing(str(e), "guest kernels run here, programs in ring 3 do not: report this KVM")
    works = {
        "madvise": (proven.dontneed, "a small unmap drops everything, as a large one does"),
        "dummy memslot": (proven.zap, "a large unmap stops every vCPU and replaces its memslots"),
    }
    names = [name for name, (is_proven, _) in works.items() if is_proven]
    fact = f"{', '.join([*names, 'new root'])}: the guest saw each change at once"
    slower = [what for is_proven, what in works.values() if not is_proven]
    if slower:
        return differs(fact, f"slower, not wrong: {'; '.join(slower)}", value=repr(proven))
    return ok(fact, value=repr(proven))


def _removal() -> Finding:
    def script(lab: Lab) -> Script:
        mm = lab.vm.mm
        mm.copy_out(UNTOUCHED, b"\x07")
        seen = yield
        faults = mm.counters.faults
        lab.vm.address_space.unmap([AddrRange(UNTOUCHED, UNTOUCHED + HUGE_PAGE_BYTES)])
        again = yield
        return seen & 0xFF, again & 0xFF, mm.counters.faults - faults

    with Lab(STEP + LOAD + u32(UNTOUCHED) + jump_back(10)) as lab:
        seen, again, faults = lab.play(script(lab))
    if (seen, again) != (7, 7) or faults != 1:
        return missing(f"read {seen}, then {again} with {faults} faults, not 7, 7 with 1")
    return ok("the next access exits again, bytes right")


def _slot_costs() -> Finding:
    add_us, remove_us = [], []
    with _SharedPages(1) as pages, Vm() as vm:
        for _ in range(20):
            began_ns = perf_counter_ns()
            slot = vm.memslots.add(_DUMMY, PAGE_BYTES, pages.hva)
            added_ns = perf_counter_ns()
            vm.memslots.remove(slot)
            add_us.append((added_ns - began_ns) / 1e3)
            remove_us.append((perf_counter_ns() - added_ns) / 1e3)
    added, removed = median(add_us), median(remove_us)
    return ok(f"{added:.0f} us to add one, {removed:.0f} us to remove it", value=added)


CHECKS = (
    Check("memslot_cost", "memslots", _slot_costs),
    Check("memslot_removal", "memslot removal", _removal),
    Check("paging", "paging", _paging, is_needed=False),
    Check("edit", "host edits present entry", _edit, is_needed=False),
    Check(
        "shootdown_madvise", "shootdown by madvise", lambda: _shootdown(_drop_data),
        is_needed=False,
    ),
    Check(
        "shootdown_memslot", "shootdown by dummy memslot", lambda: _shootdown(_dummy_slot),
        is_needed=False,
    ),
    Check("shootdown_running", "shootdowns, running vCPU", _running, is_needed=False),
)  # fmt: skip
