"""A vCPU's state at a moment at which all of it can be seen: what a fork begins with.

Two things may be on their way when a run ends. An access that an exit has left half done: it is
completed, with the handlers. And an exception that KVM is about to deliver: that is part of the
state, but for a breakpoint (#BP). KVM does not tell it, since the CPU is to run the int3 once more
(Linux arch/x86/kvm/x86.c, kvm_vcpu_ioctl_x86_get_vcpu_events); but where KVM shadows page tables
and injects exceptions by itself, rip may be past the int3 already, and the breakpoint would be
lost. So the guest is run on for a moment then.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError, StateError
from kvmmm.safemem.ffi import ffi
from kvmmm.vmm.result import DEADLINE, MEMORY, RESUMABLE, STOPPED, RunResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.platform.kvm.vcpu import Vcpu
    from kvmmm.platform.kvm.vcpu_state import VcpuState
    from kvmmm.vmm.exit_handler import ExitHandler

_BP = 3
_INT3 = (b"\xcc", b"\xcd\x03")
_FIRST_MOMENT_S, _LAST_MOMENT_S = 20e-6, 20e-3
_RIP_OFFSET = ffi.offsetof("struct kvm_regs", "rip")


def complete(vcpu: Vcpu, handler: ExitHandler) -> None:
    """Complete what the last exit has left pending, with the vCPU's handlers.

    Raises:
        ArenaExhaustedError: No memory for the access; the guest can run on once there is some.
        StateError: A handler ends the guest instead; the message says how.
        Whatever a handler raises.
    """
    while True:
        answer: object = handler.serve_unserved()
        if answer is None:
            answer = vcpu.complete_pending()
        if answer is None:
            return
        if not isinstance(answer, RunResult):
            raise StateError(f"a handler answered {answer!r} while an access was completed")
        if answer.outcome == MEMORY:
            raise ArenaExhaustedError(*handler.shortage)
        if answer.outcome not in RESUMABLE:
            raise StateError(f"the access that it was at ends this guest:\n{answer.report}")


def may_hide_breakpoint(state: VcpuState, read: Callable[[int, int], bytes]) -> bool:
    """Return whether a #BP may be on its way that `state` does not tell of.

    Args:
        state: Of a vCPU that nothing is pending on.
        read: `read(gva, n)` returns guest memory, as far as it is there.
    """
    # struct kvm_vcpu_events begins with these four; the vector is that of the last exception.
    injected, vector, _, pending = state.events[:4]
    if vector != _BP or injected or pending:
        return False
    rip = struct.unpack_from("<Q", state.regs, _RIP_OFFSET)[0]
    return any(read(rip - len(code), len(code)) == code for code in _INT3 if rip >= len(code))


def settle(vcpu: Vcpu, run: Callable[[float], RunResult], handler: ExitHandler) -> VcpuState:
    """Return the vCPU's state, after some moments more if need be.

    Args:
        vcpu: A vCPU that does not run; nothing is pending on it.
        run: `run(timeout)` has it run on; raises when there is no memory for that.
        handler: The vCPU's.

    Returns:
        The state. The guest may have ended its run within such a moment, as `run` has seen.
    """
    moment_s = _FIRST_MOMENT_S
    has_ended = is_stopped = False
    state = vcpu.save_state()
    read = handler.provider.read
    try:
        while moment_s < _LAST_MOMENT_S and not has_ended and may_hide_breakpoint(state, read):
            result = run(moment_s)
            if result.outcome not in {DEADLINE, STOPPED}:
                has_ended = True
                if result.outcome not in RESUMABLE:
                    break
                complete(vcpu, handler)
            is_stopped = is_stopped or result.outcome == STOPPED
            moment_s *= 1.5
            state = vcpu.save_state()
    finally:
        if is_stopped:
            vcpu.stop()  # which was for a run that is still to come
    return state
