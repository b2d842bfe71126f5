"""`bench startup`: from nothing to a guest's first exit, and back; what `import kvmmm` costs."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import MS, RATIO, Case, Group
from kvmmm.bench.floor import STEPS, MachineFloor
from kvmmm.bench.guest import TIMEOUT_S, check_exited, guest_path
from kvmmm.safemem.ffi import lib
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import EXITED, RunResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

_MEMORY = "64M"
_GUEST = "bench_first"


class _FirstExit:
    """Takes the time at which the guest's first `out` reaches Python."""

    __slots__ = ("at_ns",)

    def __init__(self) -> None:
        self.at_ns = 0

    def on_out(self, _port: int, _value: int) -> RunResult:
        self.at_ns = perf_counter_ns()
        return RunResult(EXITED, status=0)


def _start_and_close() -> Sample:
    path = guest_path(_GUEST)
    first = _FirstExit()
    start_ns = perf_counter_ns()
    vm = MicroVM(_MEMORY)
    try:
        made_ns = perf_counter_ns()
        vm.on_out(lib.KVMMM_PORT_EXIT, first.on_out, value_only=True)
        vm.load(path)
        loaded_ns = perf_counter_ns()
        result = vm.run(timeout=TIMEOUT_S)
        returned_ns = perf_counter_ns()
    finally:
        closing_ns = perf_counter_ns()
        vm.close()
        closed_ns = perf_counter_ns()
    check_exited(result, _GUEST)
    return {
        "first_exit": first.at_ns - start_ns,
        "make": made_ns - start_ns,
        "load": loaded_ns - made_ns,
        "run": first.at_ns - loaded_ns,
        "return": returned_ns - first.at_ns,
        "close": closed_ns - closing_ns,
    }


@contextmanager
def _machines() -> Iterator[Mapping[str, Probe]]:
    path = guest_path(_GUEST)
    with MicroVM(_MEMORY) as model:  # also the first VM of the process: it fills every cache
        model.load(path)
        check_exited(model.run(timeout=TIMEOUT_S), _GUEST)
        floor = MachineFloor(model, path, lib.KVMMM_PORT_EXIT)

    def start_and_close() -> Sample:
        first_exit_ns = floor.start()
        steps = floor.steps()
        return {"first_exit": first_exit_ns, "close": floor.close(), **steps}

    yield {"kvmmm": _start_and_close, "floor": start_and_close}


def _interpreter(code: str) -> Probe:
    command = [sys.executable, "-I", "-c", code]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def spawn() -> Sample:
        start_ns = perf_counter_ns()
        subprocess.run(command, check=True, timeout=60, env=environment, stdin=subprocess.DEVNULL)
        return {"run": perf_counter_ns() - start_ns}

    return spawn


@contextmanager
def _imports() -> Iterator[Mapping[str, Probe]]:
    yield {
        "import": _interpreter("import kvmmm"),
        "microvm": _interpreter("from kvmmm import MicroVM"),
        "bare": _interpreter("pass"),
    }


_PARTS = (
    *(("kvmmm", part) for part in ("make", "load", "run", "return")),
    *(("floor", step) for step in STEPS),
)

GROUPS = (
    Group(
        "startup: first exit and close",
        (
            Case(
                "startup/first_exit", unit=RATIO, goal=1.25, shown=_PARTS,
                product=("kvmmm", "first_exit"), floor=("floor", "first_exit"),
                note="ring 0; 64M, second VM of the process on; floor: the same ioctls in C",
            ),
            Case(
                "startup/close", unit=RATIO, goal=1.2,
                product=("kvmmm", "close"), floor=("floor", "close"),
                note="the VM of first_exit; floor: munmap and close in C",
            ),
        ),
        open=_machines, rounds=150, quick_rounds=15, warm_up=5,
    ),
    Group(
        "startup: import",
        (
            Case(
                "startup/import", unit=MS, goal=40,
                product=("import", "run"), floor=("bare", "run"),
                note="python -c 'import kvmmm' minus python -c pass",
            ),
            Case(
                "startup/import_microvm", unit=MS, goal=None,
                product=("microvm", "run"), floor=("bare", "run"),
                note="the same with `from kvmmm import MicroVM`: all that a first VM needs",
            ),
        ),
        open=_imports, rounds=15, quick_rounds=3,
    ),
)  # fmt: skip
"""Two groups: VMs in this process, and interpreters of their own."""
