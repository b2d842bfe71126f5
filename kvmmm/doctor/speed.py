"""What an instruction costs in each ring, and what an exit costs.

Some KVMs run ring 3 on the CPU and interpret ring 0. No name tells which: the clock does.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.doctor.code import END, PORT_TICK, STEP, jump_back, mov_ecx
from kvmmm.doctor.finding import Check, Finding, differs, ok
from kvmmm.doctor.lab import Lab

if TYPE_CHECKING:
    from kvmmm.doctor.lab import Script

EMULATED = 20.0
"""Ring 0 slower than ring 3 by that factor is interpreted."""
_LONG_ENOUGH_NS = 3_000_000
_FIRST_ROUNDS, _MAX_ROUNDS = 2_000, 50_000_000
_COUNT_DOWN = STEP + b"\x48\xff\xc9\x75\xfb" + jump_back(7)  # dec %rcx; jnz back to it
_N_TICKS = 300


def _instruction_ns(ring: int) -> float:
    def script(lab: Lab) -> Script:
        rounds = _FIRST_ROUNDS
        while True:
            lab.vm.vcpu.regs.rcx = rounds
            began_ns = perf_counter_ns()
            yield
            took_ns = perf_counter_ns() - began_ns
            if took_ns > _LONG_ENOUGH_NS or rounds >= _MAX_ROUNDS:
                return took_ns / rounds / 2
            rounds = min(rounds * 8, _MAX_ROUNDS)

    with Lab(_COUNT_DOWN, ring=ring) as lab:
        return float(lab.play(script(lab)))


def _rings() -> Finding:
    ring0_ns, ring3_ns = _instruction_ns(0), _instruction_ns(3)
    ratio = ring0_ns / ring3_ns
    shown = f"{_ns(ring0_ns)} an instruction in ring 0, {_ns(ring3_ns)} in 3"
    if ratio < EMULATED:
        return ok(shown, value=ratio)
    return differs(
        shown,
        f"ring 0 is emulated, {ratio:.0f} times slower, and knows few instructions: do a guest's "
        "work in ring 3",
        value=ratio,
    )


def _exit_cost() -> Finding:
    n_ticks = 0

    def tick(_port: int, _value: int) -> None:
        nonlocal n_ticks
        n_ticks += 1

    def script(_lab: Lab) -> Script:
        began_ns = perf_counter_ns()
        yield
        return (perf_counter_ns() - began_ns) / 1e3 / n_ticks

    loop = bytes((0xE6, PORT_TICK, 0xFF, 0xC9, 0x75, 0xFA))  # out; dec %ecx; jnz the out
    with Lab(STEP + mov_ecx(_N_TICKS) + loop + STEP + END) as lab:
        lab.vm.on_out(PORT_TICK, tick, value_only=True)
        us = float(lab.play(script(lab)))
    return ok(f"{us:.1f} us for an `out` with a Python handler", value=us)


def _ns(ns: float) -> str:
    return f"{ns:.1f} ns" if ns < 10 else f"{ns:.0f} ns"


CHECKS = (
    Check("ring_speed", "speed of the rings", _rings, is_needed=False),
    Check("exit_cost", "an exit", _exit_cost, is_needed=False),
)
