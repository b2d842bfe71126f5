"""Limits: who asks for which, what they count, and what they are by default."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmmm.mm.layout import UNLIMITED, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
START = 1 << 20


def test_by_default_there_are_none_but_for_the_stack():
    limits = Limits()
    assert limits.address_space_bytes == limits.data_bytes == limits.locked_bytes == UNLIMITED
    assert limits.stack_bytes == 8 << 20
    assert not limits.may_lock_all


class TestAddressSpace:
    def test_exactly_that_much(self, make: Make):
        setup = make()
        setup.mm.limits.address_space_bytes = 4 * PAGE
        ar = setup.mm.mmap(3 * PAGE)
        setup.refuses(lambda: setup.mm.mmap(PAGE + 1), errno.ENOMEM, "mmap")
        setup.mm.mmap(PAGE)
        setup.refuses(lambda: setup.mm.mmap(PAGE), errno.ENOMEM)
        setup.mm.munmap(ar.start, PAGE)
        setup.mm.mmap(PAGE)

    def test_what_is_replaced_does_not_count(self, make: Make):
        setup = make()
        setup.map(START, START + 4 * PAGE)
        setup.mm.limits.address_space_bytes = 5 * PAGE
        setup.map(START + 2 * PAGE, START + 5 * PAGE, 1)
        setup.refuses(lambda: setup.map(START + 4 * PAGE, START + 6 * PAGE, 1), errno.ENOMEM)

    def test_it_binds_stacks_and_heaps(self, make: Make):
        setup = make()
        setup.mm.set_brk(START)
        setup.mm.limits.address_space_bytes = 2 * PAGE
        setup.refuses(setup.mm.map_stack, errno.ENOMEM)
        assert setup.mm.brk(START + 3 * PAGE) == START
        assert setup.mm.brk(START + 2 * PAGE) == START + 2 * PAGE


class TestData:
    def test_only_the_heap_is_bound(self, make: Make):
        setup = make()
        setup.mm.set_brk(START)
        setup.mm.limits.data_bytes = PAGE + 1
        setup.mm.mmap(64 * PAGE)
        assert setup.mm.brk(START + PAGE + 1) == START + PAGE + 1
        assert setup.mm.brk(START + PAGE + 2) == START + PAGE + 1


def test_limits_may_fall_below_what_is_used(make: Make):
    setup = make()
    setup.map(START, START + 8 * PAGE)
    setup.mm.mlock(START, 8 * PAGE)
    setup.mm.limits.address_space_bytes = setup.mm.limits.locked_bytes = PAGE
    setup.mm.munmap(START, PAGE)
    setup.mm.munlock(START + PAGE, PAGE)
    setup.mm.mprotect(START + PAGE, PAGE, 1)
    setup.refuses(lambda: setup.mm.mmap(PAGE), errno.ENOMEM)
    setup.refuses(lambda: setup.mm.mlock(START + PAGE, PAGE), errno.ENOMEM)
