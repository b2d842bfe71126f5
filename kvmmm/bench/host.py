"""Facts about this machine that a figure needs beside it; nothing that names it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_LOOP = 20_000
_INTERPRETED_NS = 20
"""A ring-0 dec/jnz pair takes a fraction of a ns on the CPU, and a µs where KVM interprets it."""


def host_record() -> dict[str, Any]:
    """Return the host record: kernel, CPU, governor, Python, kvmmm, what KVM does, when."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "governor": _governor(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kvmmm": _version(),
        "kvm": _kvm_behaviour(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return None


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version() -> str | None:
    try:
        return metadata.version("kvmmm")
    except metadata.PackageNotFoundError:
        return None


def _kvm_behaviour() -> dict[str, Any] | None:
    """Run a loop in ring 0 and see: ring 0 at the CPU's speed, or interpreted by KVM."""
    from kvmmm.errors import KvmmmError

    try:
        short_ns, long_ns = _ring0_ns(1), _ring0_ns(_LOOP)
    except KvmmmError:
        return None
    loop_ns = (long_ns - short_ns) / _LOOP
    return {
        "ring0": "interpreted" if loop_ns > _INTERPRETED_NS else "native",
        "ring0_loop_ns": round(max(loop_ns, 0.0), 1),
    }


def _ring0_ns(n: int) -> int:
    from time import perf_counter_ns

    from kvmmm.safemem.ffi import lib
    from kvmmm.vmm.microvm import MicroVM

    # mov $n, %ecx; 1: dec %ecx; jnz 1b; xor %eax, %eax; out %al, $PORT_EXIT; jmp .
    code = b"\xb9" + n.to_bytes(4, "little") + b"\xff\xc9\x75\xfc\x31\xc0\xe6"
    code += bytes((lib.KVMMM_PORT_EXIT,)) + b"\xeb\xfe"
    with MicroVM("4M") as vm:
        vm.load(code, base=0x200000)
        start_ns = perf_counter_ns()
        vm.run(timeout=10)
        return perf_counter_ns() - start_ns
