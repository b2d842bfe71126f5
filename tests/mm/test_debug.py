"""What people see of a memory manager, and what its self-check finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import NO_ACCESS, READ, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096


def test_maps(make: Make):
    setup = make()
    setup.map(0x1000, 0x400000, READ_WRITE, "[memory]")
    setup.map(0x100000, 0x103000, READ_EXECUTE, "[image]")
    setup.map(0x300000, 0x301000, NO_ACCESS)
    setup.mm.populate(0x100000, 0x2000)
    assert setup.mm.maps() == (
        "000000001000-000000100000 rw-p          0 KiB  [memory]\n"
        "000000100000-000000103000 r-xp          8 KiB  [image]\n"
        "000000103000-000000300000 rw-p          0 KiB  [memory]\n"
        "000000300000-000000301000 ---p          0 KiB\n"
        "000000301000-000000400000 rw-p          0 KiB  [memory]\n"
    )


def test_maps_of_nothing(make: Make):
    assert make().mm.maps() == "\n"


class TestCheckInvariants:
    @pytest.fixture
    def setup(self, make: Make) -> Setup:
        setup = make()
        setup.map(0, 16 * PAGE, READ_WRITE)
        setup.mm.populate(0, 16 * PAGE)
        setup.mm.check_invariants()
        return setup

    def test_a_pma_without_a_vma(self, setup: Setup):
        removed = setup.mm.vmas.remove(4 * PAGE, 5 * PAGE)
        with pytest.raises(AssertionError, match="a pma without a vma at 0x4000"):
            setup.mm.check_invariants()
        setup.mm.vmas.insert(*removed[0])

    def test_a_frame_that_is_free(self, setup: Setup):
        start, _, pma = next(iter(setup.mm.pmas))
        first = pma.file_range(start, start + PAGE)
        setup.arena.dec_ref(first)
        with pytest.raises(AssertionError, match="is free"):
            setup.mm.check_invariants()
        setup.arena.allocate(PAGE, at=first.start)
        setup.mm.check_invariants()

    def test_a_translation_that_grants_too_much(self, setup: Setup):
        setup.mm.mprotect(0, 16 * PAGE, READ)
        setup.mm.check_invariants()
        _, _, pma = next(iter(setup.mm.pmas))
        setup.space.map_file(0, setup.arena, FileRange(pma.delta, pma.delta + PAGE), READ_WRITE)
        with pytest.raises(AssertionError, match="may be written"):
            setup.mm.check_invariants()
        setup.space.pages.clear()
