"""What must hold of a memory manager that has done what its model has done."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestBusError
from kvmmm.hostarch.access import READ
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.mapping_set import MappingSet
from kvmmm.memmap.shared_memory import SharedMemory
from tests.model.memory import PAGE, ZEROS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.arena import Arena
    from kvmmm.mm import MemoryManager
    from kvmmm.mm.vma import Vma
    from tests.model.operations import ModelMm
    from tests.model.world import World


def check_vmas(mm: MemoryManager, model: ModelMm) -> None:
    """The same vmas, merged alike; the same accounts."""
    real = [(start // PAGE, end // PAGE, _words(vma)) for start, end, vma in mm.vmas]
    want = [
        (start, end, (*kind[:3], kind.backing and kind.backing.real, *kind[4:]))
        for start, end, kind in model.vmas()
    ]
    assert real == want, f"{real}\ninstead of\n{want}"
    accounts = mm.usage_bytes, mm.data_bytes, mm.locked_bytes, mm.brk_end, mm.lock_mode
    wanted = (
        model.usage_bytes(), model.data_bytes(), model.locked_bytes(), model.brk_end,
        model.lock_mode,
    )  # fmt: skip
    assert accounts == wanted, f"usage, data, locked, brk, mode: {accounts}, not {wanted}"
    c = mm.counters
    assert c.faults == c.vma_lookups == c.pma_insertions + c.pma_hits + c.refused


def _words(vma: Vma) -> tuple[Any, ...]:
    return (
        vma.perms, vma.max_perms, vma.private, vma.mappable, vma.delta // PAGE, vma.grows_down,
        vma.is_stack, vma.lock_mode, vma.dontfork, vma.pure_data, vma.name,
    )  # fmt: skip


def _mappables(world: World) -> set[Any]:
    vmas = [vma for member in world.members for _, _, vma in member.mm.vmas]
    return {vma.mappable for vma in vmas if vma.mappable} | {
        world.file, world.read_only, world.shared,
    }  # fmt: skip


def check_frames(world: World) -> None:
    """Every reference of the arena and of the files is somebody's, and nobody's is missing."""
    edges: dict[Any, list[tuple[int, int]]] = {}
    for file, start, end in _held(world):
        edges.setdefault(file, []).extend(((start, 1), (end, -1)))
    for file in (world.arena, world.file, world.read_only):
        used_bytes = 0
        for start, end, count in _runs(edges.get(file, [])):
            used_bytes += end - start
            for fo in (start, end - PAGE):
                found = file.ref_count(fo)
                assert found == count, f"{found} references on {fo:#x} of {file!r}, {count} known"
        if file is world.arena:
            used_bytes += world.backend.own_bytes()
            assert world.arena.statistics().used_bytes == used_bytes
        else:
            assert file.referenced_bytes == used_bytes


def _held(world: World) -> Iterator[tuple[Any, int, int]]:
    # (file, start, end) of every range on which somebody has a reference.
    for member in world.members:
        for start, end, pma in member.mm.pmas:
            yield pma.file, start + pma.delta, end + pma.delta
    for pinned in world.pins:
        for _, file, fr in pinned.pin.ranges:
            yield file, fr.start, fr.end
    for mappable in _mappables(world):
        if isinstance(mappable, SharedMemory):
            for start, end, delta in mappable._frames:
                yield world.arena, start + delta, end + delta


def _runs(edges: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    # (start, end, how many hold it).
    count = last = 0
    for at, more in sorted(edges):
        if count and last < at:
            yield last, at, count
        count += more
        last = at


def check_mappings(world: World) -> None:
    """Mappables know exactly who maps what of them."""
    wanted = {mappable: MappingSet() for mappable in _mappables(world)}
    for member in world.members:
        for start, end, vma in member.mm.vmas:
            if vma.mappable is not None:
                wanted[vma.mappable].add_mapping(
                    member.mm, AddrRange(start, end), start + vma.delta,
                    writable=vma.may_write_back,
                )  # fmt: skip
    for mappable, mappings in wanted.items():
        known: MappingSet = mappable._mappings
        known.check_invariants()
        assert list(known._mappings) == list(mappings._mappings), f"{known!r} of {mappable!r}"


def compare_contents(mm: MemoryManager, model: ModelMm, arena: Arena) -> None:
    """Every byte that was written, every byte of files, and zeros wherever else there is memory."""
    pages = {*model.own, *_resident_pages(mm, arena)}
    for page, kind in model.kinds.items():
        if kind.backing is not None:
            store, index = kind.backing.store, page + kind.delta
            # And the first page behind a file.
            if index in store.cells or (index <= store.n_pages and not store.is_memory):
                pages.add(page)
    for page in sorted(pages):
        fault = model.reach(page * PAGE, 1, READ, ignore=True)
        if fault is None:
            data = mm.read(page * PAGE, PAGE, ignore_permissions=True)
            assert model.sees(page * PAGE, data), f"other bytes in the page {page * PAGE:#x}"
        elif fault.kind is GuestBusError:
            try:
                mm.read(page * PAGE, 1, ignore_permissions=True)
            except GuestBusError:
                continue
            raise AssertionError(f"the page {page * PAGE:#x} lies behind its file")
        else:
            # Nobody may ever read it: look at the frame.
            found = mm.pmas.find(page * PAGE)
            if found is not None and found[2].file is arena:
                fo = page * PAGE + found[2].delta
                assert model.sees(page * PAGE, arena.view[fo : fo + PAGE].tobytes())
            else:
                assert page not in model.own or model.sees(page * PAGE, ZEROS)


def _resident_pages(mm: MemoryManager, arena: Arena) -> Iterator[int]:
    # Pages whose frames are no holes.
    for start, end, pma in mm.pmas:
        if pma.file is not arena:
            continue
        fo, stop = start + pma.delta, end + pma.delta
        while fo < stop:
            try:
                data = os.lseek(arena.fd, fo, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                break
            hole = os.lseek(arena.fd, data, os.SEEK_HOLE)
            yield from ((at - pma.delta) // PAGE for at in range(data, min(hole, stop), PAGE))
            fo = hole
