"""`Code`: a few x86-64 instructions, assembled in place. No compiler runs where some tests do.

    Code().ring3().mov("rax", 0x400000).store("rax", "rcx").exit(0).bytes

Every method appends one instruction and returns the object, so that a guest reads like its listing;
test_machine_code.py compares each with capstone. `raw` takes what is needed once.
"""

from __future__ import annotations

import struct
from typing import Self

BASE = 0x200000
"""Where tests load flat code: pages [BASE, …) are rwx, the rest of guest memory rw."""

_REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)


def _number(register: str) -> tuple[int, int]:
    number = _REGISTERS.index(register)
    return number >> 3, number & 7


class Code:
    """Machine code under construction; jumps are relative, so it runs anywhere."""

    def __init__(self) -> None:
        self.bytes = b""

    @property
    def here(self) -> int:
        """Offset of the next instruction."""
        return len(self.bytes)

    def raw(self, code: str | bytes) -> Self:
        """Append bytes, or their hexadecimal text."""
        self.bytes += bytes.fromhex(code) if isinstance(code, str) else code
        return self

    def mov(self, register: str, value: int) -> Self:
        """Mov register, 64-bit immediate."""
        high, low = _number(register)
        return self.raw(bytes([0x48 | high, 0xB8 | low]) + struct.pack("<Q", value % (1 << 64)))

    def _indirect(self, opcode: bytes, pointer: str, register: int) -> Self:
        # [pointer + 0 as disp8]: the same form for all but rsp and r12, which need a SIB byte.
        high, low = _number(pointer)
        if low == 4:
            raise ValueError("rsp and r12 cannot be pointers here")
        rex = 0x48 | high | (register >> 3) << 2
        return self.raw(bytes([rex]) + opcode + bytes([0x40 | (register & 7) << 3 | low, 0]))

    def load(self, register: str, pointer: str) -> Self:
        """Mov register, [pointer]: 8 bytes."""
        high, low = _number(register)
        return self._indirect(b"\x8b", pointer, high << 3 | low)

    def store(self, pointer: str, register: str) -> Self:
        """Mov [pointer], register: 8 bytes."""
        high, low = _number(register)
        return self._indirect(b"\x89", pointer, high << 3 | low)

    def inc_at(self, pointer: str) -> Self:
        """Inc qword [pointer]: a read-modify-write."""
        return self._indirect(b"\xff", pointer, 0)

    def add(self, register: str, value: int) -> Self:
        """Add register, signed 32-bit immediate."""
        high, low = _number(register)
        return self.raw(bytes([0x48 | high, 0x81, 0xC0 | low]) + struct.pack("<i", value))

    def dec(self, register: str) -> Self:
        """Dec register."""
        high, low = _number(register)
        return self.raw(bytes([0x48 | high, 0xFF, 0xC8 | low]))

    def jump(self, register: str) -> Self:
        """Jmp register."""
        high, low = _number(register)
        return self.raw(bytes([0x40 | high, 0xFF, 0xE0 | low]))

    def call(self, register: str) -> Self:
        """Call register."""
        high, low = _number(register)
        return self.raw(bytes([0x40 | high, 0xFF, 0xD0 | low]))

    def jump_back(self, offset: int) -> Self:
        """Jmp to an earlier offset."""
        return self.raw(b"\xe9" + struct.pack("<i", offset - self.here - 5))

    def jump_back_unless_zero(self, offset: int) -> Self:
        """Jnz to an earlier offset."""
        return self.raw(b"\x0f\x85" + struct.pack("<i", offset - self.here - 6))

    def spin(self) -> Self:
        """Jmp to itself."""
        return self.raw("eb fe")

    def out8(self, port: int, value: int) -> Self:
        """Mov al, value; out port, al."""
        return self.raw(bytes([0xB0, value & 0xFF, 0xE6, port]))

    def out32(self, port: int) -> Self:
        """Out port, eax."""
        return self.raw(bytes([0xE7, port]))

    def in8(self, port: int) -> Self:
        """In al, port."""
        return self.raw(bytes([0xE4, port]))

    def exit(self, status: int = 0) -> Self:
        """End the run with a status."""
        return self.out8(0xB8, status)

    def ring3(self) -> Self:
        """Go on in ring 3, on the same stack; changes rax and rcx."""
        # mov rcx, rsp; push USER_DS; push rcx; push 2; push USER_CS; lea rax, [rip + 3]; push rax
        return self.raw("48 89 e1 6a 2b 51 6a 02 6a 33 48 8d 05 03 00 00 00 50 48 cf")

    def ring(self, number: int) -> Self:
        """Go on in that ring: 0, as one starts, or 3."""
        return self.ring3() if number else self
