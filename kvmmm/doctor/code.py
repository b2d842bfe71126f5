"""Machine code that the guests share, as bytes with their assembly beside them.

A guest is three pages at `BASE`: code, data, stack. Everything else nobody has touched.
"""

from __future__ import annotations

import struct

from kvmmm.safemem.ffi import lib

MEMORY_BYTES = 16 << 20
BASE = 0x20_0000
DATA = BASE + 0x1000
STACK_TOP = BASE + 0x3000
UNTOUCHED = 0x40_0000
"""A window that no slot covers when the guest starts."""
ELSEWHERE = 0x1000_0000
"""A page beyond guest memory, for translations of a check's own."""

PORT_END = 0xB0
PORT_STEP = 0xB1
PORT_TICK = 0xB2
PORT_CLOSED = 0x80
"""The TSS's bitmap opens the first three to ring 3, and not the last."""

END = bytes((0xE6, PORT_END, 0xEB, 0xFE))  # out %al, $PORT_END; jmp .
STEP = bytes((0xE6, PORT_STEP))  # out %al, $PORT_STEP
SPIN = b"\xeb\xfe"  # jmp .
UD2 = b"\x0f\x0b"
INT3 = b"\xcc"
CS_TO_EAX = b"\x8c\xc8"  # mov %cs, %eax
SYSCALL = b"\x0f\x05"
WRMSR = b"\x0f\x30"
CPUID = b"\x0f\xa2"
LOAD = b"\x48\x8b\x04\x25"  # mov disp32, %rax; the address follows
STORE = b"\x48\x89\x04\x25"  # mov %rax, disp32

ENTER_RING3 = bytes((
    0x48, 0x89, 0xE0,  # mov %rsp, %rax
    0x6A, lib.KVMMM_USER_DS,  # push SS
    0x50,  # push RSP
    0x6A, 0x02,  # push RFLAGS
    0x6A, lib.KVMMM_USER_CS,  # push CS
    0x48, 0x8D, 0x05, 3, 0, 0, 0,  # lea 3(%rip), %rax: what follows the iretq
    0x50,  # push RIP
    0x48, 0xCF,  # iretq
))  # fmt: skip

RELOAD_CR3 = b"\x0f\x20\xd8\x0f\x22\xd8"  # mov %cr3, %rax; mov %rax, %cr3


def u32(value: int) -> bytes:
    """Return a 32-bit immediate or displacement."""
    return struct.pack("<I", value)


def mov_eax(value: int) -> bytes:
    """Return `mov $value, %eax`."""
    return b"\xb8" + u32(value)


def mov_rax(value: int) -> bytes:
    """Return `mov $value, %rax`."""
    return b"\x48\xb8" + struct.pack("<Q", value)


def mov_ecx(value: int) -> bytes:
    """Return `mov $value, %ecx`."""
    return b"\xb9" + u32(value)


def mov_edx(value: int) -> bytes:
    """Return `mov $value, %edx`."""
    return b"\xba" + u32(value)


def wrmsr(msr: int, value: int) -> bytes:
    """Return the code that sets a model-specific register; ring 0."""
    return mov_ecx(msr) + mov_eax(value & 0xFFFF_FFFF) + mov_edx(value >> 32) + WRMSR


def jump_back(n_bytes: int) -> bytes:
    """Return `jmp` to `n_bytes` before itself."""
    return bytes((0xEB, 256 - n_bytes - 2))
