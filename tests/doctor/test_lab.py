"""The doctor's guests: what they report, and what is said when one does something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.doctor.code import DATA, END, LOAD, SPIN, STEP, UD2, jump_back, mov_eax, u32
from kvmmm.doctor.lab import Lab, ProbeError

if TYPE_CHECKING:
    from kvmmm.doctor.lab import Script

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("ring", [0, 3])
def test_registers_at_the_end(ring: int):
    with Lab(mov_eax(42) + END, ring=ring) as lab:
        assert lab.run()["rax"] == 42


def test_data_is_where_it_should_be():
    with Lab(LOAD + u32(DATA) + END, data=b"\x07") as lab:
        assert lab.run()["rax"] == 7


def test_a_script_goes_step_by_step():
    def script() -> Script:
        first = yield
        second = yield
        return first, second

    with Lab(STEP + mov_eax(1) + STEP + mov_eax(2) + STEP + SPIN) as lab:
        assert lab.play(script()) == (1, 2)


def test_a_script_may_leave_the_guest_in_the_middle():
    def script() -> Script:
        yield
        return "enough"

    with Lab(STEP + jump_back(2)) as lab:
        assert lab.play(script()) == "enough"


def test_a_guest_that_ends_too_early():
    def script() -> Script:
        while True:
            yield

    with Lab(STEP + END) as lab, pytest.raises(ProbeError, match="before the script"):
        lab.play(script())


def test_an_unexpected_exception_is_named_with_its_place():
    with Lab(mov_eax(1) + UD2) as lab, pytest.raises(ProbeError, match=r"#UD .* code byte 5"):
        lab.run()


def test_exceptions_can_be_stepped_over():
    with Lab(UD2 + mov_eax(3) + END, skips=(2,)) as lab:
        assert lab.run(expects_trap=True)["rax"] == 3
        assert [trap.frame.vector for trap in lab.traps] == [6]


def test_an_exception_that_does_not_come():
    with Lab(END) as lab, pytest.raises(ProbeError, match="no exception"):
        lab.run(expects_trap=True)


def test_another_end_is_told_with_its_headline():
    with Lab(b"\xf4", ring=0) as lab, pytest.raises(ProbeError, match=r"halted"):  # hlt
        lab.run()
