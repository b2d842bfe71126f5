"""Running machine code as a guest: the few lines that every test of a whole VM begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.vmm.microvm import MicroVM
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.result import RunResult

TIMEOUT = 60.0
"""Longer than any guest here needs on any machine; what ends a guest that is lost."""


def load_code(code: Code | bytes, **options: Any) -> MicroVM:
    """Return a VM with `code` loaded at BASE; options are those of MicroVM."""
    vm = MicroVM(**options)
    try:
        vm.load(code.bytes if isinstance(code, Code) else code, base=BASE)
    except BaseException:
        vm.close()
        raise
    return vm


def run_code(
    code: Code | bytes, prepare: Callable[[MicroVM], object] = lambda _vm: None, **options: Any
) -> RunResult:
    """Load, prepare and run; the VM is closed afterwards."""
    with load_code(code, **options) as vm:
        prepare(vm)
        return vm.run(timeout=TIMEOUT)


def describe(result: RunResult) -> str:
    """What a failed test should show."""
    return f"{result!r}\n{result.report}\n{result.console.decode(errors='replace')}"
