"""Rules: files that change, forks, ends, and address spaces that forget."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import WRITE
from kvmmm.hostarch.ranges import AddrRange
from tests.model.domains import Between, OneOf
from tests.model.memory import PAGE
from tests.model.model import cuts
from tests.model.rule import AT, BIG, FLAG, PATTERN, SEED, WHO, rule
from tests.model.world import FILE_PAGES, MAX_MEMBERS

if TYPE_CHECKING:
    from tests.model.world import World


# ---- files ----


@rule(2, pages=Between(0, FILE_PAGES + 6), tail=OneOf(0, 0, 0, 1, 2048))
def truncate(w: World, pages: int, tail: int) -> None:
    w.file.truncate(pages * PAGE + tail)
    w.read_only.revalidate()
    w.memory.truncate(pages * PAGE + tail)


@rule(2, offset=Between(0, FILE_PAGES * PAGE), length=OneOf(1, 40, 5000), seed=SEED)
def somebody_writes_the_file(w: World, offset: int, length: int, seed: int) -> None:
    data = PATTERN[seed : seed + min(length, w.memory.file.store.size_bytes - offset)]
    if offset >= w.memory.file.store.size_bytes:
        return
    assert os.pwrite(w.fd, data, offset) == len(data)
    for at, stop in cuts(offset, len(data)):
        w.memory.write_store(
            w.memory.file.store, at // PAGE, at % PAGE, data[at - offset : stop - offset]
        )


# ---- relatives ----


@rule(4, when=lambda world: 0 < len(world.members) < MAX_MEMBERS, who=WHO)
def fork(w: World, who: int) -> None:
    assert w.fork(w.member(who))


@rule(when=lambda world: len(world.members) < MAX_MEMBERS)
def somebody_else_starts(w: World) -> None:
    w.start()


@rule(2, when=lambda world: len(world.members) > 1, who=WHO)
def ends(w: World, who: int) -> None:
    w.end(w.member(who))


@rule(3, who=WHO, at=AT, count=OneOf(1, 2, 600, BIG), at_2=AT)
def translations_are_dropped(w: World, who: int, at: int, count: int, at_2: int) -> None:
    """An address space may forget: it is a cache."""
    m = w.member(who)
    ranges = [
        AddrRange(page * PAGE, min(page + count, m.model.n_pages) * PAGE)
        for page in sorted({w.page(m, at), w.page(m, at_2)})
    ]
    if count > 1:
        del ranges[1:]
    w.backend.forget(m.mm, ranges)


@rule(2, who=WHO, at=AT, offset=Between(0, PAGE - 8), seed=SEED, n_left=Between(0, 3), by_cpu=FLAG)
def writes_with_little_left(
    w: World, who: int, at: int, offset: int, seed: int, n_left: int, by_cpu: bool
) -> None:
    m = w.member(who)
    addr, data = w.page(m, at) * PAGE + offset, PATTERN[seed : seed + 8]
    if m.model.reach(addr, 8, WRITE) is not None or m.model.tail_bytes(addr, 8) < 8:
        return
    with w.hoarding(n_left):
        try:
            if by_cpu:
                w.backend.store(m.mm, addr, data)
            else:
                m.mm.copy_out(addr, data)
        except ArenaExhaustedError:
            return
    m.model.write(addr, data)


@rule(when=lambda world: 0 < len(world.members) < MAX_MEMBERS, who=WHO, n_left=Between(0, 8))
def forks_with_little_left(w: World, who: int, n_left: int) -> None:
    with w.hoarding(n_left):
        w.fork(w.member(who))
