"""Decoding one x86-64 instruction: capstone behind types, and the few facts that it leaves to us.

Capstone takes 70 ms to import, so nothing here does it before the first instruction is decoded.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Protocol

from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_INSN_BYTES = 15

# capstone.x86's X86_OP_REG and X86_OP_MEM, as numbers so that nobody imports capstone for them.
OP_REG = 1
OP_MEM = 3

_PREFIX_OPERAND_SIZE = 0x66
_ESCAPE = 0x0F
_STRING = re.compile(r"(movs|stos|lods|scas|cmps|ins|outs)[bwdq]")


class Memory(Protocol):
    """Capstone's x86_op_mem: segment:[base + index * scale + disp]; registers by number."""

    segment: int
    base: int
    index: int
    scale: int
    disp: int


class Operand(Protocol):
    """Capstone's cs_x86_op: `size` in bytes; which of the others counts is said by `type`."""

    type: int
    size: int
    reg: int
    imm: int
    mem: Memory


class Insn(Protocol):
    """Capstone's CsInsn, as far as it is used; operands in Intel order, destination first."""

    address: int
    size: int
    mnemonic: str
    op_str: str
    bytes: bytearray
    prefix: Sequence[int]
    rex: int
    opcode: Sequence[int]
    modrm: int
    addr_size: int
    operands: Sequence[Operand]

    def reg_name(self, register: int) -> str:
        """Return the name of a capstone register number."""
        ...


class UndecodableError(KvmmmError, ValueError):
    """Bytes that are no instruction, or one whose operands cannot be known.

    Attributes:
        rip: Guest-virtual address of the first byte.
        code: The bytes.
        reason: Why, half a sentence.
    """

    def __init__(self, rip: int, code: bytes, reason: str) -> None:
        self.rip = rip
        self.code = code
        self.reason = reason
        super().__init__(f"cannot tell what the instruction at {rip:#x} does: {reason}")


# One decoder a thread: vCPUs decode at the same time, and a capstone handle keeps its last error.
_decoder = threading.local()


def decode(code: bytes, rip: int) -> Insn:
    """Return the first instruction in `code`.

    Args:
        code: Up to 15 bytes from guest-virtual address `rip`; what follows is ignored.
        rip: Where they lie.

    Raises:
        UndecodableError: They are no instruction, or not all of one.
    """
    if not hasattr(_decoder, "cs"):
        import capstone

        _decoder.cs = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        _decoder.cs.detail = True
    code = bytes(code[:MAX_INSN_BYTES])
    insn: Insn | None = next(_decoder.cs.disasm(code, rip, 1), None)
    if insn is None:
        short = ", or its rest is unreadable" if len(code) < MAX_INSN_BYTES else ""
        reason = f"{code.hex(' ') or 'no bytes'}: no known instruction{short}"
        raise UndecodableError(rip, code, reason)
    return insn


def text(insn: Insn) -> str:
    """Return the instruction as one reads it, Intel syntax."""
    return f"{insn.mnemonic} {insn.op_str}".rstrip()


def mnemonic(insn: Insn) -> str:
    """Return the bare name, without `lock`, `rep` and `bnd`, which capstone puts before it."""
    return insn.mnemonic.rpartition(" ")[2]


def is_string(insn: Insn) -> bool:
    """Return whether this is a string instruction, not an SSE namesake: movsd, cmpsd."""
    return _STRING.fullmatch(mnemonic(insn)) is not None and insn.opcode[0] != _ESCAPE


def is_repeated(insn: Insn) -> bool:
    """Return whether this is a string instruction under rep, repe or repne."""
    return insn.mnemonic.startswith("rep") and is_string(insn)


def is_far(insn: Insn) -> bool:
    """Return whether this calls or jumps through a far pointer in memory: opcode ff /3 or ff /5."""
    return insn.opcode[0] == 0xFF and (insn.modrm >> 3) & 7 in {3, 5}


def width_bytes(insn: Insn, *, default: int = 8) -> int:
    """Return the operand size in bytes, for instructions whose default is not that of `mov`.

    Source: SDM volume 1, table 3-4: REX.W wins over the operand-size prefix.
    """
    if insn.rex & 8:
        return 8
    return 2 if insn.prefix[2] == _PREFIX_OPERAND_SIZE else default


def address_mask(insn: Insn) -> int:
    """Return the mask at which address arithmetic wraps: 32 bits with prefix 67, else 64."""
    return (1 << 8 * insn.addr_size) - 1


def pushed_bytes(insn: Insn) -> int:
    """Return how many bytes the instruction pushes, `enter` with its frame pointers; mostly 0."""
    name = mnemonic(insn)
    if name.startswith("push"):
        return width_bytes(insn)
    if name in {"call", "lcall"}:
        return 2 * width_bytes(insn, default=4) if is_far(insn) else 8
    if name == "enter":
        # rbp; then, for a nested frame, the outer frames' pointers and this one's.
        return (1 + nesting(insn)) * width_bytes(insn)
    return 0


def nesting(insn: Insn) -> int:
    """Return the nesting level of an `enter`, modulo 32 as the CPU takes it."""
    return insn.operands[1].imm & 31
