"""The guest: it stamps and reads every cell of a region, in turns, and never leaves by itself.

A *cell* is the first page of each stride of the region. Two words of it are used:

    0        everybody's: whoever stamps last
    8 + 8*v  that of vCPU number v alone

A stamp says where it belongs, who made it and when, so that a byte of somewhere else is known for
what it is, whether it came by a stale translation or through a frame that has a new owner:

     63         48 47        32 31     28 27             0
    +-------------+------------+---------+----------------+
    |    MAGIC    |    cell    |  vCPU   |      turn      |
    +-------------+------------+---------+----------------+

A word read is either zero or a stamp of that cell; and a vCPU's own word is either zero or what it
stored last, which it writes down in a page of its own. Anything else makes it leave by BAD_PORT.
"""

from __future__ import annotations

import struct

PAGE = 4096
MAGIC = 0x5A5A
POISON_WORD = 0xDEAD_BEEF_DEAD_BEEF
POISON = struct.pack("<Q", POISON_WORD) * (PAGE // 8)
BAD_PORT = 0xB0

TURN_BITS = 28
LAST_OFFSET = 64
"""Where in the page of its own a vCPU's last stamps begin; at 0 stands its number and its turn."""

# (offset, machine code, what it says); test_guest.py has it disassembled.
#
#     r12 region   rdx stride   edi cells   r11d MAGIC << 16   r13 vCPU and turn
#     r14 offset of the own word            r15 the page of its own
LISTING = (
    (0x00, "49 ff c5", "inc r13"),
    (0x03, "4d 89 2f", "mov qword ptr [r15], r13"),
    (0x06, "4c 89 e6", "mov rsi, r12"),
    (0x09, "4d 8d 57 40", "lea r10, [r15 + 0x40]"),
    (0x0D, "45 89 d8", "mov r8d, r11d"),
    (0x10, "41 89 f9", "mov r9d, edi"),
    # The cell at rsi.
    (0x13, "48 8b 06", "mov rax, qword ptr [rsi]"),
    (0x16, "48 85 c0", "test rax, rax"),
    (0x19, "74 0c", "je 0x27"),
    (0x1B, "48 89 c1", "mov rcx, rax"),
    (0x1E, "48 c1 e9 20", "shr rcx, 0x20"),
    (0x22, "44 39 c1", "cmp ecx, r8d"),
    (0x25, "75 47", "jne 0x6e"),
    (0x27, "4a 8b 04 36", "mov rax, qword ptr [rsi + r14]"),
    (0x2B, "48 85 c0", "test rax, rax"),
    (0x2E, "74 19", "je 0x49"),
    (0x30, "48 89 c1", "mov rcx, rax"),
    (0x33, "48 c1 e9 20", "shr rcx, 0x20"),
    (0x37, "44 39 c1", "cmp ecx, r8d"),
    (0x3A, "75 32", "jne 0x6e"),
    (0x3C, "49 8b 0a", "mov rcx, qword ptr [r10]"),
    (0x3F, "48 85 c9", "test rcx, rcx"),
    (0x42, "74 05", "je 0x49"),
    (0x44, "48 39 c8", "cmp rax, rcx"),
    (0x47, "75 25", "jne 0x6e"),
    (0x49, "4c 89 c3", "mov rbx, r8"),
    (0x4C, "48 c1 e3 20", "shl rbx, 0x20"),
    (0x50, "4c 09 eb", "or rbx, r13"),
    (0x53, "48 89 1e", "mov qword ptr [rsi], rbx"),
    (0x56, "4a 89 1c 36", "mov qword ptr [rsi + r14], rbx"),
    (0x5A, "49 89 1a", "mov qword ptr [r10], rbx"),
    # The next one: here the host has it go on when a cell cannot be accessed.
    (0x5D, "48 01 d6", "add rsi, rdx"),
    (0x60, "49 83 c2 08", "add r10, 8"),
    (0x64, "41 ff c0", "inc r8d"),
    (0x67, "41 ff c9", "dec r9d"),
    (0x6A, "75 a7", "jne 0x13"),
    (0x6C, "eb 92", "jmp 0"),
    (0x6E, "e6 b0", "out 0xb0, al"),
    (0x70, "eb fc", "jmp 0x6e"),
)
CODE = b"".join(bytes.fromhex(code) for _, code, _ in LISTING)
NEXT = 0x5D

_OWN_CHECK = 0x47
FORGETFUL_CODE = CODE[:_OWN_CHECK] + b"\x90\x90" + CODE[_OWN_CHECK + 2 :]
"""For a vCPU that changes address spaces, where its own words are others: it does not compare."""


def registers(
    number: int, region: int, stride_bytes: int, n_cells: int, own_page: int
) -> dict[str, int]:
    """What vCPU `number` begins with."""
    return {
        "r12": region, "rdx": stride_bytes, "rdi": n_cells, "r11": MAGIC << 16,
        "r13": number << TURN_BITS, "r14": 8 + 8 * number, "r15": own_page,
    }  # fmt: skip
