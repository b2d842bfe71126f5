"""Sizes, ratios, states and verdicts as people read them."""

from __future__ import annotations

from math import isinf
from typing import TYPE_CHECKING

from kvmmm.bench.crossover.crossing import Crossover, Parity, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmmm.bench.crossover.record import Cell

PAIR_NAMES = {
    "internal": "internal",
    "mirror": "ASIO, mirror",
    "walk": "ASIO, walk",
    "process_vm": "process_vm_readv/writev",
    "file_io": "pread/pwrite",
}
"""Variants by the name that a sample gives them. The last two are outside references."""

MECHANISMS = ("mirror", "walk")
"""Variants that the memory manager may choose instead of internal mappings."""

RESIDENCY_NAMES = {
    "warm": "warm",
    "mirror-cold": "mirror cold",
    "linear-cold": "linear mapping cold",
    "cold": "both cold",
    "absent": "page absent",
}

MARKS = ((512, "gVisor 512 B"), (32 << 10, "gVisor 32 KiB"))
"""rwMapMinBytes and copyMapMinBytes of gVisor's pkg/sentry/mm/io.go."""

DIMENSIONS = (
    ("operation", "Operation"),
    ("layout", "Layout"),
    ("locality", "Locality"),
    ("residency", "Residency"),
    ("page_bytes", "Page size"),
    ("caller", "Caller"),
)
"""What a cell is, besides its size: key and label. Layout stands for the number and the order."""


def pair_name(variant: str) -> str:
    """Return the name of a variant."""
    return PAIR_NAMES.get(variant, variant)


def dims_of(cell: Cell) -> tuple[str, ...]:
    """Return a cell's value in each of DIMENSIONS."""
    layout = f"{cell.layout} {cell.order}"
    return (
        cell.operation, layout, cell.locality, cell.residency, str(cell.page_bytes), cell.caller,
    )  # fmt: skip


def dim_name(key: str, value: str) -> str:
    """Return the name of a dimension's value."""
    if key == "layout":
        n_text, _, order = value.partition(" ")
        n = int(n_text)
        return "1 segment" if n == 1 else f"{n:,} segments, {order}"
    if key == "residency":
        return RESIDENCY_NAMES.get(value, value)
    if key == "page_bytes":
        return bytes_text(int(value))
    return {"c": "C loop", "python": "Python"}.get(value, value) if key == "caller" else value


def dim_order(key: str, value: str) -> tuple[int, str]:
    """Return what sorts a dimension's values: numbers by size, states from warm to absent."""
    if key == "layout":
        return int(value.partition(" ")[0]), value
    if key == "page_bytes":
        return int(value), ""
    orders = {
        "residency": list(RESIDENCY_NAMES),
        "operation": [
            "copy_in", "copy_out", "zero_out", "copy_in_to", "copy_out_from", "swap", "cas",
        ],
    }  # fmt: skip
    known = orders.get(key, [])
    return (known.index(value) if value in known else len(known)), value


def bytes_text(n: float) -> str:
    """Return a size with three digits at most."""
    for unit_bytes, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= unit_bytes:
            return f"{n / unit_bytes:.3g} {unit}"
    return f"{n:.0f} B"


def threshold_text(n: float) -> str:
    """Return a threshold: where internal mappings begin."""
    if n <= 0:
        return "internal always"
    return "internal never" if isinf(n) else bytes_text(n)


def ratio_text(ratio: float) -> str:
    """Return a ratio with about three digits that mean something."""
    if ratio >= 100:
        return f"{ratio:.0f}"
    if ratio < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def interval_text(low: float, high: float) -> str:
    """Return an interval of ratios."""
    return f"[{ratio_text(low)}, {ratio_text(high)}]"


def verdict_text(verdict: Verdict) -> str:
    """Return what a curve says, in words."""
    if isinstance(verdict, Crossover):
        below, above = (pair_name(side) for side in (verdict.below, verdict.above))
        return (
            f"crosses at {bytes_text(verdict.bytes)} (95 % {bytes_text(verdict.low)} to "
            f"{bytes_text(verdict.high)}): {below} below, {above} above; probability "
            f"{verdict.probability:.2f}; being 4 times wrong costs {verdict.regret:.0%} at most"
        )
    if isinstance(verdict, Parity):
        below = pair_name(verdict.below)
        return (
            f"does not cross: from {bytes_text(verdict.bytes)} on within 5 %; "
            f"where there is a winner below that, it is {below}"
        )
    return f"no threshold: {verdict.reason}"


def host_line(host: Mapping[str, object]) -> str:
    """Return the machine in one line: CPU, kernel, KVM kind."""
    kernel = f"Linux {host['kernel']}" if host.get("kernel") else None
    parts = [host.get("cpu"), kernel, kvm_kind(host)]
    return ", ".join(fact_text(part) for part in parts if part)


def kvm_kind(host: Mapping[str, object]) -> object:
    """Return what kind of KVM a host has: the doctor's verdict without its explanation."""
    kvm = host.get("kvm_kind") or host.get("kvm")
    return kvm.partition(":")[0].removeprefix("A ") if isinstance(kvm, str) else kvm


def fact_text(fact: object) -> str:
    """Return one fact about a host as text; what could not be found out says so."""
    if fact is None or fact == "":
        return "not known"
    if isinstance(fact, dict):
        return ", ".join(f"{key}: {fact_text(value)}" for key, value in fact.items())
    if isinstance(fact, list | tuple):
        return ", ".join(fact_text(value) for value in fact)
    return str(fact)


def unknowns(host: Mapping[str, object]) -> list[str]:
    """Return what a run on this host leaves open."""
    cpu = fact_text(host.get("cpu"))
    others = [name for name in ("Intel", "AMD") if name.lower() not in cpu.lower()]
    kvm = fact_text(kvm_kind(host))
    bare_metal = "Whether bare-metal EPT (Intel) or NPT (AMD) moves the crossovers is known only "
    return [
        f"Other kinds of KVM. This host: {kvm}. {bare_metal}where such a host was measured.",
        f"Other CPUs: {' and '.join(others)} {'was' if len(others) == 1 else 'were'} not measured.",
        f"NUMA, and more than {fact_text(host.get('n_cpus'))} CPUs: the sweep runs on one CPU.",
        "A guest that runs on another CPU during the copies: not part of this sweep.",
    ]
