"""System calls of programs in ring 3, under Linux's x86-64 numbers.

    syscall ──► stub `out` ──► C: registers as SYSRET leaves them ──► `Syscalls.serve(number)`
                                                                        │ rdi rsi rdx r10 r8 r9
        rax ◄── answer, or -errno ◄── the mm (user_memory_calls), or one of the calls here

What is not in the table is -ENOSYS. Source: arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvmmm.errors import (
    ArenaExhaustedError,
    GuestFaultError,
    KvmmmError,
    MmError,
    SyscallError,
)
from kvmmm.vmm import user_memory_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.user_process import Process
    from kvmmm.vmm.user_vm import UserVM

    Args = tuple[int, int, int, int, int, int]
    Call = Callable[[Process, Args], object]
    """Returns the answer, an int; or what ends the run of the vCPU."""

SYS_WRITE, SYS_SCHED_YIELD, SYS_GETPID, SYS_FORK, SYS_EXIT = 1, 24, 39, 57, 60
SYS_ARCH_PRCTL, SYS_EXIT_GROUP = 158, 231

MAX_WRITE_BYTES = 0x7FFF_F000
"""The most that one call moves (Linux MAX_RW_COUNT)."""
_CHUNK_BYTES = 256 << 10

ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004

MASK_64 = (1 << 64) - 1


class Syscalls:
    """Serves the system calls of one VM's processes.

    Attributes:
        n_served: How many, unknown ones included.
    """

    def __init__(self, vm: UserVM) -> None:
        self._vm = vm
        self.n_served = 0
        self._calls: dict[int, Call] = {
            **{number: _mapping(call) for number, call in user_memory_calls.NUMBERS.items()},
            SYS_WRITE: self._write,
            SYS_SCHED_YIELD: lambda _process, _args: vm.scheduler.yield_cpu(),
            SYS_GETPID: lambda process, _args: process.pid,
            SYS_FORK: _mapping(lambda process, _args: vm.scheduler.fork(process)),
            SYS_EXIT: lambda process, args: vm.scheduler.end(process, args[0] & 0xFF),
            SYS_EXIT_GROUP: lambda process, args: vm.scheduler.end(process, args[0] & 0xFF),
            SYS_ARCH_PRCTL: self._arch_prctl,
        }

    def set(self, number: int, call: Call | None) -> None:
        """Have `call` serve a number from now on; None has it fail with ENOSYS."""
        if call is None:
            self._calls.pop(number, None)
        else:
            self._calls[number] = call

    def serve(self, number: int) -> object:
        """Serve the call that a process has made; what it returns goes to rax.

        Args:
            number: rax at the call; the low 32 bits count, as on Linux.
        """
        self.n_served += 1
        call = self._calls.get(number & 0xFFFF_FFFF)
        if call is None:
            return -errno.ENOSYS
        regs = self._vm.vcpu.regs
        args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
        try:
            return call(self._vm.process, args)
        except (MmError, GuestFaultError, ArenaExhaustedError, SyscallError) as e:
            return -(e.errno or errno.EFAULT)

    def _write(self, process: Process, args: Args) -> int:
        """Arguments: fd, addr, n_bytes. Writes to the console.

        Bytes in front of the first that cannot be read are written, and counted.
        """
        fd, addr, n_bytes = args[:3]
        if fd & 0xFFFF_FFFF not in process.streams:
            return -errno.EBADF
        end = addr + n_bytes
        if end > process.mm.max_addr:
            return -errno.EFAULT
        n_bytes = min(n_bytes, MAX_WRITE_BYTES)
        done = 0
        while done < n_bytes:
            chunk = bytearray(min(_CHUNK_BYTES, n_bytes - done))
            try:
                got = process.mm.copy_in(addr + done, chunk)
            except GuestFaultError as e:
                got = e.done
            if got:
                self._vm.write_console(bytes(chunk[:got]))
            done += got
            if got < len(chunk):
                return done or -errno.EFAULT
        return done

    def _arch_prctl(self, process: Process, args: Args) -> int:
        """Arguments: code, addr. Bases of fs and gs, for thread-local storage."""
        code, addr = args[0] & 0xFFFF_FFFF, args[1]
        if code in (ARCH_SET_FS, ARCH_SET_GS):
            if addr >= process.mm.max_addr:
                return -errno.EPERM
            self._vm.set_segment_base("fs" if code == ARCH_SET_FS else "gs", addr)
            return 0
        if code in (ARCH_GET_FS, ARCH_GET_GS):
            base = self._vm.segment_base("fs" if code == ARCH_GET_FS else "gs")
            process.mm.copy_out(addr, struct.pack("<Q", base))
            return 0
        return -errno.EINVAL


def _mapping(call: Call) -> Call:
    """Have what a mappable says, one that is not ours, become -errno as well."""

    def serve(process: Process, args: Args) -> object:
        try:
            return call(process, args)
        except KvmmmError:
            raise  # a refusal, or a defect: `serve` above knows which
        except OSError as e:
            if not e.errno:
                raise
            return -e.errno

    return serve
