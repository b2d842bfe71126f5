"""Ending a guest that does not end: a stop from outside, the deadline, a stop beforehand."""

from __future__ import annotations

import threading
from time import perf_counter_ns, sleep

from kvmmm.doctor.code import SPIN, STEP
from kvmmm.doctor.finding import Check, Finding, missing, ok
from kvmmm.doctor.lab import TIMEOUT_SECONDS, Lab
from kvmmm.vmm import result

_SPINS_SECONDS = 0.02
_DEADLINE_SECONDS = 0.05


def _stop(ring: int) -> Finding:
    stopped_ns = 0

    def stop() -> None:
        nonlocal stopped_ns
        sleep(_SPINS_SECONDS)
        stopped_ns = perf_counter_ns()
        lab.vm.stop()

    with Lab(SPIN, ring=ring) as lab:
        thread = threading.Thread(target=stop)
        thread.start()
        try:
            run_result = lab.run_raw()
            ended_ns = perf_counter_ns()
        finally:
            thread.join()
    if run_result.outcome != result.STOPPED:
        return missing(f"it went on until the {run_result.outcome}")
    ms = (ended_ns - stopped_ns) / 1e6
    return ok(f"{ms:.2f} ms from stop() to the end of the run", value=ms)


def _deadline() -> Finding:
    with Lab(SPIN) as lab:
        began_ns = perf_counter_ns()
        run_result = lab.vm.run(timeout=_DEADLINE_SECONDS)
        late_ms = (perf_counter_ns() - began_ns) / 1e6 - _DEADLINE_SECONDS * 1e3
    if run_result.outcome != result.DEADLINE:
        return missing(f"{_DEADLINE_SECONDS} s ended as {run_result.outcome}")
    return ok(f"ends a spinning guest, {max(0.0, late_ms):.1f} ms late", value=late_ms)


def _immediate_exit() -> Finding:
    with Lab(STEP + SPIN) as lab:
        lab.vm.stop()
        run_result = lab.vm.run(timeout=TIMEOUT_SECONDS)
        n_exits = sum(lab.vm.statistics().exits.values())
    if run_result.outcome != result.STOPPED or n_exits:
        return missing(f"the run ended as {run_result.outcome} after {n_exits} exits")
    return ok("a stop in advance lets nothing run")


CHECKS = (
    Check("stop_ring3", "stop a spin in ring 3", lambda: _stop(3)),
    Check("stop_ring0", "stop a spin in ring 0", lambda: _stop(0)),
    Check("deadline", "deadline timer", _deadline),
    Check("immediate_exit", "immediate_exit", _immediate_exit),
)
