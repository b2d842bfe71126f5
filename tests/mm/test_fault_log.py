"""Where faults fell."""

from __future__ import annotations

import collections
import random
from typing import TYPE_CHECKING

import pytest

from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.mm.fault_log import FaultLog, FaultPlace
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096


def test_counts_by_page_and_access():
    log = FaultLog()
    for addr, access in (
        (0x5FFF, READ), (0x5000, WRITE), (0x5008, READ_WRITE), (0x1000, EXECUTE), (0x1001, READ),
        (0x7FFF_FFFF_F000, WRITE | EXECUTE), (0, 0),
    ):  # fmt: skip
        log.note(addr, access)
    assert log.places() == [
        FaultPlace(0, PAGE, 1, 0, 0),
        FaultPlace(0x1000, 0x2000, 1, 0, 1),
        FaultPlace(0x5000, 0x6000, 1, 2, 0),
        FaultPlace(0x7FFF_FFFF_F000, 0x8000_0000_0000, 0, 1, 0),
    ]
    assert log.places()[2].faults == 3
    assert repr(log) == "<FaultLog 7 faults, in places of 4 KiB>"


@pytest.mark.parametrize("max_counts", [1, 2, 7, 100])
def test_it_stays_small_and_forgets_none(max_counts: int):
    log, rng = FaultLog(max_counts), random.Random(max_counts)
    counted: collections.Counter[int] = collections.Counter()
    addrs = [rng.randrange(1 << 47) & -PAGE for _ in range(500)]
    for _ in range(2000):
        addr = rng.choice(addrs)
        counted[addr] += 1
        log.note(addr, rng.choice((READ, WRITE)) if max_counts > 1 else READ)
    places = log.places()
    assert len(places) <= max_counts
    assert sum(place.faults for place in places) == 2000
    for place in places:
        assert place.end - place.start == log.place_bytes
        inside = sum(n for addr, n in counted.items() if place.start <= addr < place.end)
        assert inside == place.faults


class TestOfAnMm:
    @pytest.fixture
    def setup(self, make: Make) -> Setup:
        setup = make()
        setup.map(0, 64 * PAGE)
        setup.map(32 * PAGE, 64 * PAGE, READ)
        return setup

    def test_nothing_is_logged_by_itself(self, setup: Setup):
        setup.mm.handle_user_fault(0, READ)
        assert setup.mm.fault_log is None

    def test_it_agrees_with_the_counters(self, setup: Setup):
        log = setup.mm.fault_log = FaultLog()
        setup.mm.handle_user_fault(5, READ)
        setup.mm.handle_user_fault(PAGE, WRITE)
        setup.mm.handle_user_fault(PAGE, WRITE)
        for addr in (33 * PAGE, 100 * PAGE):
            with pytest.raises(GuestFaultError):
                setup.mm.handle_user_fault(addr, WRITE)
        counters, places = setup.mm.counters, log.places()
        assert [place.start // PAGE for place in places] == [0, 1, 33, 100]
        assert sum(place.reads for place in places) == counters.reads == 1
        assert sum(place.writes for place in places) == counters.writes == 4

    def test_a_child_has_one_of_its_own(self, setup: Setup):
        setup.mm.fault_log = FaultLog(100)
        setup.mm.handle_user_fault(0, READ)
        child = setup.mm.fork(FakeAddressSpace(setup.mm.max_addr))
        child.handle_user_fault(PAGE, READ)
        assert child.fault_log is not None
        assert child.fault_log.max_counts == 100
        assert child.fault_log.places() == [FaultPlace(PAGE, 2 * PAGE, 1, 0, 0)]
        assert setup.mm.fault_log.places() == [FaultPlace(0, PAGE, 1, 0, 0)]
        child.close()
