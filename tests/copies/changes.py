"""Changes of memory between copies: the same to every subject, and to the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import READ, WRITE
from kvmmm.mm.advice import MADV_DONTNEED
from tests.copies.draw import pattern
from tests.copies.world import DisagreementError
from tests.model.memory import PAGE
from tests.model.model import cuts

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.copies.world import Subject, World
    from tests.model.model import Fault
    from tests.model.operations import ModelMm

MAX_MEMBERS = 2
CHANGES: dict[str, Callable[..., None]] = {}


def change(act: Callable[..., None]) -> Callable[..., None]:
    CHANGES[act.__name__] = act
    return act


# ---- mappings ----


@change
def maps(
    w: World, who: int, page: int, n: int, perms: int, name: str, private: bool, index: int,
    stack: bool,
) -> None:  # fmt: skip
    options: dict[str, Any] = {
        "addr": page * PAGE, "fixed": True, "replace": True, "private": private,
        "offset": index * PAGE, "stack": stack,
    }  # fmt: skip
    backing = w.memory.backing(name)
    w.agree(
        lambda s: s.mm(who).mmap(n * PAGE, perms, mappable=s.mappables.get(name), **options),
        lambda: w.model(who).mmap(n * PAGE, perms, backing=backing, **options),
    )


@change
def scatters(w: World, who: int, pages: list[int], perms: int) -> None:
    """Page by page, each backed before the next comes: frames in that order."""
    for page in pages:
        options: dict[str, Any] = {"addr": page * PAGE, "fixed": True, "replace": True}
        w.agree(
            lambda s, options=options: s.mm(who).mmap(PAGE, perms, populate=True, **options),
            lambda options=options: w.model(who).mmap(PAGE, perms, **options),
        )


@change
def unmaps(w: World, who: int, page: int, n: int) -> None:
    w.agree(
        lambda s: s.mm(who).munmap(page * PAGE, n * PAGE),
        lambda: w.model(who).munmap(page * PAGE, n * PAGE),
    )


@change
def protects(w: World, who: int, page: int, n: int, perms: int) -> None:
    w.agree(
        lambda s: s.mm(who).mprotect(page * PAGE, n * PAGE, perms),
        lambda: w.model(who).mprotect(page * PAGE, n * PAGE, perms),
    )


@change
def moves(w: World, who: int, page: int, n: int, n_new: int, to: int | None) -> None:
    new_addr = None if to is None else to * PAGE
    w.agree(
        lambda s: s.mm(who).mremap(
            page * PAGE, n * PAGE, n_new * PAGE, may_move=True, new_addr=new_addr
        ),
        lambda: w.model(who).mremap(
            page * PAGE, n * PAGE, n_new * PAGE, may_move=True, new_addr=new_addr
        ),
    )


@change
def empties(w: World, who: int, page: int, n: int) -> None:
    w.agree(
        lambda s: s.mm(who).madvise(page * PAGE, n * PAGE, MADV_DONTNEED),
        lambda: w.model(who).madvise(page * PAGE, n * PAGE, MADV_DONTNEED),
    )


@change
def populates(w: World, who: int, page: int, n: int) -> None:
    model = w.model(who)
    if any(map(model.is_behind, model.within(page, page + n))):
        return  # what is backed already it does not touch
    w.agree(
        lambda s: s.mm(who).populate(page * PAGE, n * PAGE),
        lambda: w.model(who).populate(page * PAGE, n * PAGE),
    )


@change
def maps_resident(w: World, who: int) -> None:
    w.agree(lambda s: s.mm(who).map_resident(), lambda: None)


@change
def forks(w: World, who: int) -> None:
    if len(w.models) < MAX_MEMBERS:
        w.agree(lambda s: s.fork(who), lambda: w.models.append(w.model(who).fork()))


@change
def ends(w: World, who: int) -> None:
    if len(w.models) > 1:
        w.agree(lambda s: s.end(who), lambda: w.models.pop(who % len(w.models)).close())


# ---- files ----


@change
def truncates(w: World, size_bytes: int) -> None:
    """Everybody is told: copies of what is cut off go as well."""

    def real(s: Subject) -> None:
        s.mappables["/file"].truncate(size_bytes)
        s.mappables["/read-only"].revalidate()

    w.agree(real, lambda: w.memory.resize(w.memory.file, size_bytes))


@change
def cuts_quietly(w: World, size_bytes: int, told: bool) -> None:
    """Of a file that is mapped shared only; nobody is told, or after it has happened."""

    def real(s: Subject) -> None:
        os.ftruncate(s.fds["/cut"], size_bytes)
        if told:
            s.mappables["/cut"].revalidate()
            s.mappables["/cut-read-only"].revalidate()

    w.agree(real, lambda: w.memory.resize(w.memory.cut, size_bytes))


@change
def cuts_brief(w: World, size_bytes: int) -> None:
    """Of a file that is mapped privately, and that nobody has written to yet."""
    if w.is_brief_cut or w.memory.brief.is_copied:
        return
    w.is_brief_cut = True
    w.agree(
        lambda s: os.ftruncate(s.fds["/brief"], size_bytes),
        lambda: w.memory.resize(w.memory.brief, size_bytes),
    )


@change
def somebody_writes(w: World, name: str, offset: int, n_bytes: int, seed: int) -> None:
    """To a file, by a system call."""
    backing = w.memory.backing(name)
    assert backing is not None
    data = pattern(seed, max(min(n_bytes, backing.store.size_bytes - offset), 0))
    w.agree(lambda s: os.pwrite(s.fds[name], data, offset) or None, lambda: None)
    for at, stop in cuts(offset, len(data)):
        part = data[at - offset : stop - offset]
        w.memory.write_store(backing.store, at // PAGE, at % PAGE, part)


# ---- what a CPU does ----


@change
def cpu_loads(w: World, who: int, addr: int, n_bytes: int) -> None:
    model = w.model(who)
    if _is_cut(model, addr):
        return
    fault = model.reach(addr, n_bytes, READ)
    for s in w.subjects:
        data, error = _by_cpu(lambda s=s: w.backend.load(s.mm(who), addr, n_bytes))
        _same_fault(w, s, error, fault)
        if fault is None and not model.sees(addr, data):
            raise DisagreementError(f"{s.mechanism}: a CPU loads {data!r} at {addr:#x}")


@change
def cpu_stores(w: World, who: int, addr: int, n_bytes: int, seed: int) -> None:
    model = w.model(who)
    data = pattern(seed, n_bytes)
    if _is_cut(model, addr) or model.tail_bytes(addr, n_bytes) < n_bytes:
        return
    fault = model.reach(addr, n_bytes, WRITE)
    for s in w.subjects:
        _, error = _by_cpu(lambda s=s: w.backend.store(s.mm(who), addr, data))
        _same_fault(w, s, error, fault)
    if fault is None:
        model.write(addr, data)


def _is_cut(model: ModelMm, addr: int) -> bool:
    # Behind a file's end no CPU of ours can go on: what it is told depends on the host.
    return addr // PAGE in model.kinds and model.is_behind(addr // PAGE)


def _by_cpu(access: Callable[[], Any]) -> tuple[Any, GuestFaultError | None]:
    try:
        return access(), None
    except GuestFaultError as e:
        return None, e


def _same_fault(w: World, s: Subject, error: GuestFaultError | None, fault: Fault | None) -> None:
    if (error is None) != (fault is None):
        raise DisagreementError(f"{s.mechanism}: a CPU gets {error!r} instead of {fault!r}")
    if error is None or fault is None:
        return
    got, want = error.addr, fault.addr
    if not w.backend.has_exact_faults:
        got, want = got // PAGE, want // PAGE
    if (got, type(error), error.mapped) != (want, fault.kind, fault.mapped):
        raise DisagreementError(f"{s.mechanism}: a CPU gets {error!r} instead of {fault!r}")
