"""Whether a memory manager is whole: its invariants, for tests and with KVMMM_DEBUG=1."""

from __future__ import annotations

import functools
import itertools
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from kvmmm.hostarch.access import READ, WRITE, effective
from kvmmm.hostarch.addr import PAGE_BYTES, PAGE_MASK
from kvmmm.hostarch.ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmmm.mm.manager import MemoryManager
    from kvmmm.mm.pma import Pma

    Manager = TypeVar("Manager", bound=type)
    # How many pmas, how many pins; how many of the pmas allow no other, how many know all others.
    _Holders = tuple[int, int, int, int]

ENABLED = os.environ.get("KVMMM_DEBUG", "") not in ("", "0")
"""Whether invariants are checked after every operation; decided when this is imported."""


def checked_after(*names: str) -> Callable[[Manager], Manager]:
    """Have these methods of a class check its invariants when they end, if checks are enabled.

    Methods that run with a mappable's locks held are not for this: the check takes mapping_lock.
    """

    def decorate(cls: Manager) -> Manager:
        for name in names if ENABLED else ():
            setattr(cls, name, _checking(getattr(cls, name)))
        return cls

    return decorate


def _checking(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(mm: MemoryManager, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any method
        try:
            return method(mm, *args, **kwargs)
        finally:
            check_invariants(mm)

    return call


def check_invariants(mm: MemoryManager, relatives: Sequence[MemoryManager] = ()) -> None:
    """Check what the package comment promises; call it between operations.

    Args:
        mm: The address space.
        relatives: Those that it may share private frames with. When all of them are given,
            references are counted exactly: those of all pmas and pins, against the arena's.
            Without any, a frame that is shared may have any number above this mm's.

    Raises:
        AssertionError: Which invariant does not hold, and where.
    """
    with ExitStack() as stack:
        for one in (mm, *relatives):
            stack.enter_context(one.mapping_lock)
            stack.enter_context(one.active_lock)
        for one in (mm, *relatives):
            _check_sets_locked(one)
            for start, end, pma in one.pmas:
                _check_pma_locked(one, start, end, pma)
            _check_space_locked(one)
            _check_frames_locked(one)
            _check_figures_locked(one)
        _check_references_locked((mm, *relatives))


def _check_sets_locked(mm: MemoryManager) -> None:
    for kind, segments in (("vma", mm.vmas), ("pma", mm.pmas)):
        segments.check_invariants()
        for start, end, _value in segments:
            _require(not (start | end) & PAGE_MASK, f"{kind} [{start:#x}, {end:#x}) is unaligned")


def _check_pma_locked(mm: MemoryManager, start: int, end: int, pma: Pma) -> None:
    for gap_start, _gap_end in mm.vmas.gaps(start, end):
        _require(False, f"a pma without a vma at {gap_start:#x}")
    where = f"the pma [{start:#x}, {end:#x})"
    _require(not pma.private or pma.file is mm.arena, f"{where} is private, and not in the arena")
    _require(
        not (pma.need_cow and (pma.effective_perms | pma.max_perms) & WRITE),
        f"{where} is to be copied on write, and may be written",
    )
    allowed = pma.translate_perms & ~WRITE if pma.need_cow else pma.translate_perms
    for vma_start, _vma_end, vma in mm.vmas.segments(start, end):
        at = max(vma_start, start)
        _require(
            (pma.effective_perms, pma.max_perms)
            == (vma.effective_perms & allowed, effective(vma.max_perms) & allowed),
            f"{where} does not follow its vma at {at:#x}: {pma!r}, {vma!r}",
        )
        _require(pma.private or vma.mappable is not None, f"{where}: frames of no mappable")
        _require(vma.private or not (pma.need_cow or pma.private), f"{where}: shared and private")
        _require(not vma.private or pma.private or pma.need_cow, f"{where}: a file, not to be kept")


def _check_space_locked(mm: MemoryManager) -> None:
    space = mm.address_space
    # Memslots cannot withhold reading or execution from what they map at all.
    bits = (WRITE,) if space.walks_frames else (1, 2, 4)
    for start, end, pma in mm.pmas:
        for page in {start, end - PAGE_BYTES}:
            for bit in bits:
                _require(
                    bool(pma.effective_perms & bit) or not space.is_mapped(page, bit),
                    f"{page:#x} may be {('read', 'written', '', 'executed')[bit - 1]} through "
                    "the AS only",
                )
    for start, end in mm.pmas.gaps(0, mm.max_addr):
        for page in {start, end - PAGE_BYTES}:
            _require(not space.is_mapped(page, READ), f"{page:#x} is mapped, and has no pma")


def _check_frames_locked(mm: MemoryManager) -> None:
    # What copies may do without asking: never more than the pma says, and with its frames.
    for run_start, run_end, fo, bits in mm.frames(0, mm.max_addr & ~PAGE_MASK):
        at = run_start
        for start, end, pma in mm.pmas.segments(run_start, run_end):
            where = f"the frame table at {max(start, run_start):#x}"
            _require(start <= at, f"the frame table has a frame at {at:#x}, where no pma is")
            _require(
                pma.file is mm.arena and pma.delta == fo - run_start, f"{where} has another frame"
            )
            allowed = (pma.effective_perms & 3) | (pma.max_perms & 3) << 2
            _require(not bits & ~allowed, f"{where} permits {bits:#x}, the pma {allowed:#x}")
            at = end
        _require(run_end <= at, f"the frame table has a frame at {at:#x}, where no pma is")


def _check_figures_locked(mm: MemoryManager) -> None:
    _require(mm.max_rss_bytes >= mm.pmas.span_bytes, "more is resident than ever was")
    data_bytes = sum(end - start for start, end, vma in mm.vmas if vma.is_private_data)
    _require(mm.data_bytes == data_bytes, f"{mm.data_bytes} bytes of data, and not {data_bytes}")
    locked_bytes = sum(end - start for start, end, vma in mm.vmas if vma.lock_mode)
    _require(mm.locked_bytes == locked_bytes, f"{mm.locked_bytes} locked, and not {locked_bytes}")


def _check_references_locked(family: Sequence[MemoryManager]) -> None:
    # Of private frames the family knows every holder; of an arena's others (shared memory) it does
    # not.
    arena = family[0].arena
    is_whole = len(family) > 1
    edges: list[tuple[int, _Holders]] = []
    for start, end, pma in itertools.chain.from_iterable(one.pmas for one in family):
        if pma.file is arena:
            is_sole = pma.private and not pma.need_cow
            is_exact = is_sole or (pma.private and is_whole)
            fr = pma.file_range(start, end)
            edges += _both_edges(fr, (1, 0, int(is_sole), int(is_exact)))
    for one in family:
        for made in one.pins:
            for _, file, fr in made.ranges:
                if file is arena:
                    edges += _both_edges(fr, (0, 1, 0, 0))
    for start, end, (pmas, pins, sole, exact) in _runs(edges):
        where = f"the frame at {start:#x}"
        _require(not sole or pmas == 1, f"{where} is one mm's alone, and {pmas} pmas have it")
        at = start
        for used_start, used_end, count in arena.ref_counts(FileRange(start, end)):
            _require(used_start == at, f"the frame at {at:#x} is free")
            _require(
                count == pmas + pins if exact else count >= pmas + pins,
                f"the frame at {at:#x} has {count} references: {pmas} pmas and {pins} pins hold it",
            )
            at = used_end
        _require(at == end, f"the frame at {at:#x} is free")


def _both_edges(fr: FileRange, holders: _Holders) -> list[tuple[int, _Holders]]:
    pmas, pins, sole, exact = holders
    return [(fr.start, holders), (fr.end, (-pmas, -pins, -sole, -exact))]


def _runs(edges: list[tuple[int, _Holders]]) -> Iterator[tuple[int, int, _Holders]]:
    # (start, end, holders) of every stretch that somebody holds.
    pmas = pins = sole = exact = last = 0
    for at, more in sorted(edges):
        if last < at and (pmas or pins):
            yield last, at, (pmas, pins, sole, exact)
        pmas, pins, sole, exact = (
            pmas + more[0], pins + more[1], sole + more[2], exact + more[3],
        )  # fmt: skip
        last = at


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
