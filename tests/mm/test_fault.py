"""The straight line: a fault finds a vma, a pma, and becomes a translation; and is counted once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import GuestFaultError, RangeError
from kvmmm.hostarch.access import EXECUTE, NO_ACCESS, READ, READ_EXECUTE, READ_WRITE, WRITE
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096


def counts(setup: Setup) -> tuple[int, ...]:
    c = setup.mm.counters
    return c.reads, c.writes, c.executes, c.vma_lookups, c.pma_insertions, c.pma_hits, c.refused


@pytest.mark.parametrize(
    ("access", "counted"),
    [(READ, (1, 0, 0)), (WRITE, (0, 1, 0)), (READ_WRITE, (0, 1, 0)), (EXECUTE, (0, 0, 1))],
)
def test_first_access(make: Make, access: int, counted: tuple[int, ...]):
    setup = make()
    setup.map(0, HUGE, READ_WRITE | EXECUTE)
    setup.mm.handle_user_fault(12345, access)
    assert counts(setup) == (*counted, 1, 1, 0, 0)
    assert setup.space.is_mapped(12345, READ_WRITE | EXECUTE)


def test_a_spurious_fault_is_harmless(make: Make):
    setup = make()
    setup.map(0, HUGE, READ_WRITE)
    setup.space.store(0, b"kept")
    for _ in range(3):
        setup.mm.handle_user_fault(0, READ)
    assert setup.space.load(0, 4) == b"kept"
    assert counts(setup) == (3, 1, 0, 4, 1, 3, 0)


@pytest.mark.parametrize(
    ("perms", "refused"),
    [
        (NO_ACCESS, {READ, WRITE, EXECUTE}),
        (READ, {WRITE, EXECUTE}),
        (READ_WRITE, {EXECUTE}),
        (WRITE, {EXECUTE}),
        (READ_EXECUTE, {WRITE}),
        (EXECUTE, {WRITE}),
        (READ_WRITE | EXECUTE, set()),
    ],
)
def test_what_a_vma_forbids(make: Make, perms: int, refused: set[int]):
    setup = make()
    setup.map(0, HUGE, perms)
    for access in (READ, WRITE, EXECUTE):
        if access not in refused:
            setup.mm.handle_user_fault(PAGE + 1, access)
            continue
        before = dict(setup.space.pages)
        with pytest.raises(GuestFaultError) as caught:
            setup.mm.handle_user_fault(PAGE + 1, access)
        error = caught.value
        assert (error.addr, error.access, error.mapped, error.done) == (PAGE + 1, access, True, 0)
        assert setup.space.pages == before
    c = setup.mm.counters
    assert c.refused == len(refused)
    assert c.faults == c.vma_lookups == 3


@pytest.mark.parametrize("addr", [0, PAGE - 1, 3 * PAGE, 1 << 50])
def test_where_nothing_is_mapped(make: Make, addr: int):
    setup = make()
    setup.map(PAGE, 3 * PAGE, READ_WRITE)
    with pytest.raises(GuestFaultError, match="nothing is mapped there") as caught:
        setup.mm.handle_user_fault(addr, READ)
    assert not caught.value.mapped
    assert counts(setup) == (1, 0, 0, 1, 0, 0, 1)
    assert setup.arena.statistics().used_bytes == 0


def test_a_pma_over_two_vmas_is_mapped_in_parts(make: Make):
    setup = make()
    setup.map(0, HUGE, READ_WRITE)
    setup.space.store(0, b"x")  # one pma over all of it
    setup.mm.mprotect(8 * PAGE, 8 * PAGE, READ)
    setup.space.pages.clear()
    setup.mm.handle_user_fault(9 * PAGE, READ)
    assert sorted(setup.space.pages) == [n * PAGE for n in range(8, 16)]
    assert {perms for _, _, perms in setup.space.pages.values()} == {READ}
    setup.mm.handle_user_fault(20 * PAGE, WRITE)
    assert min(set(setup.space.pages) - {n * PAGE for n in range(8, 16)}) == 16 * PAGE


def test_what_is_populated_does_not_fault_and_is_no_larger(make: Make):
    setup = make()
    setup.map(0, 4 * HUGE, READ_WRITE)
    setup.map(4 * PAGE, 8 * PAGE, READ_EXECUTE)
    setup.mm.populate(4 * PAGE, 4 * PAGE)
    setup.mm.copy_out(5 * PAGE, b"code", ignore_permissions=True)
    assert setup.space.load(5 * PAGE, 4, EXECUTE) == b"code"
    assert setup.mm.counters.faults == 0
    assert set(setup.space.pages) == {n * PAGE for n in range(4, 8)}
    setup.map(HUGE, HUGE + PAGE, NO_ACCESS)
    with pytest.raises(GuestFaultError) as caught:
        setup.mm.populate(HUGE - PAGE, 2 * PAGE)
    assert (caught.value.addr, caught.value.done) == (HUGE, PAGE)


def test_several_mappings_at_once_are_all_or_nothing(make: Make):
    setup = make()
    setup.mm.mmap_all([(0, PAGE, READ, "a"), (2 * PAGE, 4 * PAGE, READ_WRITE, "b")])
    before = list(setup.mm.vmas)
    for bad in (
        [(PAGE, 2 * PAGE, READ, ""), (3 * PAGE, 5 * PAGE, READ, "")],  # something is there
        [(8 * PAGE, 10 * PAGE, READ, ""), (9 * PAGE, 11 * PAGE, READ, "")],  # with each other
        [(8 * PAGE, 9 * PAGE, READ, ""), (12 * PAGE, 12 * PAGE + 1, READ, "")],  # unaligned
    ):
        with pytest.raises(RangeError):
            setup.mm.mmap_all(bad)
    assert list(setup.mm.vmas) == before


def test_what_copies_back_is_mapped_once_asked(make: Make):
    setup = make()
    setup.map(0, 4 * HUGE, READ_WRITE)
    setup.map(4 * PAGE, 8 * PAGE, NO_ACCESS)
    setup.mm.copy_out(2 * HUGE, b"tables")
    setup.mm.copy_out(5 * PAGE, b"none", ignore_permissions=True)
    assert setup.space.pages == {}
    setup.mm.map_resident()
    assert setup.space.load(2 * HUGE, 6, READ) == b"tables"
    assert setup.mm.counters.faults == 0
    assert not set(setup.space.pages) & {n * PAGE for n in range(4, 8)}
    setup.space.pages.clear()  # a cache; it is not filled a second time
    setup.mm.map_resident()
    assert setup.space.pages == {}
