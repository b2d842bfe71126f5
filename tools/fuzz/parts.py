"""The other types in C that copies are made of: how each is called, apart from a memory manager."""
# ruff: noqa: ANN401, S101 - arguments are of any type; who calls looks for AssertionError

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmmm.errors import KvmmmError, StateError
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.safemem import ffi

from .disturb import place
from .entries import Call
from .hostile import HostileError, Index, Truth
from .world import MAX_ADDR, PLAIN, SOLID_PAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.mm import MemoryManager

    from .draw import Draw

_PAGES = (0, 1, PAGE_BYTES, PLAIN, PLAIN + PAGE_BYTES, MAX_ADDR, MAX_ADDR + PAGE_BYTES, 1 << 64, -1)


def _type(name: str) -> Any:
    # AttributeError where it is not there: then there is nothing to call.
    return getattr(ffi, name)


def _options(d: Draw) -> Call:
    rng = d.rng
    values = (True, False, None, 0, "x", Truth())
    options: dict[str, Any] = {
        name: rng.choice(values)
        for name in rng.sample(("ignore_permissions", "address_space_active", "nonsense"), 2)
    }
    if rng.random() < 0.5:
        options["mechanism"] = rng.choice((None, "walk", "mirror", "internal", "", "x", 5, b"walk"))
    return Call(_type("IOOpts"), options=options)


def _forget(d: Draw) -> Call:
    mm = d.mm()
    if d.rng.random() < 0.7:
        start, n_bytes = place(d.rng)
        return Call(_forget_alone, mm, start, start + n_bytes)
    return Call(_forget_alone, mm, d.rng.choice((*_PAGES, None, 1.5)), d.rng.choice(_PAGES))


def _forget_alone(mm: MemoryManager, start: Any, end: Any) -> None:
    # It waits for copies, and one thread may at a time.
    with mm.active_lock:
        mm.forget(start, end)


def _frames(d: Draw) -> Call:
    # Only what must be refused: an entry that is wrong would give away somebody's frame.
    mm, rng = d.mm(), d.rng
    start, n_bytes = place(rng)
    good = [start, start + n_bytes, 0, 0]
    good[rng.randrange(3)] = rng.choice((1, 4095, 1 << 46, 1 << 63, -1, (1 << 64) + 1))
    if rng.random() < 0.5:
        return Call(mm.fill_frames, *good)
    return Call(mm.frames, rng.choice((start, *_PAGES)), rng.choice((start + n_bytes, *_PAGES)))


def _inside(d: Draw) -> Call:
    return Call(_be_inside, d.mm(), d)


def _be_inside(mm: MemoryManager, d: Draw) -> str:
    # What a Reader or Writer may do: copy what is there; anything else is refused, not waited for.
    warm = d.rng.random() < 0.5
    if warm:
        with suppress(KvmmmError):
            mm.read(PLAIN, 64)
    token = mm.enter_copy()
    try:
        for _ in range(d.rng.randrange(4)):
            with suppress(KvmmmError, OSError):
                mm.read(d.near(), d.rng.choice((8, 5000, 70_000)))
            try:
                mm.munmap(PLAIN, PAGE_BYTES)
            except StateError:
                continue
            raise AssertionError("munmap from inside a Reader was served")
        for wrong in d.rng.sample((None, "x", 7, -1, 1 << 70, 2), 2):
            with suppress(TypeError, ValueError, OverflowError, RuntimeError):
                mm.leave_copy(wrong)  # type: ignore[arg-type]
                raise AssertionError(f"leave_copy({wrong}) was served")
    finally:
        mm.leave_copy(token)
    return "left"


def _leave(d: Draw) -> Call:
    return Call(d.mm().leave_copy, d.rng.choice((0, 1, 2, -1, None, "x", 1 << 70)))


def _lock(d: Draw) -> Call:
    lock_type, mm, rng = _type("GuardedLock"), d.mm(), d.rng
    kind = rng.randrange(4)
    if kind == 0:
        return Call(lock_type, *rng.choice(((), (None,), (5,), (mm, mm), (mm,))))
    lock = lock_type.__new__(lock_type) if kind == 1 else lock_type(mm)
    return Call(_use_lock, lock, rng.choice((True, False, None, Truth(), 5)))


def _use_lock(lock: Any, blocking: object) -> None:
    lock.locked()
    with suppress(RuntimeError):
        lock.release()
        raise AssertionError("a lock was released that nobody has")
    if lock.acquire(blocking):
        assert lock.locked()
        assert not lock.acquire(False)
        lock.release()
    with lock:
        assert lock.locked()
    assert not lock.locked()


def _walk(d: Draw) -> Call:
    walk: Any = d.mm().walk
    if d.rng.random() < 0.2:
        walk = _type("PageWalk").__new__(_type("PageWalk"))
    access = d.rng.choice((0, 1, 2, 3, 4, 7, 1 << 31, 1 << 40, -1, None))
    return Call(walk.find, d.addr(), d.length(), access)


def _pinned(d: Draw) -> Call:
    rng, fd = d.rng, d.world.solid_fd
    pieces: list[Any] = []
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        first = rng.randrange(SOLID_PAGES)
        n_pages = rng.randint(1, SOLID_PAGES - first)
        pieces.append((fd, first * PAGE_BYTES, n_pages * PAGE_BYTES))
    kind = rng.random()
    if kind < 0.3:
        wrong = (
            (-1, 0, PAGE_BYTES), (fd, 1, PAGE_BYTES), (fd, 0, 0), (fd, 0, 1 << 62), (fd, 0),
            (fd, -PAGE_BYTES, PAGE_BYTES), None, (fd, 0, 1 << 63), (10_000, 0, PAGE_BYTES),
        )  # fmt: skip
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(wrong))
    elif kind < 0.4:
        pieces.insert(0, (Index(fd, pieces.clear, "clears"), 0, PAGE_BYTES))
    elif kind < 0.45:
        pieces = rng.choice((tuple(pieces), None, 5))  # type: ignore[arg-type]
    on_release = rng.choice((_nothing, _raise, None, 5))
    return Call(_use_pinned, pieces, on_release, rng.choice((True, False)))


def _use_pinned(pieces: Any, on_release: Any, writable: bool) -> None:
    window = _type("PinnedWindow")(
        pieces, on_release if callable(on_release) else _nothing, writable
    )
    view = memoryview(window)
    del window
    assert view.readonly == (not writable)
    total = sum(n for _, _, n in pieces)
    assert len(view) == total or not pieces, f"{len(view)} bytes, and not {total}"
    view[0], view[-1]


def _nothing(_is_collected: bool) -> None:
    pass


def _raise(_is_collected: bool) -> None:
    raise HostileError("on release")


PARTS: dict[str, tuple[int, Callable[[Draw], Call]]] = {
    "IOOpts": (2, _options),
    "forget": (2, _forget),
    "frame table": (2, _frames),
    "inside a Reader": (2, _inside),
    "leave": (1, _leave),
    "GuardedLock": (2, _lock),
    "PageWalk": (3, _walk),
    "PinnedWindow": (2, _pinned),
}
"""By name: how often, and what makes one."""
