"""Running machine code as a guest: the few lines that every test of a whole VM begins with."""

from __future__ import annotations

import struct
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


COUNT, FLAG = 0x40_0000, 0x40_1000
"""Where counting guests write their count, and where they look for the word that ends them."""


def counting(code: Code, body: Code | None = None) -> bytes:
    """A loop that counts in r9 and at COUNT, and exits with 0 when the word at FLAG is 1."""
    code.mov("r9", 0).mov("rbx", COUNT).mov("rsi", FLAG)
    loop = code.here
    code.add("r9", 1)
    if body is not None:
        code.raw(body.bytes)
    code.store("rbx", "r9").load("rax", "rsi").dec("rax").jump_back_unless_zero(loop)
    return code.exit(0).bytes


def count_is_right(vm: MicroVM) -> int:
    """Return the count; register and memory never differ by more than the store between them."""
    written = struct.unpack("<Q", vm.mm.read(COUNT, 8))[0]
    assert vm.vcpu.regs.r9 - written in {0, 1}
    return int(written)


def finish(vm: MicroVM) -> RunResult:
    vm.mm.copy_out(FLAG, struct.pack("<Q", 1))
    result = vm.run(timeout=TIMEOUT)
    assert (result.outcome, result.status) == ("exited", 0), describe(result)
    return result
