"""/dev/kvm itself: whether it opens, what it offers, what a VM costs."""

from __future__ import annotations

import os
import time
from statistics import median

from kvmmm.doctor.code import END
from kvmmm.doctor.finding import Check, Finding, missing, ok
from kvmmm.doctor.lab import Lab
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.device import open_device

UPDATE = "update the kernel"


def _open() -> Finding:
    open_device()  # its error says what to type
    return ok(f"API version {abi.KVM_API_VERSION}, Linux {os.uname().release}")


def _capability(number: int, remedy: str) -> Finding:
    answer = open_device().capability(number)
    if not answer:
        return missing("KVM_CHECK_EXTENSION says 0", remedy)
    return ok(f"{answer}" if number == abi.KVM_CAP_NR_MEMSLOTS else "yes", value=answer)


_NEEDS_PLAIN_MOVES = (
    "Linux 5.14 has it; until then only plain moves may be the first to touch memory: no AVX, x87 "
    "or cmpxchg16b"
)

# Name, number, whether kvmmm works without it, what lacking it means.
_CAPABILITIES = (
    ("SYNC_REGS", abi.KVM_CAP_SYNC_REGS, True, UPDATE),
    ("IMMEDIATE_EXIT", abi.KVM_CAP_IMMEDIATE_EXIT, True, UPDATE),
    ("READONLY_MEM", abi.KVM_CAP_READONLY_MEM, True, UPDATE),
    ("SYNC_MMU", abi.KVM_CAP_SYNC_MMU, True, UPDATE),
    ("VCPU_EVENTS", abi.KVM_CAP_VCPU_EVENTS, False, UPDATE),
    (
        "EXIT_ON_EMULATION_FAILURE", abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, False,
        _NEEDS_PLAIN_MOVES,
    ),
    (
        "NR_MEMSLOTS", abi.KVM_CAP_NR_MEMSLOTS, False,
        "32 are assumed; guests that touch memory here and there get larger windows",
    ),
    ("SET_TSS_ADDR", abi.KVM_CAP_SET_TSS_ADDR, False, "only VMX needs it"),
    ("XCRS", abi.KVM_CAP_XCRS, False, "guests get no AVX"),
    (
        "COALESCED_PIO", abi.KVM_CAP_COALESCED_PIO, False,
        "every byte that a guest prints by a port is an exit; the shared console ring needs none",
    ),
    ("GET_TSC_KHZ", abi.KVM_CAP_GET_TSC_KHZ, False, "guests are not told the TSC's frequency"),
)  # fmt: skip


def _capability_check(name: str, number: int, is_needed: bool, remedy: str) -> Check:
    return Check(
        f"cap_{name.lower()}", name, lambda: _capability(number, remedy),
        is_needed=is_needed,
    )  # fmt: skip


def _create() -> Finding:
    times_ns = []
    for _ in range(5):
        began_ns = time.perf_counter_ns()
        with Lab(END, ring=0) as lab:
            lab.run()
        times_ns.append(time.perf_counter_ns() - began_ns)
    ms = median(times_ns) / 1e6
    return ok(f"{ms:.1f} ms from nothing to the first exit, and closed", value=ms)


def _physical_bits() -> Finding:
    bits = open_device().cpuid.physical_bits
    limit = 1 << bits
    shown = f"{limit >> 40} TiB" if limit >> 40 else f"{limit >> 30} GiB"
    return ok(f"{bits} bits, guest memory up to {shown}", value=bits)


OPEN = Check("open", "open /dev/kvm", _open)
"""The one without which no other is tried."""

CAPABILITIES = tuple(_capability_check(*capability) for capability in _CAPABILITIES)

CHECKS = (
    Check("create", "create a VM and a vCPU", _create),
    Check("physical_bits", "guest-physical addresses", _physical_bits),
)
