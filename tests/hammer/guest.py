"""The guest: it reads and stamps the cells of a region, in turns, and never leaves by itself.

A *cell* is the first page of each stride of the region. Two words of it are used:

    0        everybody's: whoever stamps last
    8 + 8*v  that of vCPU number v alone

A stamp says where it belongs, who made it and when, so that a byte of somewhere else is known for
what it is, whether it came by a stale translation or through a frame that has a new owner:

     63         48 47        32 31     30 29             0
    +-------------+------------+---------+----------------+
    |    MAGIC    |    cell    |  vCPU   |      turn      |
    +-------------+------------+---------+----------------+

A word read is either zero or a stamp of that cell; and a vCPU's own word is either zero or what it
stored last, which it writes down in a page of its own. Anything else makes it leave by BAD_PORT.
"""

from __future__ import annotations

import struct

PAGE = 4096
N_CELLS = 64
MAGIC = 0x5A5A
POISON_WORD = 0xDEAD_BEEF_DEAD_BEEF
POISON = struct.pack("<Q", POISON_WORD) * (PAGE // 8)
BAD_PORT = 0xB0

TURN_BITS = 30
_SKIP_MASK = 7
"""One cell in eight is stamped, the same for 2048 turns; what is only read stays translated."""
LAST_OFFSET, FLAGS_OFFSET = 64, 64 + 0x200
"""What is in the page of its own, by cell, 8 bytes each: the last stamp, and what not to try since
it was refused: LEAVE_ALONE, ONLY_READ. At 0 stand the vCPU's number and its turn."""
LEAVE_ALONE, ONLY_READ = 1, 2

# (offset, machine code, what it says); test_guest.py has it disassembled.
#
#     r12 region   rdx stride   edi cells   r11d MAGIC << 16   r13 vCPU and turn
#     r14 offset of the own word            r15 the page of its own     ebp which cells are skipped
LISTING = (
    (0x00, "49 ff c5", "inc r13"),
    (0x03, "4d 89 2f", "mov qword ptr [r15], r13"),
    (0x06, "4c 89 e6", "mov rsi, r12"),
    (0x09, "4d 8d 57 40", "lea r10, [r15 + 0x40]"),
    (0x0D, "45 89 d8", "mov r8d, r11d"),
    (0x10, "41 89 f9", "mov r9d, edi"),
    # The cell at rsi; unless it is left alone.
    (0x13, "41 f6 82 00 02 00 00 01", "test byte ptr [r10 + 0x200], 1"),
    (0x1B, "75 62", "jne 0x7f"),
    (0x1D, "48 8b 06", "mov rax, qword ptr [rsi]"),
    (0x20, "48 85 c0", "test rax, rax"),
    (0x23, "74 0c", "je 0x31"),
    (0x25, "48 89 c1", "mov rcx, rax"),
    (0x28, "48 c1 e9 20", "shr rcx, 0x20"),
    (0x2C, "44 39 c1", "cmp ecx, r8d"),
    (0x2F, "75 62", "jne 0x93"),
    (0x31, "4a 8b 04 36", "mov rax, qword ptr [rsi + r14]"),
    (0x35, "48 85 c0", "test rax, rax"),
    (0x38, "74 19", "je 0x53"),
    (0x3A, "48 89 c1", "mov rcx, rax"),
    (0x3D, "48 c1 e9 20", "shr rcx, 0x20"),
    (0x41, "44 39 c1", "cmp ecx, r8d"),
    (0x44, "75 4d", "jne 0x93"),
    (0x46, "49 8b 0a", "mov rcx, qword ptr [r10]"),
    (0x49, "48 85 c9", "test rcx, rcx"),
    (0x4C, "74 05", "je 0x53"),
    (0x4E, "48 39 c8", "cmp rax, rcx"),
    (0x51, "75 40", "jne 0x93"),
    (0x53, "41 f6 82 00 02 00 00 02", "test byte ptr [r10 + 0x200], 2"),
    (0x5B, "75 22", "jne 0x7f"),
    # Some turns stamp some cells, others others; the rest is only read.
    (0x5D, "4c 89 e9", "mov rcx, r13"),
    (0x60, "48 c1 e9 0b", "shr rcx, 0xb"),
    (0x64, "44 31 c1", "xor ecx, r8d"),
    (0x67, "85 e9", "test ecx, ebp"),
    (0x69, "75 14", "jne 0x7f"),
    (0x6B, "4c 89 c3", "mov rbx, r8"),
    (0x6E, "48 c1 e3 20", "shl rbx, 0x20"),
    (0x72, "4c 09 eb", "or rbx, r13"),
    (0x75, "48 89 1e", "mov qword ptr [rsi], rbx"),
    (0x78, "4a 89 1c 36", "mov qword ptr [rsi + r14], rbx"),
    (0x7C, "49 89 1a", "mov qword ptr [r10], rbx"),
    # The next one: here the host has it go on when a cell cannot be accessed.
    (0x7F, "48 01 d6", "add rsi, rdx"),
    (0x82, "49 83 c2 08", "add r10, 8"),
    (0x86, "41 ff c0", "inc r8d"),
    (0x89, "41 ff c9", "dec r9d"),
    (0x8C, "75 85", "jne 0x13"),
    (0x8E, "e9 6d ff ff ff", "jmp 0"),
    (0x93, "e6 b0", "out 0xb0, al"),
    (0x95, "eb fc", "jmp 0x93"),
)
CODE = b"".join(bytes.fromhex(code) for _, code, _ in LISTING)
NEXT = 0x7F

_OWN_CHECK = 0x51
FORGETFUL_CODE = CODE[:_OWN_CHECK] + b"\x90\x90" + CODE[_OWN_CHECK + 2 :]
"""For a vCPU that changes address spaces, where its own words are others: it does not compare."""


def registers(
    number: int, region: int, stride_bytes: int, n_cells: int, own_page: int
) -> dict[str, int]:
    """What vCPU `number` begins with."""
    return {
        "r12": region, "rdx": stride_bytes, "rdi": n_cells, "r11": MAGIC << 16,
        "r13": number << TURN_BITS, "r14": 8 + 8 * number, "r15": own_page, "rbp": _SKIP_MASK,
    }  # fmt: skip
