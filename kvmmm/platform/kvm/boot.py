"""The state in which a CPU starts: 64-bit ring 0, with everything it may push to or walk in place.

Tables rather than code: descriptors as numbers with their meaning beside them. Everything here
obeys what VMX checks at entry (SDM Vol. 3C 27.3.1), because SVM is silent about it and VMX is not.

    GDT, Linux's selector layout (the only one that every KVM runs natively in ring 3):
        0x10 kernel code   0x18 kernel data   0x20 user 32-bit code   0x28 user data
        0x30 user code     0x40 TSS (16 bytes)
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from kvmmm.safemem.ffi import ffi, lib

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_AM, CR0_PG = (
    1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 18, 1 << 31,
)  # fmt: skip
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_FSGSBASE, CR4_OSXSAVE = (
    1 << 5, 1 << 9, 1 << 10, 1 << 16, 1 << 18,
)  # fmt: skip
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
RFLAGS_RESERVED = 1 << 1

# Descriptors: base 0, limit 4 GiB, present, accessed (a CPU that must set "accessed" writes the
# table).
_KERNEL_CODE = 0x00AF_9B00_0000_FFFF  # L=1, type 11
_KERNEL_DATA = 0x00CF_9300_0000_FFFF  # type 3
_USER32_CODE = 0x00CF_FB00_0000_FFFF  # DPL 3, D=1, type 11
_USER_DATA = 0x00CF_F300_0000_FFFF  # DPL 3, type 3
_USER_CODE = 0x00AF_FB00_0000_FFFF  # DPL 3, L=1, type 11

_TSS_HEADER_BYTES = 104
_IO_PORTS = 0x400  # the bitmap covers ports below this
TSS_AVAILABLE, TSS_BUSY = 9, 11  # descriptor types (SDM Vol. 3A 3.5)
VMX_TSS_ADDR = 0xFFFB_D000
"""Where VMX keeps three pages of its own. Source: Linux api.rst, KVM_SET_TSS_ADDR."""
TSS_BYTES = _TSS_HEADER_BYTES + _IO_PORTS // 8 + 1  # the last byte is all ones, inside the limit
GDT_BYTES = 0x50
IDT_BYTES = 256 * 16
STUB_BYTES = 4
"""One stub a vector: its address tells the vector."""
STUBS_BYTES = 256 * STUB_BYTES

OPEN_PORTS = (
    # 0xb0 to 0xb7 for guests' own use, then ours. A 4-byte `out` needs all four ports, so the one
    # port that ring 3 may not use, KVMMM_PORT_TRAP, stands apart.
    *range(0xB0, lib.KVMMM_PORT_TRAP),
    lib.KVMMM_PORT_DEBUGCON,
    *range(lib.KVMMM_PORT_DEBUG_EXIT, lib.KVMMM_PORT_DEBUG_EXIT + 4),
    *range(lib.KVMMM_PORT_COM1, lib.KVMMM_PORT_COM1 + 8),
)
"""Ports that ring 3 may use, by the TSS's I/O bitmap. IOPL=3 does not work on every KVM."""

_IDT_GATE_INTERRUPT = 0x8E00  # present, DPL 0, interrupt gate
_IDT_GATE_USER = 0xEE00  # the same with DPL 3: int3 and into come from ring 3
_IST = 1


class BootLayout:
    """Addresses that the start state needs. Immutable.

    That of the root is guest-physical; the others are linear addresses, which are the same number
    under boot tables (`kernel_half` has others).
    """

    __slots__ = ("gdt_gpa", "idt_gpa", "ist_top_gpa", "root_gpa", "stubs_gpa", "tss_gpa")

    def __init__(
        self, *, root_gpa: int, gdt_gpa: int, idt_gpa: int, tss_gpa: int, stubs_gpa: int,
        ist_top_gpa: int,
    ) -> None:  # fmt: skip
        self.root_gpa = root_gpa
        self.gdt_gpa = gdt_gpa
        self.idt_gpa = idt_gpa
        self.tss_gpa = tss_gpa
        self.stubs_gpa = stubs_gpa
        self.ist_top_gpa = ist_top_gpa


@lru_cache(maxsize=8)
def gdt(tss_gpa: int) -> bytes:
    """Return the GDT. The TSS is busy (type 11) from the start, as TR says it is."""
    limit = TSS_BYTES - 1
    tss_low = (
        (limit & 0xFFFF)
        | (tss_gpa & 0xFF_FFFF) << 16
        | 0x8B << 40
        | (limit >> 16 & 0xF) << 48
        | (tss_gpa >> 24 & 0xFF) << 56
    )
    return struct.pack(
        "<10Q", 0, 0, _KERNEL_CODE, _KERNEL_DATA, _USER32_CODE, _USER_DATA, _USER_CODE, 0,
        tss_low, tss_gpa >> 32,
    )  # fmt: skip


@lru_cache(maxsize=8)
def tss(ist_top_gpa: int) -> bytes:
    """Return the TSS: ring-0 and IST1 stack, and the I/O bitmap that opens `OPEN_PORTS`."""
    header = bytearray(_TSS_HEADER_BYTES)
    struct.pack_into("<Q", header, 4, ist_top_gpa)  # RSP0
    struct.pack_into("<Q", header, 36, ist_top_gpa)  # IST1
    struct.pack_into("<H", header, 102, _TSS_HEADER_BYTES)  # where the bitmap starts
    bitmap = bytearray(b"\xff" * (_IO_PORTS // 8 + 1))
    for port in OPEN_PORTS:
        bitmap[port >> 3] &= ~(1 << (port & 7))
    return bytes(header + bitmap)


@lru_cache(maxsize=8)
def idt(stubs_gpa: int) -> bytes:
    """Return the default IDT: every vector enters its stub in ring 0, on the IST stack.

    The IST stack always exists; the guest's own may be absent, and a push to it would not be
    served.
    """
    table = bytearray()
    for vector in range(256):
        stub = stubs_gpa + vector * STUB_BYTES
        kind = _IDT_GATE_USER if vector in (3, 4) else _IDT_GATE_INTERRUPT
        table += struct.pack(
            "<HHHHII", stub & 0xFFFF, lib.KVMMM_KERNEL_CS, kind | _IST, stub >> 16 & 0xFFFF,
            stub >> 32, 0,
        )  # fmt: skip
    return bytes(table)


STUBS = bytes((0xE6, lib.KVMMM_PORT_TRAP, 0xEB, 0xFE)) * 256
"""The 256 stubs: `out %al, $PORT_TRAP; jmp .`; the host never returns into one."""


def syscall_stub() -> bytes:
    """Return the SYSCALL stub: `out %al, $PORT_SYSCALL; jmp .`; the host never returns into it."""
    return bytes((0xE6, lib.KVMMM_PORT_SYSCALL, 0xEB, 0xFE))


def vector_of_stub(rip: int, stubs_gpa: int) -> int | None:
    """Return the vector whose stub made the exit, or None.

    At an OUT exit rip is on the instruction on VMX and SVM, and past it elsewhere.
    """
    offset = rip - stubs_gpa
    if not 0 <= offset < STUBS_BYTES or offset % STUB_BYTES not in (0, 2):
        return None
    return offset // STUB_BYTES


def fill_sregs(sregs: Any) -> None:  # noqa: ANN401 - a cffi struct
    """Turn `sregs` (as KVM_GET_SREGS gave it) into 64-bit ring 0 without table addresses."""
    code = {"type": 11, "db": 0, "l": 1, "selector": lib.KVMMM_KERNEL_CS}
    data = {"type": 3, "db": 1, "l": 0, "selector": lib.KVMMM_KERNEL_DS}
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base = 0
        segment.limit = 0xFFFF_FFFF
        segment.present = segment.s = segment.g = 1
        segment.dpl = segment.avl = segment.unusable = 0
        for field, value in (code if name == "cs" else data).items():
            setattr(segment, field, value)
    tr, ldt = sregs.tr, sregs.ldt
    tr.selector = lib.KVMMM_TSS_SELECTOR
    tr.limit = TSS_BYTES - 1
    tr.type, tr.present = TSS_BUSY, 1
    tr.s = tr.dpl = tr.db = tr.l = tr.g = tr.avl = tr.unusable = 0
    ldt.unusable = 1
    ldt.present = 0
    sregs.gdt.limit = GDT_BYTES - 1
    sregs.idt.limit = IDT_BYTES - 1
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    sregs.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE


def load_return_segments(sregs: Any, cs: int, ss: int) -> None:  # noqa: ANN401 - a cffi struct
    """Set CS and SS as a return to selectors `cs` and `ss` does; the descriptors are ours."""
    ring = cs & 3
    sregs.cs.selector, sregs.ss.selector = cs, ss
    sregs.cs.dpl = sregs.ss.dpl = ring
    sregs.cs.type, sregs.ss.type = 11, 3
    sregs.cs.l, sregs.cs.db, sregs.ss.db = 1, 0, 1
    for segment in (sregs.cs, sregs.ss):
        segment.base = 0
        segment.limit = 0xFFFF_FFFF
        segment.present = segment.s = segment.g = 1
        segment.unusable = segment.avl = 0


def xcrs_with_avx() -> Any:  # noqa: ANN401 - a cffi array
    """Return a struct kvm_xcrs that sets XCR0 to x87 | SSE | AVX."""
    xcrs = ffi.new("uint8_t[392]")
    ffi.buffer(xcrs)[0:4] = struct.pack("<I", 1)  # nr_xcrs
    ffi.buffer(xcrs)[8:24] = struct.pack("<IIQ", 0, 0, 7)  # xcr, reserved, value
    return xcrs
