"""Windows: how much a fault backs, where in the arena, and what a small arena leaves of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import AddrRange
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
GIB = 1 << 30


def faults_upwards(setup: Setup, start: int, end: int) -> list[int]:
    """Touch every page that no pma backs yet; the lengths of the windows, in MiB where whole."""
    windows = []
    addr = start
    while addr < end:
        before = setup.mm.counters.allocated_bytes
        setup.mm.handle_user_fault(addr, WRITE)
        windows.append(setup.mm.counters.allocated_bytes - before)
        found = setup.mm.pmas.find(addr)
        assert found is not None
        addr = found[1]
    return windows


class TestWindows:
    def test_sequential_touching_doubles_from_2_to_16_mib(self, make: Make):
        setup = make(128 << 20)
        setup.map(0, 96 << 20, READ_WRITE)
        windows = faults_upwards(setup, 0, 96 << 20)
        assert [w >> 20 for w in windows] == [2, 4, 8, 16, 16, 16, 16, 16, 2]

    def test_a_large_vma_has_larger_windows(self, make: Make):
        setup = make(4 * GIB, 4 * GIB)
        setup.map(0, 4 * GIB, READ_WRITE)
        windows = faults_upwards(setup, 0, GIB)
        assert max(windows) == 64 << 20  # 1/64 of it
        assert len(windows) < 25

    def test_jumping_about_backs_2_mib_each(self, make: Make):
        setup = make()
        setup.map(0, 64 << 20, READ_WRITE)
        for addr in (50 << 20, 10 << 20, (30 << 20) + 12345, 20 << 20):
            setup.mm.handle_user_fault(addr, READ)
            found = setup.mm.pmas.find(addr)
            assert found is not None
            assert found[:2] == (addr & -HUGE, (addr & -HUGE) + HUGE)

    def test_it_ends_at_the_vma_and_at_other_pmas(self, make: Make):
        setup = make()
        vma = AddrRange(HUGE + 3 * PAGE, 2 * HUGE - 5 * PAGE)
        setup.map(vma.start, vma.end, READ_WRITE)
        setup.mm.populate(HUGE + 9 * PAGE, PAGE)
        setup.mm.handle_user_fault(HUGE + 20 * PAGE, READ)
        backed = [(s, e) for s, e, _ in setup.mm.pmas]
        assert backed[0][0] == HUGE + 9 * PAGE
        assert backed[-1][1] == vma.end
        setup.mm.handle_user_fault(vma.start, READ)
        assert sum(e - s for s, e, _ in setup.mm.pmas) == vma.length_bytes

    def test_scarce_translations_ask_for_larger_windows(self, make: Make):
        setup = make()
        setup.space.min_window_bytes = 8 << 20
        setup.map(0, 64 << 20, READ_WRITE)
        setup.mm.handle_user_fault(13 << 20, READ)
        assert [(s >> 20, e >> 20) for s, e, _ in setup.mm.pmas] == [(8, 16)]


class TestPlace:
    @pytest.mark.parametrize("home", [False, True])
    def test_address_and_offset_agree_modulo_2_mib(self, make: Make, home: bool):
        setup = make(128 << 20, 64 << 20, home=home)
        taken = setup.arena.allocate(3 * PAGE)  # so that nothing fits by chance
        setup.map(5 * PAGE, 64 << 20, READ_WRITE)
        for addr in (5 * PAGE, 33 << 20, (7 << 20) + 0x5000, 63 << 20):
            setup.mm.handle_user_fault(addr, READ)
        for start, _end, pma in setup.mm.pmas:
            assert pma.delta % HUGE == 0, hex(start)
        setup.arena.dec_ref(taken)

    def test_at_home_neighbouring_windows_are_one_pma(self, make: Make):
        setup = make(128 << 20, 64 << 20, home=True)
        setup.map(0, 64 << 20, READ_WRITE)
        for addr in (20 << 20, 24 << 20, 22 << 20):
            setup.mm.handle_user_fault(addr, READ)
        assert [(s >> 20, e >> 20) for s, e, _ in setup.mm.pmas] == [(20, 26)]

    def test_a_home_that_does_not_fit_is_done_without(self, make: Make):
        setup = make(8 << 20, 64 << 20, home=True)
        assert setup.mm.home is None
        setup.map(0, 64 << 20, READ_WRITE)
        setup.mm.handle_user_fault(40 << 20, READ)
        assert len(setup.mm.pmas) == 1


class TestSmallArena:
    def test_it_shrinks_the_window_before_it_gives_up(self, make: Make):
        setup = make(4 * HUGE)
        setup.map(0, 64 << 20, READ_WRITE)
        # Three windows and a bit are left; the bit is smaller than a window.
        taken = setup.arena.allocate(HUGE - (68 << 10), at=3 * HUGE)
        for addr in range(0, 3 * HUGE, HUGE):
            setup.mm.handle_user_fault(addr, WRITE)
        phase = HUGE - (68 << 10)  # the pages left are the last 17 of a frame
        before = setup.mm.counters.allocated_bytes
        setup.mm.handle_user_fault((40 << 20) + phase + PAGE, WRITE)
        assert setup.mm.counters.allocated_bytes - before == 64 << 10
        setup.mm.handle_user_fault((48 << 20) + phase, WRITE)  # the very last page
        assert setup.arena.statistics().free_bytes == 0
        setup.arena.dec_ref(taken)

    def test_exhausted_is_an_error_with_figures_and_changes_nothing(self, make: Make):
        setup = make(2 * HUGE)
        setup.map(0, 64 << 20, READ_WRITE)
        for addr in (0, HUGE):
            setup.mm.handle_user_fault(addr, WRITE)
        before = [(s, e) for s, e, _ in setup.mm.pmas], dict(setup.space.pages)
        with pytest.raises(ArenaExhaustedError) as caught:
            setup.mm.handle_user_fault(10 << 20, WRITE)
        assert caught.value.free_bytes == 0
        assert caught.value.capacity_bytes == 2 * HUGE
        assert ([(s, e) for s, e, _ in setup.mm.pmas], dict(setup.space.pages)) == before
        assert setup.mm.counters.refused == 1
        setup.mm.check_invariants()
        setup.mm.munmap(0, HUGE)  # room again
        setup.mm.handle_user_fault(10 << 20, WRITE)

    def test_any_free_page_will_do_in_the_end(self, make: Make):
        """The last page of the arena backs any address, whatever its phase."""
        setup = make(HUGE)
        taken = setup.arena.allocate(HUGE - PAGE, at=0)
        setup.map(0, 64 << 20, READ_WRITE)
        setup.mm.handle_user_fault(20 << 20, WRITE)
        assert setup.space.load(20 << 20, 8) == bytes(8)
        setup.arena.dec_ref(taken)
