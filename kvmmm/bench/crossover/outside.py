"""Outside references, called from Python: the kernel copies, and no mechanism has a part in it.

Where the bytes are is known beforehand. So system calls alone are timed: one for each piece (pread,
pwrite), or for 1,024 of them (process_vm_readv; Python has no such function, so ctypes calls it).
"""

from __future__ import annotations

import ctypes
import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover.pool import GroundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.ground import Ground
    from kvmmm.bench.crossover.probes import Buffers
    from kvmmm.bench.crossover.record import Cell

    Arguments = Sequence[tuple[Any, Any]]

_INTO_HOST = ("copy_in", "copy_in_to")
_IOVECS = 1024  # IOV_MAX
_IOVEC = ctypes.c_size_t * 2  # struct iovec: base, length


class Outside:
    """One cell's operation by the kernel.

    Args:
        cell: Which; one that has references.
        ground: The memory.
        buffers: The host's side.
    """

    def __init__(self, cell: Cell, ground: Ground, buffers: Buffers) -> None:
        self._n_bytes, self._wanted = cell.bytes, 0
        self._reads = cell.operation in _INTO_HOST
        self._ground = ground
        self._base = buffers.hva
        self._view = memoryview(buffers.data)
        libc = ctypes.CDLL(None, use_errno=True)
        self._process_vm = libc.process_vm_readv if self._reads else libc.process_vm_writev
        pointer, count = ctypes.c_void_p, ctypes.c_ulong
        self._process_vm.argtypes = (ctypes.c_int, pointer, count, pointer, count, count)
        self._process_vm.restype = ctypes.c_ssize_t

    def arguments(self, variant: str, places: Sequence[tuple[int, int]]) -> Arguments:
        """Return what the calls of all places are given, for the `run` that follows.

        Args:
            variant: `file_io` or `process_vm`.
            places: Guest address, host address of the buffer's.
        """
        self._wanted = len(places) * self._n_bytes
        make = self._of_file if variant == "file_io" else self._of_process_vm
        return [one for addr, hva in places for one in make(addr, hva - self._base)]

    def run(self, variant: str, arguments: Arguments) -> int:
        """Make the calls; return ns.

        Raises:
            GroundError: They have not moved everything.
        """
        if variant == "file_io":
            fd, moved = self._ground.pool.arena.fd, 0
            file_io: Any = os.preadv if self._reads else os.pwritev
            start_ns = perf_counter_ns()
            for views, fo in arguments:
                moved += file_io(fd, views, fo)
            ns = perf_counter_ns() - start_ns
        else:
            call, pid, moved = self._process_vm, os.getpid(), 0
            start_ns = perf_counter_ns()
            for local, (remote, n) in arguments:
                moved += call(pid, local, 1, remote, n, 0)
            ns = perf_counter_ns() - start_ns
        if moved != self._wanted:
            raise GroundError(f"{variant} moved {moved} of {self._wanted} bytes")
        return ns

    def _of_file(self, addr: int, at: int) -> Arguments:
        found = []
        for fo, n_bytes in self._ground.pieces(addr, self._n_bytes):
            found.append(([self._view[at : at + n_bytes]], fo))
            at += n_bytes
        return found

    def _of_process_vm(self, addr: int, at: int) -> Arguments:
        base = self._ground.pool.arena.hva
        pieces = [(base + fo, n_bytes) for fo, n_bytes in self._ground.pieces(addr, self._n_bytes)]
        found = []
        for first in range(0, len(pieces), _IOVECS):
            part = pieces[first : first + _IOVECS]
            n_bytes = sum(n for _, n in part)
            numbers = (number for piece in part for number in piece)
            remote = (ctypes.c_size_t * (2 * len(part)))(*numbers)
            local = ctypes.byref(_IOVEC(self._base + at, n_bytes))
            found.append((local, (remote, len(part))))
            at += n_bytes
        return found
