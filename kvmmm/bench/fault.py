"""`bench mm`, with a CPU: page faults of a program in ring 3, and copies on write."""

from __future__ import annotations

import os
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import NS, RATIO, Case, Group
from kvmmm.bench.toucher import START, Toucher
from kvmmm.hostarch.access import READ_WRITE, WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange, FileRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

_N = 256
_APART = 2 * PAGE_BYTES
"""From one mapping of a page to the next: pmas of one page each."""
_WINDOWS = 4


class _Faults:
    """Faults of all kinds, each with a floor that starts from the same memory."""

    def __init__(self) -> None:
        self.vm = Toucher("64M", max_leaf_bytes=PAGE_BYTES)
        self.vm.space.map_unit_bytes = PAGE_BYTES

    def close(self) -> None:
        """Release everything."""
        self.vm.close()

    def _map_apart(self) -> None:
        mm = self.vm.mm
        mm.munmap(START, _N * _APART)
        for addr in range(START, START + _N * _APART, _APART):
            mm.mmap(PAGE_BYTES, READ_WRITE, addr=addr, fixed=True)

    def existing(self) -> Sample:
        """Faults on pages that are backed, and only not in the tables."""
        vm = self.vm
        mm = vm.mm
        mm.mmap(_N * PAGE_BYTES, READ_WRITE, addr=START, fixed=True, replace=True)
        vm.touch(START, _N, write=True)
        vm.space.unmap([AddrRange(START, START + _N * PAGE_BYTES)])
        # The shootdown took them from the host, too; in the floor they are there.
        mm.read(START, _N * PAGE_BYTES)
        ns = vm.touch(START, _N, write=True)
        mm.munmap(START, _N * PAGE_BYTES)
        return {"fault": ns / _N}

    def existing_floor(self) -> Sample:
        """The same pages, resident, by an entry each."""
        frames = self._frames(resident=True)
        try:
            return {"fault": self.vm.touch_by_floor(_N, 1, frames) / _N}
        finally:
            self.vm.arena.dec_ref(frames)

    def allocating(self) -> Sample:
        """Faults on pages of mappings never touched: each allocates a pma."""
        self._map_apart()
        ns = self.vm.touch(START, _N, _APART, write=True)
        self.vm.mm.munmap(START, _N * _APART)
        return {"fault": ns / _N}

    def allocating_floor(self) -> Sample:
        """As many fresh frames, by an entry each."""
        frames = self._frames(resident=False)
        try:
            return {"fault": self.vm.touch_by_floor(_N, 2, frames) / _N}
        finally:
            self.vm.arena.dec_ref(frames)

    def cow_pages(self) -> Sample:
        """Writes to pages that a child shares, each a pma of its own."""
        vm = self.vm
        self._map_apart()
        vm.touch(START, _N, _APART, write=True)
        child = vm.mm.fork(vm.new_space())
        try:
            ns = vm.touch(START, _N, _APART, write=True)
        finally:
            child.close()
            child.address_space.release()
            vm.mm.munmap(START, _N * _APART)
        return {"fault": ns / _N}

    def cow_pages_floor(self) -> Sample:
        """Exit, pwrite of the page into a fresh frame, entry."""
        source, frames = self._frames(resident=True), self._frames(resident=False)
        try:
            return {"fault": self.vm.touch_by_floor(_N, 2, frames, source) / _N}
        finally:
            self.vm.arena.dec_ref(source)
            self.vm.arena.dec_ref(frames)

    def _frames(self, *, resident: bool) -> FileRange:
        arena = self.vm.arena
        frames = arena.allocate(_N * PAGE_BYTES, align_bytes=HUGE_PAGE_BYTES)
        if resident:
            with arena.view_of(frames) as view:
                view[:] = bytes(len(view))
        return frames


class _Windows:
    """Copies of whole windows."""

    def __init__(self) -> None:
        self.vm = Toucher("64M", max_leaf_bytes=PAGE_BYTES)

    def close(self) -> None:
        """Release everything."""
        self.vm.close()

    def product(self) -> Sample:
        """The handler of a write to a window of which every page is in use, and shared."""
        vm = self.vm
        mm = vm.mm
        length = _WINDOWS * HUGE_PAGE_BYTES
        mm.mmap(length, READ_WRITE, addr=START, fixed=True)
        vm.touch(START, length // PAGE_BYTES, write=True)
        child = mm.fork(vm.new_space())
        try:
            vm.touch(START, length // PAGE_BYTES, write=False)
            start_ns = perf_counter_ns()
            for addr in range(START, START + length, HUGE_PAGE_BYTES):
                mm.handle_user_fault(addr, WRITE)
            ns = perf_counter_ns() - start_ns
        finally:
            child.close()
            child.address_space.release()
            mm.munmap(START, length)
        return {"window": ns / _WINDOWS}

    def floor(self) -> Sample:
        """One pwrite a window, from resident memory into holes."""
        arena = self.vm.arena
        length = _WINDOWS * HUGE_PAGE_BYTES
        source = arena.allocate(length, align_bytes=HUGE_PAGE_BYTES)
        frames = arena.allocate(length, align_bytes=HUGE_PAGE_BYTES)
        try:
            with arena.view_of(source) as view:
                view[:] = bytes(length)
                start_ns = perf_counter_ns()
                for at in range(0, length, HUGE_PAGE_BYTES):
                    os.pwrite(arena.fd, view[at : at + HUGE_PAGE_BYTES], frames.start + at)
                ns = perf_counter_ns() - start_ns
        finally:
            arena.dec_ref(source)
            arena.dec_ref(frames)
        return {"window": ns / _WINDOWS}


@contextmanager
def _faults() -> Iterator[Mapping[str, Probe]]:
    faults = _Faults()
    try:
        yield {
            "existing": faults.existing,
            "existing_floor": faults.existing_floor,
            "allocating": faults.allocating,
            "allocating_floor": faults.allocating_floor,
            "cow": faults.cow_pages,
            "cow_floor": faults.cow_pages_floor,
        }
    finally:
        faults.close()


@contextmanager
def _windows() -> Iterator[Mapping[str, Probe]]:
    windows = _Windows()
    try:
        yield {"window": windows.product, "pwrite": windows.floor}
    finally:
        windows.close()


GROUPS = (
    Group(
        "mm: faults in ring 3",
        (
            Case(
                "mm/ring3_fault", unit=RATIO, goal=1.25,
                product=("existing", "fault"), floor=("existing_floor", "fault"),
                note="a pma is there; exit to resume; floor: #PF, entry, resume in C",
            ),
            Case(
                "mm/ring3_fault_handler", unit=NS, goal=8000,
                product=("existing", "fault"), floor=("existing_floor", "fault"),
                note="the same, minus the floor",
            ),
            Case(
                "mm/ring3_fault_handler_alloc", unit=NS, goal=15000,
                product=("allocating", "fault"), floor=("allocating_floor", "fault"),
                note="it allocates a pma of a page; minus the floor, on fresh frames as well",
            ),
            Case(
                "mm/cow_break_page", unit=RATIO, goal=1.3,
                product=("cow", "fault"), floor=("cow_floor", "fault"),
                note="a pma of a page, shared with a child; floor: #PF, pwrite, entry, resume in C",
            ),
        ),
        open=_faults, rounds=25, quick_rounds=5,
    ),
    Group(
        "mm: copies of windows",
        (
            Case(
                "mm/cow_break_window", unit=RATIO, goal=1.15,
                product=("window", "window"), floor=("pwrite", "window"),
                note="the handler, 2 MiB that a child shares, with shootdown; floor: one pwrite",
            ),
        ),
        open=_windows, rounds=15, quick_rounds=3,
    ),
)  # fmt: skip
"""Single pages, and windows."""
