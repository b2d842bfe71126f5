"""What may happen: every operation of a memory manager, accesses by CPU and host, forks, ends.

A rule is a function of the world and of arguments from domains. It does one thing to a memory
manager and to its model, and compares what both say. Hypothesis and the seeded driver use the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import advice
from tests.model.backends import CODE
from tests.model.domains import Between, Domain, Either, OneOf
from tests.model.memory import PAGE
from tests.model.model import cuts
from tests.model.world import FILE_PAGES, MAX_MEMBERS, Member, Pinned, World

if TYPE_CHECKING:
    from collections.abc import Callable

BIG = 1 << 52
"""Pages: an address space, and it wraps."""
WHO = Between(0, MAX_MEMBERS - 1)
AT = Either(Between(0, 95), Between(96, 250), Between(96, 250), Between(96, 150))
COUNT = Either(
    Between(1, 4), Between(1, 4), Between(1, 24), Between(1, 24), Between(1, 1100),
    OneOf(*[1] * 15, 0, BIG),
)  # fmt: skip
FEW = Either(Between(1, 4), Between(0, 24))
SKEW = OneOf(*[0] * 60, 1, 2048)
PERMS = OneOf(*[READ_WRITE] * 4, 7, 5, *range(8))
MAX_PERMS = OneOf(*[7] * 20, READ, READ_WRITE, WRITE, 0)
OFFSET = Either(Between(0, 16), Between(PAGE - 16, PAGE - 1), Between(0, PAGE - 1))
LENGTH = Either(OneOf(1, 2, 4, 8), OneOf(1, 2, 4, 8), Between(1, 40), OneOf(4096, 5000, 9000))
SEED = Between(1, 255)
FLAG = OneOf(False, True)
SELDOM = OneOf(*[False] * 9, True)
LOCK = OneOf(*[None] * 8, 0, 1, 2)
PATTERN = bytes(range(256)) * 40


class Rule:
    """A rule: its name, function, domains, weight, and when it makes sense."""

    def __init__(
        self, act: Callable[..., None], weight: int, when: Callable[[World], bool],
        domains: dict[str, Domain],
    ) -> None:  # fmt: skip
        self.name = act.__name__
        self.act = act
        self.weight = weight
        self.when = when
        self.domains = domains


RULES: list[Rule] = []


def rule(
    weight: int = 1, when: Callable[[World], bool] = lambda world: bool(world.members),
    **domains: Domain,
) -> Callable[[Callable[..., None]], Callable[..., None]]:  # fmt: skip
    def register(act: Callable[..., None]) -> Callable[..., None]:
        RULES.append(Rule(act, weight, when, domains))
        return act

    return register


# ---- mappings ----


@rule(
    12, who=WHO, at=AT, count=COUNT, perms=PERMS, max_perms=MAX_PERMS,
    kind=OneOf("anonymous", "anonymous", "file", "file", "read_only", "shared"), private=FLAG,
    index=Either(Between(0, 3), Between(0, FILE_PAGES + 2)),
    how=OneOf(*["hint", "fixed", "replace", "replace", "replace", "no_replace", "none"] * 3, "low",
              "bad"),
    lock=LOCK, skew=SKEW, grows_down=SELDOM, stack=SELDOM, pure_data=FLAG,
    populate=OneOf("", "", "", "populate", "require_populate"), name=OneOf("", "", "a"),
)  # fmt: skip
def mmap(
    w: World, who: int, at: int, count: int, perms: int, max_perms: int, kind: str, private: bool,
    index: int, how: str, lock: int | None, skew: int, populate: str, name: str, **flags: bool,
) -> None:  # fmt: skip
    m = w.member(who)
    addr = w.page(m, at) * PAGE + skew if how != "none" else 0
    options: dict[str, Any] = {
        "addr": addr, "private": private, "max_perms": max_perms, "name": name, "lock_mode": lock,
        "offset": index * PAGE + (1 if skew == 1 else 0), **flags,
        **{
            "fixed": {"fixed": True}, "replace": {"fixed": True, "replace": True},
            "no_replace": {"fixed": True, "no_replace": True}, "low": {"low_32bit": True},
            "bad": {"replace": True},
        }.get(how, {}),
    }  # fmt: skip
    if populate == "require_populate":
        options[populate] = True
    backing = None if kind == "anonymous" else getattr(w.memory, kind)
    n_bytes = count * PAGE - (skew if count else 0)
    more = {"populate": populate == "populate"}
    w.map(m, n_bytes, perms, more, backing=backing, **options)


@rule(who=WHO)
def map_stack(w: World, who: int) -> None:
    m = w.member(who)
    w.agree(m.mm.map_stack, m.model.map_stack)


@rule(3, who=WHO, at=AT, count=COUNT, skew=SKEW)
def munmap(w: World, who: int, at: int, count: int, skew: int) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE
    w.agree(lambda: m.mm.munmap(*args), lambda: m.model.munmap(*args))


@rule(4, who=WHO, at=AT, count=COUNT, skew=SKEW, perms=PERMS, grows_down=SELDOM)
def mprotect(
    w: World, who: int, at: int, count: int, skew: int, perms: int, grows_down: bool
) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE, perms
    w.agree(
        lambda: m.mm.mprotect(*args, grows_down=grows_down),
        lambda: m.model.mprotect(*args, grows_down=grows_down),
    )


@rule(
    5, who=WHO, at=AT, old=FEW, new=Either(FEW, COUNT), skew=SKEW, may_move=FLAG,
    goal=Either(OneOf(None), AT), goal_skew=SKEW,
)  # fmt: skip
def mremap(
    w: World, who: int, at: int, old: int, new: int, skew: int, may_move: bool, goal: int | None,
    goal_skew: int,
) -> None:  # fmt: skip
    m = w.member(who)
    new_addr = None if goal is None else w.page(m, goal) * PAGE + goal_skew
    args = w.page(m, at) * PAGE + skew, old * PAGE, new * PAGE
    w.agree(
        lambda: m.mm.mremap(*args, may_move=may_move, new_addr=new_addr),
        lambda: m.model.mremap(*args, may_move=may_move, new_addr=new_addr),
    )


@rule(2, who=WHO, pages=Between(-3, 30), skew=OneOf(0, 1, 2048, 4095))
def brk(w: World, who: int, pages: int, skew: int) -> None:
    m = w.member(who)
    addr = max(m.model.brk_start + pages * PAGE + skew, 0)
    w.agree(lambda: m.mm.brk(addr), lambda: m.model.brk(addr))


@rule(who=WHO, at=AT, skew=OneOf(0, 0, 1, 2048))
def set_brk(w: World, who: int, at: int, skew: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + skew
    w.agree(lambda: m.mm.set_brk(addr), lambda: m.model.set_brk(addr))


# ---- what is said of them ----


@rule(
    5, who=WHO, at=AT, count=COUNT, skew=SKEW,
    value=OneOf(*[advice.MADV_DONTNEED] * 6, *[advice.MADV_DONTFORK] * 3,
                *[advice.MADV_DOFORK] * 2, 0, 3, 8, 9, 14, 100, 77),
)  # fmt: skip
def madvise(w: World, who: int, at: int, count: int, skew: int, value: int) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE, value
    w.agree(lambda: m.mm.madvise(*args), lambda: m.model.madvise(*args))


@rule(2, who=WHO, at=AT, count=COUNT, skew=OneOf(0, 0, 1, 4095), mode=Between(0, 2))
def mlock(w: World, who: int, at: int, count: int, skew: int, mode: int) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE, mode
    w.agree(lambda: m.mm.mlock(*args), lambda: m.model.mlock(*args))


@rule(who=WHO, current=FLAG, future=FLAG, mode=Between(0, 2))
def mlockall(w: World, who: int, current: bool, future: bool, mode: int) -> None:
    m = w.member(who)
    args = {"current": current, "future": future, "mode": mode}
    w.agree(lambda: m.mm.mlockall(**args), lambda: m.model.mlockall(**args))  # type: ignore[arg-type]


@rule(
    who=WHO, what=OneOf("address_space_bytes", "data_bytes", "locked_bytes", "may_lock_all"),
    pages=OneOf(BIG, BIG, 0, 4, 60, 1200),
)  # fmt: skip
def limits_change(w: World, who: int, what: str, pages: int) -> None:
    m = w.member(who)
    for limits in (m.mm.limits, m.model.limits):
        setattr(limits, what, pages > 4 if what == "may_lock_all" else pages * PAGE)


@rule(who=WHO, at=AT, count=COUNT, skew=SKEW)
def mincore(w: World, who: int, at: int, count: int, skew: int) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE
    w.agree(lambda: m.mm.mincore(*args), lambda: m.model.mincore(*args))


@rule(who=WHO, at=AT, count=COUNT, skew=SKEW, sync=FLAG, async_=SELDOM, invalidate=FLAG)
def msync(w: World, who: int, at: int, count: int, skew: int, **flags: bool) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE
    w.agree(lambda: m.mm.msync(*args, **flags), lambda: m.model.msync(*args, **flags))


@rule(2, who=WHO, at=AT, count=COUNT, skew=SKEW, name=OneOf("n", "n", None, "[no]"))
def set_anon_name(
    w: World, who: int, at: int, count: int, skew: int, name: str | None
) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE, name
    w.agree(lambda: m.mm.set_anon_name(*args), lambda: m.model.set_anon_name(*args))


# ---- what a CPU does ----


@rule(7, who=WHO, at=AT, offset=OFFSET, length=LENGTH)
def cpu_loads(w: World, who: int, at: int, offset: int, length: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    fault = m.model.reach(addr, length, READ)
    data, error = w.attempt(lambda: w.backend.load(m.mm, addr, length))
    w.same_fault(error, fault)
    assert fault is not None or m.model.sees(addr, data), f"{data.hex()} at {addr:#x}"


@rule(9, who=WHO, at=AT, offset=OFFSET, length=LENGTH, seed=SEED)
def cpu_stores(w: World, who: int, at: int, offset: int, length: int, seed: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    data = PATTERN[seed : seed + m.model.tail_bytes(addr, length)]
    if not data:
        return
    fault = m.model.reach(addr, len(data), WRITE)
    _, error = w.attempt(lambda: w.backend.store(m.mm, addr, data))
    w.same_fault(error, fault)
    done = len(data) if fault is None else fault.done
    is_plain = len(data) in {1, 2, 4, 8}
    if fault is None or not (is_plain and w.backend.is_atomic):
        m.model.write(addr, data[:done])
    if fault is not None and is_plain and not done and w.backend.is_torn:
        _may_be_torn(m, addr, data)


def _may_be_torn(m: Member, addr: int, data: bytes) -> None:
    # Refused at its first page; what lies in the second may be there, if that could be written.
    n_first = PAGE - addr % PAGE
    rest = addr + n_first
    model = m.model
    if n_first >= len(data) or model.reach(rest, 1, WRITE) is not None:
        return
    kind = model.kinds[rest // PAGE]
    if kind.backing is not None:
        if kind.private and rest // PAGE not in model.own:
            return  # a file's own page: no CPU may write it
        if not kind.private:
            model.memory.will_change(kind.backing.store, rest // PAGE + kind.delta)
    model.own_cell(rest // PAGE).may_write(0, data[n_first:])


@rule(3, who=WHO, at=AT, offset=OFFSET)
def cpu_fetches(w: World, who: int, at: int, offset: int) -> None:
    """What is run is put there before, as a debugger would."""
    m = w.member(who)
    addr = w.page(m, at) * PAGE + min(offset, PAGE - len(CODE))
    fault = m.model.reach(addr, len(CODE), EXECUTE)
    if fault is None:
        is_writable = m.model.reach(addr, len(CODE), WRITE, ignore=True) is None
        if not is_writable or m.model.tail_bytes(addr, len(CODE)) < len(CODE):
            return
        m.mm.copy_out(addr, CODE, ignore_permissions=True)
        m.model.write(addr, CODE)
    _, error = w.attempt(lambda: w.backend.fetch(m.mm, addr))
    w.same_fault(error, fault)


# ---- what the host does ----


@rule(4, who=WHO, at=AT, offset=OFFSET, length=Either(OneOf(0), LENGTH), ignore=FLAG)
def host_reads(w: World, who: int, at: int, offset: int, length: int, ignore: bool) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    fault = m.model.reach(addr, length, READ, ignore=ignore)
    dst = bytearray(b"\xee" * length)
    n_bytes, error = w.attempt(lambda: m.mm.copy_in(addr, dst, ignore_permissions=ignore))
    w.same_fault(error, fault, exact=True)
    assert fault is not None or n_bytes == length
    done = length if fault is None else fault.done
    assert m.model.sees(addr, bytes(dst[:done]))
    assert dst[done:] == b"\xee" * (length - done)


@rule(4, who=WHO, at=AT, offset=OFFSET, length=Either(OneOf(0), LENGTH), seed=SEED, ignore=FLAG)
def host_writes(
    w: World, who: int, at: int, offset: int, length: int, seed: int, ignore: bool
) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    data = PATTERN[seed : seed + m.model.tail_bytes(addr, length)]
    _host_writes(
        w, m, addr, data, lambda: m.mm.copy_out(addr, data, ignore_permissions=ignore), ignore
    )


@rule(2, who=WHO, at=AT, offset=OFFSET, length=Either(LENGTH, OneOf(150_000)), ignore=FLAG)
def host_zeroes(w: World, who: int, at: int, offset: int, length: int, ignore: bool) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    n_bytes = m.model.tail_bytes(addr, length)
    _host_writes(
        w, m, addr, bytes(n_bytes),
        lambda: m.mm.zero_out(addr, n_bytes, ignore_permissions=ignore), ignore,
    )  # fmt: skip


def _host_writes(
    w: World, m: Member, addr: int, data: bytes, act: Callable[[], int], ignore: bool
) -> None:
    fault = m.model.reach(addr, len(data), WRITE, ignore=ignore)
    n_bytes, error = w.attempt(act)
    w.same_fault(error, fault, exact=True)
    assert fault is not None or n_bytes == len(data)
    m.model.write(addr, data[: len(data) if fault is None else fault.done])


@rule(2, who=WHO, at=AT, count=FEW)
def populate(w: World, who: int, at: int, count: int) -> None:
    m = w.member(who)
    page = w.page(m, at)
    done = w.agree(
        lambda: m.mm.populate(page * PAGE, count * PAGE) or True,
        lambda: m.model.populate(page * PAGE, count * PAGE) or True,
    )
    assert not done or all(
        m.mm.address_space.is_mapped(p * PAGE, READ) for p in range(page, page + count)
    )


@rule(who=WHO)
def map_resident(w: World, who: int) -> None:
    w.member(who).mm.map_resident()


@rule(
    2, when=lambda world: bool(world.members) and len(world.pins) < 4, who=WHO, at=AT,
    offset=OFFSET, length=LENGTH, access=OneOf(READ, WRITE, READ_WRITE),
)  # fmt: skip
def pins(w: World, who: int, at: int, offset: int, length: int, access: int) -> None:
    m = w.member(who)
    addr = w.page(m, at) * PAGE + offset
    made: list[Any] = []

    def pin() -> bool:
        made.append(m.mm.pin(addr, length, access))
        return made[-1].error is None

    def model() -> bool:
        kept, is_all = m.model.pinned(addr, length, access)
        made.append(kept)
        return is_all

    w.agree(pin, model)
    if len(made) == 2:
        w.pins.append(Pinned(made[1], made[0], access))
        w.check_pin(w.pins[-1])


@rule(2, when=lambda world: bool(world.pins), which=Between(0, 3))
def unpins(w: World, which: int) -> None:
    w.pins.pop(which % len(w.pins)).pin.release()


@rule(2, when=lambda world: bool(world.pins), which=Between(0, 3), page=Between(0, 3), seed=SEED)
def device_writes(w: World, which: int, page: int, seed: int) -> None:
    """What it writes into pinned frames is seen behind the addresses that were pinned."""
    pinned = w.pins[which % len(w.pins)]
    page %= len(pinned.frames)
    (file, fo), (cell, store, index) = pinned.frames[page], pinned.kept[page]
    if not pinned.access & WRITE:
        return
    data = PATTERN[seed : seed + 100]
    if store is not None and not store.is_memory and store.size_bytes < index * PAGE + 100:
        return
    assert file.write_from(fo, memoryview(data)) == len(data)
    if store is not None and (cell is None or store.cells.get(index) is cell):
        w.memory.write_store(store, index, 0, data)
    elif cell is not None:
        cell.write(0, data)


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

