"""Guests that make exits of one kind from mark to mark, in ring 3 and in ring 0: for `exit_kinds`.

Start mark, n times the instruction, end mark: once under kvmmm with the least handler that answers
such an exit, once under a loop in C (`_native/floor_kind.c`).
"""

from __future__ import annotations

import os
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from kvmmm.bench.guest import MARK_END, MARK_START, TIMEOUT_S, WORK_PORT, BenchmarkError
from kvmmm.bench.toucher import START, Toucher
from kvmmm.errors import IoctlError
from kvmmm.hostarch.access import EXECUTE, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import GIANT_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables.pte import flags_of
from kvmmm.safemem.ffi import address_of, ffi, ioctl, lib
from kvmmm.vmm.microvm import MicroVM
from kvmmm.vmm.result import EXITED, RunResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack

    from kvmmm.bench.exit_kinds import Kind
    from kvmmm.safemem.ffi import MmioExit, Registers
    from kvmmm.vmm.machine import Machine

_C = cast("Any", lib)
_TIMEOUT_NS = int(TIMEOUT_S * 1e9)
_CODE = 0x1100_0000
_PIECE = 0x40
_ABSENT = START + GIANT_PAGE_BYTES
_MMIO_GPA = 1 << 29
"""Below all windows (`kvmmm.platform.kvm.guest_physical`): there is never a slot."""
EVENT_PORT = 0xB4
_KVM_IOEVENTFD, _IOEVENTFD_PIO = 0x4040_AE79, 2  # Linux include/uapi/linux/kvm.h
_KICKS, _KICK_AFTER_NS = 1, 200_000


_SPIN = bytes.fromhex("ebfe")


class _Handlers:
    """The least that answers each kind."""

    __slots__ = ("last", "regs")

    def __init__(self, regs: Registers) -> None:
        self.regs = regs

    def on_port(self, _port: int, value: int | None) -> int | None:
        if value is None:
            return 1  # an IN
        self.last = value
        return None

    def on_mmio(self, exit_: MmioExit) -> None:
        if exit_.is_write:
            self.last = exit_.value
        else:
            exit_.value = 1

    def on_fault(self, _addr: int, _access: int) -> None:
        self.regs.rip += 2  # past the instruction

    def on_syscall(self, _number: int) -> int:
        return 0

    def on_cold(self, _reason: int) -> None:
        pass


class KindGuest:
    """A VM that makes exits of the kinds it was given.

    Args:
        vm: Ready to run in its ring; closed with this.
        code: Where its programs lie, one every `_PIECE` bytes, then one that spins.
        kinds: What they do.
        stack_top_hva: Where the CPU pushes; 0 in ring 0, where nothing traps.
    """

    def __init__(self, vm: Machine, code: int, kinds: Sequence[Kind], stack_top_hva: int) -> None:
        self.vm = vm
        self.vcpu = vm.vcpu
        self._at = {kind.name: code + i * _PIECE for i, kind in enumerate(kinds)}
        self._spin = code + len(kinds) * _PIECE
        self._stack_top_hva = stack_top_hva
        self._start_ns = self._end_ns = 0
        vm.on_out(MARK_START, self._on_start, value_only=True)
        vm.on_out(MARK_END, self._on_end, value_only=True)
        handlers = _Handlers(self.vcpu.regs)
        vm.on_out(WORK_PORT, handlers.on_port, value_only=True)
        for name in ("on_mmio", "on_fault", "on_syscall", "on_cold"):
            setattr(self.vcpu, name, getattr(handlers, name))

    def _on_start(self, _port: int, _value: int) -> None:
        self._start_ns = perf_counter_ns()

    def _on_end(self, _port: int, _value: int) -> bool:
        self._end_ns = perf_counter_ns()
        return True

    def _aim(self, kind: Kind) -> None:
        regs = self.vcpu.regs
        regs.rip, regs.rdx = self._at[kind.name], kind.n
        regs.rsi = _ABSENT if kind.back == lib.KVMMM_FLOOR_BACK_FRAME else START

    def product(self, kind: Kind) -> float:
        """Make `kind.n` exits under kvmmm; returns ns per exit."""
        self._aim(kind)
        answer = self.vcpu.run(_TIMEOUT_NS)
        if answer is not True:
            raise BenchmarkError(f"{kind.name}: the guest did not come to its mark: {answer!r}")
        return (self._end_ns - self._start_ns) / (kind.n + 1)

    def floor(self, kind: Kind) -> float:
        """Make the same under the loop in C; returns ns per exit."""
        recipe = ffi.new("struct kvmmm_floor_kind *")
        recipe.vcpu_fd = self.vcpu.fd
        recipe.run = ffi.cast("struct kvm_run *", self.vcpu.run_hva)
        recipe.reason, recipe.port, recipe.back = kind.reason, kind.port, kind.back
        recipe.start_port, recipe.end_port = MARK_START, MARK_END
        recipe.skip_bytes = len(kind.code)
        recipe.tss_type, recipe.stack_top_hva = self.vcpu.trial.tss_type, self._stack_top_hva
        n_exits = ffi.new("uint64_t *")
        self._aim(kind)
        taken_ns = int(_C.kvmmm_floor_exit_kind(recipe, _TIMEOUT_NS, n_exits))
        if taken_ns < 0 or n_exits[0] != kind.n:
            raise BenchmarkError(f"{kind.name}: the floor saw {n_exits[0]} of {kind.n}: {taken_ns}")
        return taken_ns / (kind.n + 1)

    def kick(self) -> float:
        """Return by how many ns a run outlives its deadline, the guest in a loop."""
        late = []
        for _ in range(_KICKS):
            self.vcpu.regs.rip = self._spin
            start_ns = perf_counter_ns()
            answer = self.vcpu.run(_KICK_AFTER_NS)
            late.append(perf_counter_ns() - start_ns - _KICK_AFTER_NS)
            if answer != -lib.KVMMM_STOP_DEADLINE:
                raise BenchmarkError(f"the deadline did not end the run: {answer!r}")
        return median(late)

    def kick_floor(self) -> float:
        """Return the same for a timer and one KVM_RUN in C."""
        run = ffi.cast("struct kvm_run *", self.vcpu.run_hva)
        late = []
        for _ in range(_KICKS):
            self.vcpu.regs.rip = self._spin
            late.append(int(_C.kvmmm_floor_kick(self.vcpu.fd, run, _KICK_AFTER_NS)))
            if late[-1] < 0:
                raise BenchmarkError(f"the timer did not end the run: {os.strerror(-late[-1])}")
        return median(late)


def _program(kinds: Sequence[Kind]) -> bytes:
    return b"".join(kind.piece().ljust(_PIECE, b"\xf4") for kind in kinds) + _SPIN


def user_guest(stack: ExitStack, kinds: Sequence[Kind]) -> KindGuest:
    """Return a guest in ring 3; at START it finds no slot, and EVENT_PORT leads to an eventfd."""
    vm = stack.enter_context(Toucher("8M", max_leaf_bytes=PAGE_BYTES))
    vm.mm.mmap(PAGE_BYTES, READ_EXECUTE, addr=_CODE, fixed=True)
    vm.mm.copy_out(_CODE, _program(kinds), ignore_permissions=True)
    vm.mm.handle_user_fault(_CODE, EXECUTE)  # before faults are served by handlers that only skip
    [table_hva] = vm.empty_tables(PAGE_BYTES)
    ffi.cast("uint64_t *", table_hva)[0] = _MMIO_GPA | flags_of(READ_WRITE, user=True)
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, event_fd)
    # struct kvm_ioeventfd: datamatch, addr, len, fd, flags, padding
    request = ffi.new("uint64_t[8]", [0, EVENT_PORT, 1 | event_fd << 32, _IOEVENTFD_PIO])
    rc = ioctl(vm.vm.fd, _KVM_IOEVENTFD, address_of(request))
    if rc < 0:
        raise IoctlError("KVM_IOEVENTFD", f"port={EVENT_PORT:#x}", -rc)
    return KindGuest(vm, _CODE, kinds, vm.stack_top_hva)


def kernel_guest(stack: ExitStack, kinds: Sequence[Kind]) -> KindGuest:
    """Return a guest in ring 0."""
    vm = stack.enter_context(MicroVM("4M"))
    base = 1 << 20
    vm.load(_program(kinds), base=base)
    vm.on_out(MARK_START, lambda _port, _value: RunResult(EXITED, status=0), value_only=True)
    if vm.run(timeout=TIMEOUT_S).outcome != EXITED:
        raise BenchmarkError("the ring-0 guest did not come to its mark")
    return KindGuest(vm, base, kinds, 0)
