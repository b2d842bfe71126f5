"""Rules: what a guest does to its mappings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.mm import advice
from tests.model.domains import Between, Either, OneOf
from tests.model.memory import PAGE
from tests.model.rule import (
    AT,
    BIG,
    COUNT,
    FEW,
    FLAG,
    LOCK,
    MAX_PERMS,
    PERMS,
    SELDOM,
    SKEW,
    WHO,
    rule,
)
from tests.model.world import FILE_PAGES

if TYPE_CHECKING:
    from tests.model.world import World


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
def set_anon_name(w: World, who: int, at: int, count: int, skew: int, name: str | None) -> None:
    m = w.member(who)
    args = w.page(m, at) * PAGE + skew, count * PAGE, name
    w.agree(lambda: m.mm.set_anon_name(*args), lambda: m.model.set_anon_name(*args))
