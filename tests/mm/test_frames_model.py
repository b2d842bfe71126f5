"""The frame table under random copies and operations: it follows the pmas."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestFaultError, MmError
from kvmmm.hostarch.access import ANY_ACCESS, NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm.advice import MADV_DONTNEED
from kvmmm.mm.debug import check_invariants
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family, Process

START = 8 * HUGE
N_PAGES = 64
PAGES = st.integers(0, N_PAGES - 1)
SPANS = st.integers(1, 20)
PERMS = st.sampled_from([NO_ACCESS, READ, READ_WRITE, ANY_ACCESS, WRITE])
WHO = st.integers(0, 2)
KINDS = st.sampled_from(["anonymous", "shared", "private of shared", "foreign"])
STEPS = st.one_of(
    st.tuples(st.just("copy"), WHO, PAGES, SPANS, st.sampled_from(["in", "out", "zero"]),
              st.booleans()),
    st.tuples(st.just("cpu"), WHO, PAGES, SPANS, st.booleans()),
    st.tuples(st.just("map"), WHO, PAGES, SPANS, PERMS, KINDS),
    st.tuples(st.just("unmap"), WHO, PAGES, SPANS),
    st.tuples(st.just("protect"), WHO, PAGES, SPANS, PERMS),
    st.tuples(st.just("move"), WHO, PAGES, SPANS, st.integers(1, 24)),
    st.tuples(st.just("drop"), WHO, PAGES, SPANS),
    st.tuples(st.just("invalidate"), WHO, PAGES, SPANS, st.booleans()),
    st.tuples(st.just("pin"), WHO, PAGES, SPANS, st.sampled_from([READ, READ_WRITE])),
    st.tuples(st.just("fork"), WHO),
    st.tuples(st.just("end"), WHO),
)  # fmt: skip


class Sequence:
    """A family under random operations; what is refused, is."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.shared = SharedMemory(family.arena, N_PAGES * PAGE)
        self.file = FakeMappable(FakeFile(N_PAGES * PAGE))

    def step(self, name: str, who: int, *rest: Any) -> None:
        one = self.family.members[who % len(self.family.members)]
        if name in ("fork", "end"):
            getattr(self, name)(one)
            return
        page, n, *more = rest
        n_bytes = min(n, N_PAGES - page) * PAGE
        with contextlib.suppress(GuestFaultError, MmError, ArenaExhaustedError):
            getattr(self, name)(one, START + page * PAGE, n_bytes, *more)

    def copy(self, one: Process, addr: int, n: int, how: str, ignores: bool) -> None:
        if how == "in":
            one.mm.copy_in(addr, bytearray(n), ignore_permissions=ignores)
        elif how == "out":
            one.mm.copy_out(addr, b"c" * n, ignore_permissions=ignores)
        else:
            one.mm.zero_out(addr, n, ignore_permissions=ignores)

    def cpu(self, one: Process, addr: int, n: int, writes: bool) -> None:
        for at in range(addr, addr + n, PAGE):
            if writes:
                one.store(at, b"!")
            else:
                one.load(at, 1)

    def map(self, one: Process, addr: int, n: int, perms: int, kind: str) -> None:
        more: dict[str, Any] = {"offset": addr - START}
        if kind == "anonymous":
            more = {}
        elif kind == "foreign":
            more |= {"mappable": self.file, "private": False}
        else:
            more |= {"mappable": self.shared, "private": kind != "shared"}
        one.map(addr, addr + n, perms, **more)

    def unmap(self, one: Process, addr: int, n: int) -> None:
        one.mm.munmap(addr, n)

    def protect(self, one: Process, addr: int, n: int, perms: int) -> None:
        one.mm.mprotect(addr, n, perms)

    def move(self, one: Process, addr: int, n: int, n_pages: int) -> None:
        one.mm.mremap(addr, n, n_pages * PAGE, may_move=True)

    def drop(self, one: Process, addr: int, n: int) -> None:
        one.mm.madvise(addr, n, MADV_DONTNEED)

    def invalidate(self, one: Process, addr: int, n: int, private: bool) -> None:
        one.mm.invalidate(AddrRange(addr, addr + n), private=private)

    def pin(self, one: Process, addr: int, n: int, access: int) -> None:
        with one.mm.pin_frames(addr, n, access):
            self.check()
            if len(self.family.members) < 3:
                self.family.fork(one)

    def fork(self, one: Process) -> None:
        if len(self.family.members) < 3:
            self.family.fork(one)

    def end(self, one: Process) -> None:
        if len(self.family.members) > 1:
            self.family.end(one)

    def check(self) -> None:
        first, *others = [one.mm for one in self.family.members]
        check_invariants(first, relatives=others)


@settings(max_examples=100)
@given(st.booleans(), st.lists(STEPS, min_size=5, max_size=30))
def test_sequences(walks_frames: bool, steps: list[tuple[Any, ...]]):
    """No entry says more than its pma, or of a page that has none."""
    with Family(Arena(16 << 20), walks_frames=walks_frames) as family:
        sequence = Sequence(family)
        family.first.map(START, START + N_PAGES * PAGE)
        for name, *rest in steps:
            sequence.step(name, *rest)
            sequence.check()
