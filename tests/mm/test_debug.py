"""What the self-check of a memory manager finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import FileRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096


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
