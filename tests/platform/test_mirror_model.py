"""The mirror against a dict of pages, and against what the kernel says it has."""

from __future__ import annotations

import os
import signal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmmm.errors import AddressSpaceIOUnavailableError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.platform.mirror import Mirror
from kvmmm.safemem.ffi import own_faults
from tests.platform.mirror_rig import (
    GIB,
    MAX_ADDR,
    N_PAGES,
    PAGE,
    check_windows,
    hva_of,
    peek,
    poke,
    stamp,
)

# Pages on both sides of where two windows meet.
EDGE = 70
FIRST = 3 * GIB - EDGE * PAGE
N_MODEL = 80
PLACES = st.one_of(st.integers(0, N_MODEL - 1), st.integers(EDGE - 6, EDGE + 6))
LENGTHS = st.one_of(st.integers(1, 3), st.integers(1, N_MODEL))
# Often such that neighbours continue each other in the file.
OFFSETS = st.one_of(st.just(0), st.integers(-8, 8))
BUDGETS = st.sampled_from([8, 12, 20, 40, 1000])


class MirrorMachine(RuleBasedStateMachine):
    """Pages: number -> (page of the file, permissions), of those that copies find."""

    def __init__(self) -> None:
        super().__init__()
        own_faults()  # pytest's faulthandler has them
        self.pages: dict[int, tuple[int, int]] = {}
        self.forgotten: set[int] = set()  # and may still be mapped
        self.settled: set[int] = set()  # what the change under way does not change
        self.fd = os.memfd_create("mirrored")
        os.ftruncate(self.fd, N_PAGES * PAGE)
        for page in range(N_PAGES):
            os.pwrite(self.fd, stamp(page), page * PAGE)

    @initialize(budget=BUDGETS)
    def start(self, budget: int) -> None:
        self.budget = budget
        self.mirror = Mirror(MAX_ADDR, self.drain, budget_vmas=budget)

    def teardown(self) -> None:
        os.close(self.fd)
        if hasattr(self, "mirror"):
            self.mirror.release()
            assert self.mirror.n_vmas_of_process == 0

    def found(self, page: int, access: int = READ) -> int | None:
        found = self.mirror.find(FIRST + page * PAGE, 1, access)
        return found and found[0]

    def drain(self) -> None:
        # Who has found a page before it was forgotten is still copying. One change may drain twice.
        for page, (fo_page, _perms) in self.pages.items():
            if page in self.settled and self.found(page) is None:
                self.settled.discard(page)
                assert peek(hva_of(self.mirror, FIRST + page * PAGE)) == stamp(fo_page)

    @rule(
        page=PLACES, n_pages=LENGTHS, shift=OFFSETS, perms=st.sampled_from([READ, READ_WRITE]),
        before=st.integers(0, 3), wanted=LENGTHS,
    )  # fmt: skip
    def map_run(
        self, page: int, n_pages: int, shift: int, perms: int, before: int, wanted: int
    ) -> None:
        end = min(page + n_pages, N_MODEL)
        fo_page = page + 20 + shift
        first = min(page + before, end - 1)
        target = (FIRST + first * PAGE + 5, FIRST + min(first + wanted, end) * PAGE - 7)
        self.settled = set(self.pages) - set(range(page, end))
        n_evictions = self.mirror.n_evictions
        is_there = True
        try:
            self.mirror.map_run(
                FIRST + page * PAGE, FIRST + end * PAGE, self.fd, fo_page * PAGE, perms, target
            )
        except AddressSpaceIOUnavailableError:
            assert self.budget < 14  # two windows, and one gap in each, leave no room
            is_there = False
        assert not is_there or self.found(first)
        if self.mirror.n_evictions != n_evictions or not is_there:
            self.lose_evicted()
        # Only windows that are wanted are mapped, and replaced what was there.
        low = page if target[0] < 3 * GIB else max(page, EDGE)
        high = end if target[1] > 3 * GIB else min(end, EDGE)
        for at in range(low, high):
            if self.found(at) is not None:
                self.pages[at] = (fo_page + at - page, perms)
                self.forgotten.discard(at)

    def lose_evicted(self) -> None:
        for page in [page for page in self.pages if self.found(page) is None]:
            del self.pages[page]

    @rule(page=PLACES, n_pages=LENGTHS)
    def forget(self, page: int, n_pages: int) -> None:
        self.mirror.forget(FIRST + page * PAGE, FIRST + (page + n_pages) * PAGE)
        for at in range(page, page + n_pages):
            if self.pages.pop(at, None):
                self.forgotten.add(at)

    @rule(page=PLACES, n_pages=LENGTHS)
    def unmap(self, page: int, n_pages: int) -> None:
        for at in range(page, page + n_pages):
            self.pages.pop(at, None)
            self.forgotten.discard(at)
        self.settled = set(self.pages)
        self.mirror.unmap(FIRST + page * PAGE, FIRST + (page + n_pages) * PAGE)
        self.lose_evicted()

    @rule(n_vmas=st.integers(1, 30))
    def evict(self, n_vmas: int) -> None:
        self.settled = set(self.pages)
        self.mirror._evict(n_vmas)
        self.lose_evicted()

    @invariant()
    def finds_what_the_model_has(self) -> None:
        if not hasattr(self, "mirror"):
            return
        n_run = {READ: 0, WRITE: 0}
        for page in reversed(range(N_MODEL + 8)):
            fo_page, perms = self.pages.get(page, (0, 0))
            for access, n_pages in n_run.items():
                if page == EDGE - 1:
                    n_pages = 0  # noqa: PLW2901  a find ends with the GiB
                n_run[access] = n_pages + 1 if perms & access else 0
                found = self.mirror.find(FIRST + page * PAGE, 1 << 40, access)
                assert ((found and found[1] // PAGE) or 0) == n_run[access]
            if perms:
                hva = self.found(page)
                assert hva
                assert peek(hva) == stamp(fo_page)
        assert self.mirror.n_resident_pages == len(self.pages)

    @invariant()
    def windows_are_whole(self) -> None:
        if hasattr(self, "mirror"):
            check_windows(self.mirror)
            assert self.mirror.n_vmas <= self.budget

    @rule(page=PLACES)
    def touch(self, page: int) -> None:
        if not self.mirror.n_windows or FIRST + page * PAGE & -GIB not in dict(
            self.mirror.windows()
        ):
            return
        hva = hva_of(self.mirror, FIRST + page * PAGE)
        if page in self.pages:
            fo_page, perms = self.pages[page]
            assert poke(hva, stamp(fo_page)) == (0 if perms & WRITE else signal.SIGSEGV)
        elif page not in self.forgotten:
            assert peek(hva) == signal.SIGSEGV


TestMirror = MirrorMachine.TestCase
TestMirror.settings = settings(max_examples=40, stateful_step_count=30)
