"""Each kind of exit: its program, and that product and floor see the exits they should."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench import exit_guests
from kvmmm.bench.exit_guests import KindGuest, kernel_guest, user_guest
from kvmmm.bench.exit_kinds import ALL_NAMES, EVENT_KIND, GROUPS, KERNEL_KINDS, USER_KINDS, Kind
from kvmmm.bench.guest import MARK_END, MARK_START, BenchmarkError
from kvmmm.bench.runner import measure

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS = (*USER_KINDS, *KERNEL_KINDS, EVENT_KIND)
_needs_kvm = [
    pytest.mark.kvm,
    pytest.mark.usefixtures("no_leak"),
    pytest.mark.skipif("KVMMM_TEST_NPT" in os.environ, reason="an emulated CPU has no times"),
]


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.name)
def test_a_program_loops_over_its_instruction_between_its_marks(kind: Kind) -> None:
    piece = kind.piece()

    marks = [piece.index(bytes((0xE6, port))) for port in (MARK_START, MARK_END)]
    body = marks[0] + 2
    assert piece[body:].startswith(kind.code + kind.after)
    # A short jump counts from the instruction behind it.
    jump = marks[1]
    assert piece[jump - 2] == 0x75
    assert jump + piece[jump - 1] - 256 == body
    assert piece[-2] == 0xEB
    assert len(piece) + piece[-1] - 256 == 0


def test_every_kind_has_its_two_cases() -> None:
    [group] = GROUPS
    names = {case.name for case in group.cases}

    for kind in (*USER_KINDS, *KERNEL_KINDS):
        assert {f"exits/kind_{kind.name}", f"exits/over_{kind.name}"} <= names
    assert {"exits/kind_deadline", "exits/over_deadline", "exits/kind_ioeventfd"} <= names
    assert {f"exits/kind_{name}" for name in ALL_NAMES} == {n for n in names if "kind_" in n}


class TestGuests:
    pytestmark = _needs_kvm

    @pytest.fixture
    def user(self) -> Iterator[KindGuest]:
        with ExitStack() as stack:
            yield user_guest(stack, (*USER_KINDS, EVENT_KIND))

    @pytest.fixture
    def kernel(self) -> Iterator[KindGuest]:
        with ExitStack() as stack:
            yield kernel_guest(stack, KERNEL_KINDS)

    def test_ring_3_makes_its_exits_under_both_loops(self, user: KindGuest) -> None:
        for kind in USER_KINDS:
            before = sum(user.vcpu.statistics()["exits"].values())
            for _ in range(2):
                assert user.product(kind) > 0
                assert user.floor(kind) > 0
            # The floor's are not counted; two marks a run are.
            made = sum(user.vcpu.statistics()["exits"].values()) - before
            assert made == 2 * (kind.n + 2), kind.name

    def test_ring_0_makes_its_exits_under_both_loops(self, kernel: KindGuest) -> None:
        for kind in KERNEL_KINDS:
            for _ in range(2):
                assert kernel.product(kind) > 0
                assert kernel.floor(kind) > 0

    def test_an_eventfd_takes_the_exit_away(self, user: KindGuest) -> None:
        before = sum(user.vcpu.statistics()["exits"].values())
        user.product(EVENT_KIND)

        assert sum(user.vcpu.statistics()["exits"].values()) - before == 2

    def test_a_deadline_comes_after_its_time(self, user: KindGuest) -> None:
        assert user.kick() > 0
        assert user.kick_floor() > 0
        # And the guest goes on.
        assert user.product(USER_KINDS[0]) > 0

    def test_a_floor_that_sees_another_exit_says_so(self, user: KindGuest) -> None:
        other = Kind("out", "", "e6b0", 2, port=0xB3)

        with pytest.raises(BenchmarkError, match="the floor saw 0 of 20"):
            user.floor(other)

    def test_a_guest_that_does_not_end_is_ended(
        self, user: KindGuest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        endless = Kind("out_nobody", "", "e6b6", 2, port=0xB6, n=1 << 40)
        monkeypatch.setattr(exit_guests, "_TIMEOUT_NS", 20_000_000)

        with pytest.raises(BenchmarkError, match="did not come to its mark"):
            user.product(endless)
        with pytest.raises(BenchmarkError, match="the floor saw"):
            user.floor(endless)

    def test_one_kind_can_be_measured_alone(self) -> None:
        [record] = measure(GROUPS[0].only({"exits/over_syscall"}), quick=True)

        assert record.n > 0
        assert record.extra["product_ns"] > 0
        assert record.extra["floor_ns"] > 0
