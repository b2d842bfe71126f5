"""The two consoles: a shared ring with a doorbell, and ports whose bytes KVM queues."""

from __future__ import annotations

import struct

from kvmmm.doctor.code import STEP, mov_eax, mov_ecx
from kvmmm.doctor.finding import Check, Finding, differs, missing, ok
from kvmmm.doctor.lab import Lab
from kvmmm.safemem.ffi import ffi, lib

_TEXT = b"through the ring"
_N_BYTES = 1500
"""More than KVM's ring holds, so that it must be emptied in between."""


def _displacement(struct_name: str, field: str) -> bytes:
    return struct.pack("<I", ffi.offsetof(f"struct {struct_name}", field))


def _exit_with(status: int) -> bytes:
    return mov_eax(status) + bytes((0xE7, lib.KVMMM_PORT_EXIT))  # out %eax, $PORT_EXIT


def _ring() -> Finding:
    copy_and_ring = (
        mov_ecx(len(_TEXT)) + b"\xf3\xa4"  # rep movsb
        + b"\x48\xc7\x83" + _displacement("kvmmm_console", "out_head")
        + struct.pack("<I", len(_TEXT))  # movq $len, out_head(%rbx)
        + bytes((0xE6, lib.KVMMM_PORT_DOORBELL))  # out %al, $DOORBELL
        + _exit_with(7)
    )  # fmt: skip
    code = (
        b"\x48\x8b\x9f" + _displacement("kvmmm_boot_info", "console")  # mov console(%rdi), %rbx
        + b"\x48\x8b\xbb" + _displacement("kvmmm_console", "out_data")  # mov out_data(%rbx), %rdi
        + b"\x48\x8d\x35" + struct.pack("<I", len(copy_and_ring))  # lea text(%rip), %rsi
        + copy_and_ring + _TEXT
    )  # fmt: skip
    with Lab(code) as lab:
        run_result = lab.run_raw()
        n_exits = lab.vm.statistics().exits
    if run_result.status != 7 or run_result.console != _TEXT:
        return missing(f"got {run_result.console!r} and status {run_result.status}")
    return ok(f"{len(_TEXT)} bytes with one doorbell, and the exit status: {n_exits['io']} exits")


def _coalesced() -> Finding:
    code = (
        b"\xb0\x0a"  # mov $'\n', %al: a line ends, so the host looks, and asks KVM to queue
        + bytes((0xE6, lib.KVMMM_PORT_DEBUGCON)) + mov_ecx(_N_BYTES) + b"\xb0\x2e"  # mov $'.', %al
        + bytes((0xE6, lib.KVMMM_PORT_DEBUGCON)) + b"\xff\xc9\x75\xfa"  # dec %ecx; jnz the out
        + STEP + _exit_with(0)
    )  # fmt: skip
    with Lab(code) as lab:
        run_result = lab.run_raw()
        stats = lab.vm.statistics()
    if run_result.console != b"\n" + b"." * _N_BYTES:
        return missing(f"{len(run_result.console)} bytes came of {_N_BYTES + 1}")
    if not stats.coalesced_bytes:
        return differs(
            "every byte is an exit: slower, not wrong", "print through the ring", value=0
        )
    return ok(
        f"{stats.coalesced_bytes} of {_N_BYTES + 1} bytes without an exit",
        value=stats.coalesced_bytes,
    )


CHECKS = (
    Check("console_ring", "console ring, doorbell", _ring),
    Check("coalesced_pio", "coalesced port output", _coalesced, is_needed=False),
)
