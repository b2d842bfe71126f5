"""The memory manager against a dict of pages: mappings, a CPU's accesses, host copies."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvmmm.errors import GuestFaultError, MmError
from kvmmm.hostarch.access import EXECUTE, READ, WRITE
from kvmmm.hostarch.addr import PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from tests.mm.conftest import Setup
from tests.models import ModelMemory, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 2 << 20
# A few neighbourhoods: inside a window, over its edges, and at the end of the address space.
MAX = 6 * WINDOW
PAGES = st.one_of(
    st.integers(0, 8), st.integers(508, 516), st.integers(1020, 1030), st.integers(3060, 3071)
)
COUNTS = st.one_of(st.integers(1, 6), st.integers(1, 1100))
PERMS = st.integers(0, 7)
NAMES = st.sampled_from(["[memory]", "a.elf", ""])
OFFSETS = st.one_of(st.integers(0, 16), st.integers(PAGE_BYTES - 16, PAGE_BYTES - 1))
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([4096, 5000, 9000]))


class Memory(RuleBasedStateMachine):
    @initialize(home=st.booleans(), arena_windows=st.sampled_from([8, 12]))
    def begin(self, home: bool, arena_windows: int) -> None:
        self.setup = Setup(arena_windows * WINDOW, MAX, home=home)
        self.mm, self.space = self.setup.mm, self.setup.space
        self.model = ModelMemory()

    def teardown(self) -> None:
        if hasattr(self, "setup"):
            self.setup.close()

    def range(self, page: int, count: int) -> AddrRange:
        return AddrRange(page * PAGE_BYTES, min((page + count) * PAGE_BYTES, MAX))

    @rule(page=PAGES, count=COUNTS, perms=PERMS, name=NAMES)
    def mmap(self, page: int, count: int, perms: int, name: str) -> None:
        ar = self.range(page, count)
        self.setup.map(ar.start, ar.end, perms, name)
        self.model.mmap(ar.start, ar.end, perms, name)

    @rule(page=PAGES, count=COUNTS)
    def munmap(self, page: int, count: int) -> None:
        ar = self.range(page, count)
        self.mm.munmap(ar.start, ar.length_bytes)
        self.model.munmap(ar.start, ar.end)

    @rule(page=PAGES, count=COUNTS, perms=PERMS)
    def mprotect(self, page: int, count: int, perms: int) -> None:
        ar = self.range(page, count)
        refused: RefusedError | None = None
        try:
            self.model.mprotect(ar.start, ar.end, perms)
        except RefusedError as e:
            refused = e
        if refused is None:
            self.mm.mprotect(ar.start, ar.length_bytes, perms)
            return
        with pytest.raises(MmError) as caught:
            self.mm.mprotect(ar.start, ar.length_bytes, perms)
        assert (caught.value.addr, caught.value.errno) == (refused.addr, errno.ENOMEM)

    @rule(page=PAGES, count=st.integers(1, 20))
    def populate(self, page: int, count: int) -> None:
        ar = self.range(page, count)
        refused: RefusedError | None = None
        try:
            self.model.read(ar.start, ar.length_bytes, READ)
        except RefusedError as e:
            refused = e
        if refused is None:
            self.mm.populate(ar.start, ar.length_bytes)
            assert all(self.space.is_mapped(p, READ) for p in range(ar.start, ar.end, PAGE_BYTES))
        else:
            with pytest.raises(GuestFaultError) as caught:
                self.mm.populate(ar.start, ar.length_bytes)
            assert (caught.value.addr, caught.value.done) == (refused.addr, refused.done)

    def compare(
        self, ours: Callable[[], object], models: Callable[[], object]
    ) -> tuple[int, int] | None:
        """Call both: the same bytes, or the same first address, count and reason."""
        refused: RefusedError | None = None
        wanted: object = None
        try:
            wanted = models()
        except RefusedError as e:
            refused = e
        if refused is None:
            assert ours() == wanted
            return None
        with pytest.raises(GuestFaultError) as caught:
            ours()
        error = caught.value
        assert (error.addr, error.mapped) == (refused.addr, refused.mapped)
        return error.done, refused.done

    @rule(page=PAGES, offset=OFFSETS, length=LENGTHS)
    def cpu_reads(self, page: int, offset: int, length: int) -> None:
        addr = page * PAGE_BYTES + offset
        self.compare(
            lambda: self.space.load(addr, length), lambda: self.model.read(addr, length, READ)
        )

    @rule(page=PAGES, offset=OFFSETS, length=LENGTHS, seed=st.integers(1, 255))
    def cpu_writes(self, page: int, offset: int, length: int, seed: int) -> None:
        addr, data = page * PAGE_BYTES + offset, bytes((seed + i) & 0xFF for i in range(length))
        self.compare(
            lambda: self.space.store(addr, data), lambda: self.model.write(addr, data, WRITE)
        )

    @rule(page=PAGES, offset=OFFSETS)
    def cpu_fetches(self, page: int, offset: int) -> None:
        addr = page * PAGE_BYTES + offset
        self.compare(
            lambda: self.space.load(addr, 1, EXECUTE), lambda: self.model.read(addr, 1, EXECUTE)
        )

    @rule(page=PAGES, offset=OFFSETS, length=LENGTHS, ignore=st.booleans())
    def host_reads(self, page: int, offset: int, length: int, ignore: bool) -> None:
        addr = page * PAGE_BYTES + offset
        done = self.compare(
            lambda: self.mm.read(addr, length, ignore_permissions=ignore),
            lambda: self.model.read(addr, length, 0 if ignore else READ),
        )
        assert done is None or done[0] == done[1]

    @rule(
        page=PAGES, offset=OFFSETS, length=LENGTHS, seed=st.integers(1, 255), ignore=st.booleans()
    )
    def host_writes(self, page: int, offset: int, length: int, seed: int, ignore: bool) -> None:
        addr, data = page * PAGE_BYTES + offset, bytes((seed ^ i) & 0xFF for i in range(length))

        def model() -> int:
            self.model.write(addr, data, 0 if ignore else WRITE)
            return length

        done = self.compare(lambda: self.mm.copy_out(addr, data, ignore_permissions=ignore), model)
        assert done is None or done[0] == done[1]

    @rule(page=PAGES, offset=OFFSETS, length=LENGTHS)
    def host_zeroes(self, page: int, offset: int, length: int) -> None:
        addr = page * PAGE_BYTES + offset

        def model() -> int:
            self.model.write(addr, bytes(length), WRITE)
            return length

        done = self.compare(lambda: self.mm.zero_out(addr, length), model)
        assert done is None or done[0] == done[1]

    @rule(first=st.integers(0, 7), step=st.integers(1, 8))
    def translations_are_dropped(self, first: int, step: int) -> None:
        """An address space may forget: it is a cache."""
        for page in list(self.space.pages)[first::step]:
            del self.space.pages[page]

    @invariant()
    def invariants_hold(self) -> None:
        if not hasattr(self, "mm"):
            return
        self.mm.check_invariants()
        vmas = [(start, end, vma.perms, vma.name) for start, end, vma in self.mm.vmas]
        assert vmas == self.model.vmas()
        for page, (file, offset, perms) in self.space.pages.items():
            # No translation without a vma, none that grants more, none but to the pma's frame.
            found = self.mm.pmas.find(page)
            assert found is not None
            assert found[2].file is file
            assert found[2].file_range(page, page + PAGE_BYTES).start == offset
            vma = self.mm.vmas.find_value(page)
            assert vma is not None
            assert not perms & ~vma.effective_perms

    @invariant()
    def frames_are_counted(self) -> None:
        if not hasattr(self, "mm"):
            return
        spans = sum(end - start for start, end, _ in self.mm.pmas)
        assert self.setup.arena.statistics().used_bytes == spans
        offsets = sorted((start + pma.delta, end + pma.delta) for start, end, pma in self.mm.pmas)
        for (_, end), (start, _) in itertools.pairwise(offsets):
            assert end <= start  # no frame backs two addresses
        counters = self.mm.counters
        assert counters.faults == counters.vma_lookups
        assert counters.faults == counters.pma_insertions + counters.pma_hits + counters.refused


def test_memory_is_what_the_model_says():
    run_state_machine_as_test(
        Memory,
        settings=settings(
            max_examples=settings().max_examples, stateful_step_count=25, deadline=None
        ),
    )
