"""What to draw of a VM whose run is over, or was: its address spaces, and what is said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.mm.sight import look
from kvmmm.vmm import result
from kvmmm.vmm.picture_words import Drawn

if TYPE_CHECKING:
    from kvmmm.vmm.result import RunResult
    from kvmmm.vmm.stop_report import Reported
    from kvmmm.vmm.user_process import Process

MOST_SPACES = 8
"""Of more processes only the first are drawn."""


def spaces_of(vm: Reported, run_result: RunResult | None = None) -> list[Drawn]:
    """Return what to draw: a guest kernel's memory, or that of each process that lives.

    The process that runs, or ran last, comes first; it is there even if it has ended.

    Args:
        vm: A `MicroVM` or a `UserVM`, loaded and not closed.
        run_result: How its run ended; a fault's address is marked.
    """
    fault = _fault(run_result) if run_result is not None else None
    processes = _processes(vm)
    if not processes:
        return [Drawn("", look(vm.mm), fault)]
    return [
        Drawn(_label(process), look(process.mm), None if i else fault)
        for i, process in enumerate(processes[:MOST_SPACES])
    ]


def _fault(run_result: RunResult) -> tuple[int, str] | None:
    # An exception's address is a virtual one: in a guest kernel it may be none of the mm's.
    if run_result.addr is None or run_result.outcome not in {result.FAULT, result.MEMORY}:
        return None
    return run_result.addr, run_result.report.partition("\n")[0]


def n_left_out(vm: Reported) -> int:
    """Return how many processes `spaces_of` leaves out."""
    return max(len(_processes(vm)) - MOST_SPACES, 0)


def _processes(vm: Reported) -> list[Process]:
    # Without importing UserVM, which a guest kernel has no use for.
    last: Process | None = getattr(vm, "process", None)
    if last is None:
        return []
    alive: list[Process] = getattr(vm, "processes", [])
    return [last, *(process for process in alive if process is not last)]


def _label(process: Process) -> str:
    end = f", which has ended with status {process.status}" if process.status is not None else ""
    child = f", a child of {process.parent.pid}" if process.parent is not None else ""
    return f"process {process.pid}{child}{end}"
