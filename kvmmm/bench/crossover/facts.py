"""What the header of a results file says about the host; nothing that names it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import kvmmm
from kvmmm.bench.host import host_record

_MIB = 1 << 20
_STEAL = 8


def host_facts() -> dict[str, Any]:
    """Return facts by name; None for what cannot be found out."""
    return _lasting_facts() | {
        "load": [round(x, 2) for x in os.getloadavg()],
        "steal_ticks": _steal_ticks(),
    }


@functools.cache
def _lasting_facts() -> dict[str, Any]:
    # Guests are run for some of them, which takes seconds: once a process. Many sweeps ask.
    facts = host_record()
    facts.pop("date", None)
    facts.pop("kvmmm", None)
    facts["ring0"] = facts.pop("kvm", None)
    return facts | {
        "kvm": _kvm_kind(),
        "microcode": _cpuinfo("microcode"),
        "tsc_mhz": _tsc_mhz(),
        "n_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB,
        "thp": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "thp_shmem": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "mitigations": _mitigations(),
        "max_map_count": _number("/proc/sys/vm/max_map_count"),
        "hypervisor": "hypervisor" in (_cpuinfo("flags") or "").split(),
    }


def commit() -> str | None:
    """Return the commit of the tree that this runs from, `+` for changes; None outside of one."""
    top = Path(kvmmm.__file__).parents[1]
    if not (top / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        return _git(top, "rev-parse", "--short=12", "HEAD") + (
            "+" if _git(top, "status", "--porcelain", "--untracked-files=no") else ""
        )
    return None


def _git(top: Path, *args: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(top), *args],
        capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
    return run.stdout.strip()


def _read(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return None


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdecimal() else None


def _chosen(path: str) -> str | None:
    # Of a line in which what is chosen stands in brackets.
    text = _read(path)
    return text[text.index("[") + 1 : text.index("]")] if text and "[" in text else None


def _cpuinfo(key: str) -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _tsc_mhz() -> float | None:
    # As the kernel told it; /proc/cpuinfo says how fast a CPU happens to be.
    khz = _number("/sys/devices/system/cpu/cpu0/tsc_freq_khz")
    if khz:
        return khz / 1e3
    text = _cpuinfo("cpu MHz")
    return float(text) if text else None


def _mitigations() -> dict[str, str]:
    folder = Path("/sys/devices/system/cpu/vulnerabilities")
    found = {}
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            text = _read(str(path))
            if text and not text.startswith("Not affected"):
                found[path.name] = text
    return found


def _kvm_kind() -> str | None:
    # By what it does. The doctor's own process: what it does is not to be seen in ours.
    with suppress(OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError):
        run = subprocess.run(
            [sys.executable, "-m", "kvmmm", "doctor", "--json"], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        return str(json.loads(run.stdout)["verdict"])
    return None


def _steal_ticks() -> int | None:
    fields = (_read("/proc/stat") or "").split("\n", 1)[0].split()
    return int(fields[_STEAL]) if len(fields) > _STEAL else None
