"""Every operation on vmas, in any order, against a dict of pages: attributes, bytes, accounts."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvmmm.errors import MmError
from kvmmm.mm.advice import MADV_DOFORK, MADV_DONTFORK, MADV_DONTNEED
from kvmmm.mm.vma import Vma
from tests.mm.conftest import Recorder, Setup

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
N_PAGES = 768
HEAP = 600
PAGES = st.integers(16, 39)
COUNTS = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 5, 9])
NAMES = st.sampled_from(["", "a", "b"])
# Errors that leave part of the work done: what is there then is taken over as it is.
PARTIAL = {"mprotect", "mlock", "madvise", "prctl"}


class Page:
    """What a vma says of one page, and the byte in it."""

    def __init__(self, vma: Vma, offset: int | None, byte: int = 0) -> None:
        self.vma = vma
        self.offset = offset
        self.byte = byte

    def key(self) -> tuple[Any, ...]:
        v = self.vma
        return (
            v.perms, v.private, id(v.mappable), self.offset, v.grows_down, v.lock_mode, v.dontfork,
            v.name,
        )  # fmt: skip


class Operations(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.setup = Setup(64 << 20, N_PAGES * PAGE, home=False)
        self.mm = self.setup.mm
        self.memory = Recorder(self.setup.arena, N_PAGES * PAGE)
        self.mm.set_brk(HEAP * PAGE)
        self.mm.limits.locked_bytes = 30 * PAGE
        self.mm.limits.address_space_bytes = 60 * PAGE
        self.pages: dict[int, Page] = {}
        self.mmap(18, 16, 3, "", "anon", replace=True, grows_down=False, lock_mode=0)

    def teardown(self) -> None:
        if hasattr(self, "setup"):
            self.setup.close()
            assert not self.memory._mappings

    def real(self) -> dict[int, Page]:
        found = {}
        for start, end, vma in self.mm.vmas:
            for addr in range(start, end, PAGE):
                offset = addr + vma.delta if vma.mappable is not None else None
                byte = 0
                if vma.mappable is None:
                    byte = self.mm.read(addr, 1, ignore_permissions=True)[0]
                found[addr // PAGE] = Page(vma, offset, byte)
        return found

    def attempt(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Whether it was done, and its answer; what failed must have changed nothing."""
        before = [(start, end, vma.key) for start, end, vma in self.mm.vmas]
        try:
            return True, call()
        except MmError as e:
            if e.operation in PARTIAL:
                real = self.real()
                assert real.keys() == self.pages.keys()
                self.pages = real
            else:
                assert before == [(start, end, vma.key) for start, end, vma in self.mm.vmas]
            return False, e

    @rule(
        page=PAGES, count=st.integers(1, 8), perms=st.integers(0, 7), name=NAMES,
        kind=st.sampled_from(["anon", "anon", "file", "shared"]), replace=st.booleans(),
        grows_down=st.booleans(), lock_mode=st.integers(0, 2),
    )  # fmt: skip
    def mmap(
        self, page: int, count: int, perms: int, name: str, kind: str, replace: bool,
        grows_down: bool, lock_mode: int,
    ) -> None:  # fmt: skip
        mappable = self.memory if kind != "anon" else None
        grows_down = grows_down and kind == "anon"
        done, answer = self.attempt(
            lambda: self.mm.mmap(
                count * PAGE, perms, addr=page * PAGE, fixed=replace, replace=replace,
                private=kind != "shared", mappable=mappable, offset=page * PAGE, name=name,
                grows_down=grows_down, lock_mode=lock_mode,
            )
        )  # fmt: skip
        if not done:
            return
        first = answer.start // PAGE
        assert replace is False or first == page
        # Of the mappable what lies at the page's own address, so that neighbours may merge.
        for i in range(count):
            assert replace or first + i not in self.pages
            vma = Vma(
                perms, name or ("recorder" if mappable else ""), private=kind != "shared",
                mappable=mappable, grows_down=grows_down, lock_mode=lock_mode,
            )  # fmt: skip
            offset = (page + i) * PAGE if mappable is not None else None
            self.pages[first + i] = Page(vma, offset)

    @rule(page=PAGES, count=st.integers(1, 4))
    def munmap(self, page: int, count: int) -> None:
        self.mm.munmap(page * PAGE, count * PAGE)
        for i in range(page, page + count):
            self.pages.pop(i, None)

    def change(self, page: int, count: int, **changes: Any) -> None:
        for i in range(page, page + count):
            self.pages[i].vma = self.pages[i].vma.replaced(**changes)

    @rule(page=PAGES, count=COUNTS, perms=st.integers(0, 7))
    def mprotect(self, page: int, count: int, perms: int) -> None:
        if self.attempt(lambda: self.mm.mprotect(page * PAGE, count * PAGE, perms))[0]:
            self.change(page, count, perms=perms)

    @rule(page=PAGES, count=COUNTS, mode=st.integers(0, 2))
    def mlock(self, page: int, count: int, mode: int) -> None:
        if self.attempt(lambda: self.mm.mlock(page * PAGE, count * PAGE, mode))[0]:
            self.change(page, count, lock_mode=mode)

    @rule(page=PAGES, count=COUNTS, advice=st.sampled_from([MADV_DONTFORK, MADV_DOFORK]))
    def dontfork(self, page: int, count: int, advice: int) -> None:
        if self.attempt(lambda: self.mm.madvise(page * PAGE, count * PAGE, advice))[0]:
            self.change(page, count, dontfork=advice == MADV_DONTFORK)

    @rule(page=PAGES, count=COUNTS)
    def dontneed(self, page: int, count: int) -> None:
        if self.attempt(lambda: self.mm.madvise(page * PAGE, count * PAGE, MADV_DONTNEED))[0]:
            for i in range(page, page + count):
                self.pages[i].byte = 0

    @rule(page=PAGES, count=COUNTS, name=st.sampled_from([None, "n"]))
    def set_anon_name(self, page: int, count: int, name: str | None) -> None:
        if self.attempt(lambda: self.mm.set_anon_name(page * PAGE, count * PAGE, name))[0]:
            for i in range(page, page + count):
                vma = self.pages[i].vma
                kind = "anon" if vma.mappable is None else "anon_shmem"
                if name is not None:
                    self.change(i, 1, name=f"[{kind}:{name}]")
                elif vma.name.startswith("[anon"):
                    self.change(i, 1, name="" if vma.mappable is None else "recorder")

    @rule(end=st.integers(HEAP * PAGE - 1, (HEAP + 8) * PAGE))
    def brk(self, end: int) -> None:
        was = self.mm.brk_end
        now = self.mm.brk(end)
        assert now in (was, end)
        old, new = -(-was // PAGE), -(-now // PAGE)
        for i in range(old, new):
            self.pages[i] = Page(Vma(3, "[heap]"), None)
        for i in range(new, old):
            del self.pages[i]

    @rule(
        page=PAGES, old=COUNTS, new=COUNTS, may_move=st.booleans(),
        goal=st.one_of(st.none(), PAGES),
    )  # fmt: skip
    def mremap(self, page: int, old: int, new: int, may_move: bool, goal: int | None) -> None:
        new_addr = goal * PAGE if goal is not None else None
        before = dict(self.pages)
        try:
            now = self.mm.mremap(
                page * PAGE, old * PAGE, new * PAGE, may_move=may_move, new_addr=new_addr
            )
        except MmError as e:
            if goal is not None and e.errno in {errno.EFAULT, errno.ENOMEM}:
                self.pages = self.real()
                assert self.pages.keys() <= before.keys()
            return
        moved = [before[page + i] for i in range(min(old, new)) if page + i in before]
        if goal is not None or now != page * PAGE:
            # Out of its old place, into the new; grown by pages that continue the last one.
            assert len(moved) == min(old, new)
            for i in range(old):
                self.pages.pop(page + i, None)
            for i in range(new):
                if i < old:
                    self.pages[now // PAGE + i] = moved[i]
                else:
                    self.pages[now // PAGE + i] = self.continued(before[page], page, page + i)
            return
        for i in range(new, old):
            self.pages.pop(page + i, None)
        for i in range(old, new):
            self.pages[page + i] = self.continued(before[page], page, page + i)

    @staticmethod
    def continued(first: Page, page: int, at: int) -> Page:
        offset = first.offset + (at - page) * PAGE if first.offset is not None else None
        return Page(first.vma.replaced(), offset)

    @rule(page=PAGES, byte=st.integers(1, 255))
    def write(self, page: int, byte: int) -> None:
        if page in self.pages and self.pages[page].vma.mappable is None:
            self.mm.copy_out(page * PAGE, bytes([byte]), ignore_permissions=True)
            self.pages[page].byte = byte

    @invariant()
    def all_is_as_it_should(self) -> None:
        if not hasattr(self, "setup"):
            return
        self.setup.check()
        real = self.real()
        assert {i: (p.key(), p.byte) for i, p in real.items()} == {
            i: (p.key(), p.byte) for i, p in self.pages.items()
        }
        # What is alike has merged.
        segments = list(self.mm.vmas)
        for (_, end, left), (start, _, right) in itertools.pairwise(segments):
            assert end < start or left.key != right.key
        # The mappable knows exactly what is mapped of it.
        mapped = self.memory._mappings
        mapped.check_invariants()
        assert bool(mapped) == any(p.offset is not None for p in real.values())


def test_operations_are_what_the_model_says():
    run_state_machine_as_test(
        Operations,
        settings=settings(
            max_examples=settings().max_examples, stateful_step_count=30, deadline=None
        ),
    )
