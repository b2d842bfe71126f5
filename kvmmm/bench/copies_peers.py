"""`bench copies`: the same few bytes as others move them: unicorn, and the kernel."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import START, GuestMemory, empty_loop
from kvmmm.bench.copies_small import SIZES, TIMES, WARM_BYTES, N, ours
from kvmmm.bench.guest import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmmm.bench.case import Probe, Sample

_UNICORN = "unicorn"
_IOVEC = ctypes.c_size_t * 2
"""struct iovec, <sys/uio.h>: address and length."""
_UNICORN_TIMES = tuple(time for time in TIMES if not time.startswith("copy_in"))


def _no_unicorn() -> str:
    if importlib.util.find_spec(_UNICORN) is None:
        return "unicorn is not installed (pip install --group bench)"
    return ""


def _by_unicorn(addresses: Sequence[int], content: bytes) -> Probe:
    unicorn: Any = importlib.import_module(_UNICORN)
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    machine.mem_map(START, WARM_BYTES)
    machine.mem_write(START, content)
    if machine.mem_read(START, WARM_BYTES) != content:
        raise BenchmarkError("unicorn does not read what was written")

    def probe() -> Sample:
        sample = {}
        for n_bytes in SIZES:
            data = bytes(range(n_bytes))
            loop_ns = empty_loop(addresses, 1)

            start_ns = perf_counter_ns()
            for addr in addresses:
                machine.mem_read(addr, n_bytes)
            sample[f"read_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / len(addresses)

            start_ns = perf_counter_ns()
            for addr in addresses:
                machine.mem_write(addr, data)
            out_ns = perf_counter_ns() - start_ns - loop_ns
            sample[f"copy_out_{n_bytes}"] = out_ns / len(addresses)
        return sample

    return probe


@contextmanager
def _beside_unicorn() -> Iterator[Mapping[str, Probe]]:
    with GuestMemory(WARM_BYTES) as memory:
        addresses = memory.addresses(N, SIZES[-1])
        content = memory.mm.read(START, WARM_BYTES)
        yield {
            "ours": ours(memory.mm, addresses), "unicorn": _by_unicorn(addresses, content)
        }  # fmt: skip


class _ProcessVm:
    """The two system calls on this process; all that can be made beforehand is."""

    def __init__(self, hva: int, addresses: Sequence[int]) -> None:
        libc = ctypes.CDLL(None)
        # As they come: with argtypes a call takes half as long again, with ready-made c_ulong a
        # tenth.
        self._read, self._write = libc.process_vm_readv, libc.process_vm_writev
        self._hva = hva
        self._addresses = addresses

    def measure(self) -> Sample:
        """Return ns a call, without the loop around it."""
        sample = {}
        read, write, n_calls = self._read, self._write, len(self._addresses)
        pid = os.getpid()
        for n_bytes in SIZES:
            buffer = ctypes.create_string_buffer(n_bytes)
            local = ctypes.byref(_IOVEC(ctypes.addressof(buffer), n_bytes))
            hvas = [self._hva + addr - START for addr in self._addresses]
            remotes = [ctypes.byref(_IOVEC(hva, n_bytes)) for hva in hvas]
            if read(pid, local, 1, remotes[0], 1, 0) != n_bytes:
                raise BenchmarkError("process_vm_readv does not read this process")
            loop_ns = empty_loop(remotes, 1)

            start_ns = perf_counter_ns()
            for remote in remotes:
                read(pid, local, 1, remote, 1, 0)
            in_ns = (perf_counter_ns() - start_ns - loop_ns) / n_calls
            sample[f"copy_in_{n_bytes}"] = sample[f"read_{n_bytes}"] = in_ns

            start_ns = perf_counter_ns()
            for remote in remotes:
                write(pid, local, 1, remote, 1, 0)
            sample[f"copy_out_{n_bytes}"] = (perf_counter_ns() - start_ns - loop_ns) / n_calls
        return sample


@contextmanager
def _beside_the_kernel() -> Iterator[Mapping[str, Probe]]:
    with GuestMemory(WARM_BYTES) as memory:
        addresses = memory.addresses(N, SIZES[-1])
        kernel = _ProcessVm(memory.hva_of(START), addresses)
        yield {"ours": ours(memory.mm, addresses), "process_vm": kernel.measure}


GROUPS = (
    Group(
        "copies: unicorn",
        (
            Case(
                "copies/small_unicorn", unit=RATIO, goal=18, better="higher", each=_UNICORN_TIMES,
                product=("unicorn", EACH), floor=("ours", EACH),
                note="8 and 64 bytes, warm: mem_read by read, mem_write by copy_out; worst",
            ),
        ),
        open=_beside_unicorn, rounds=100, quick_rounds=10, warm_up=3, missing=_no_unicorn,
    ),
    Group(
        "copies: process_vm_readv",
        (
            Case(
                "copies/small_process_vm", unit=RATIO, goal=50, better="higher", each=TIMES,
                product=("process_vm", EACH), floor=("ours", EACH),
                note="8 and 64 bytes, warm: ctypes with prepared iovecs, on this process; worst",
            ),
        ),
        open=_beside_the_kernel, rounds=100, quick_rounds=10, warm_up=3,
    ),
)  # fmt: skip
"""An emulator, and the kernel."""
