"""Memory operands: which bytes of guest memory an instruction touches, and how.

KVM's emulator runs plain moves only. Where an instruction that it cannot run (AVX, x87, cmpxchg16b)
meets memory without a slot, the run loop asks here what the instruction is about to touch, makes
those pages present, and lets the CPU run it again. So the answer must be exact: an operand too
many, or `WRITE` for a load, would turn a legal access into a reported fault.

Capstone decodes. Its operand sizes are right but for a few (`_SIZE_BYTES`), its access flags are
not (movlps, vmovups, fstp and many more stores are flagged as reads), so access follows from the
rule of Intel syntax: a memory operand in first place is written, elsewhere read; `_READ_FIRST`,
`_MODIFY`, `_STORE` and `_NO_ACCESS` list what departs from it.

Left out on purpose: descriptor tables, I/O bitmap and shadow stacks (what the CPU walks is always
resident), the second half of an inter-privilege far return, and AVX-512 write masks (the operand is
taken whole).

Sources: SDM volume 2 (instruction reference); volume 1, 3.7.5 (addresses), 13.4 (XSAVE area).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE, WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.vmm.decode import (
    OP_MEM,
    OP_REG,
    UndecodableError,
    address_mask,
    decode,
    is_far,
    is_repeated,
    mnemonic,
    nesting,
    pushed_bytes,
    width_bytes,
)
from kvmmm.vmm.register_file import GPR_NAMES, RegisterFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.vmm.decode import Insn, Memory, Operand
    from kvmmm.vmm.register_file import Registers

XSAVE_LEGACY_BYTES = 512 + 64
"""x87 and SSE state with the XSAVE header."""
XSAVE_BYTES = XSAVE_LEGACY_BYTES + 256
"""The same with AVX: all of XCR0 = x87|SSE|AVX, which is what a vCPU starts with."""

_SEGMENT_PREFIX = {0x64: "fs", 0x65: "gs"}


class MemoryOperand:
    """Bytes that an instruction touches: `length_bytes` from guest-virtual address `gva`."""

    __slots__ = ("access", "gva", "length_bytes")

    def __init__(self, gva: int, length_bytes: int, access: int) -> None:
        self.gva = gva % ADDRESS_LIMIT
        self.length_bytes = length_bytes
        self.access = access

    def __contains__(self, gva: int) -> bool:
        return self.gva <= gva < self.gva + self.length_bytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MemoryOperand):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"MemoryOperand({self.gva:#x}, {self.length_bytes}, {self.access})"

    @property
    def _key(self) -> tuple[int, int, int]:
        return self.gva, self.length_bytes, self.access


# Every name that addresses a general register, and the 64-bit register that it is part of.
_FULL_NAME = (
    {name: name for name in GPR_NAMES}
    | {prefix + name[1:]: name for name in GPR_NAMES[:8] for prefix in ("e", "")}
    | {name + suffix: name for name in GPR_NAMES[8:] for suffix in "dw"}
)

# A first operand that is only read, though others follow it.
_READ_FIRST = frozenset({"cmp", "test", "bt", "cmpsb", "cmpsw", "cmpsd", "cmpsq"})

# Read, then written.
_MODIFY = frozenset(
    {
        *("add", "or", "adc", "sbb", "and", "sub", "xor", "inc", "dec", "not", "neg"),
        *("rol", "ror", "rcl", "rcr", "shl", "sal", "shr", "sar", "shld", "shrd"),
        *("bts", "btr", "btc", "xchg", "xadd", "cmpxchg", "cmpxchg8b", "cmpxchg16b"),
    }
)

# Written, though the operand stands alone.
_STORE = re.compile(
    r"pop|set\w+|fn?st(p|cw|sw|env)?|fisttp|fistp?|fbstp|fn?save|fxsave(64)?|xsave(opt|c|s)?(64)?"
    r"|v?stmxcsr|s[gil]dt|str|smsw|vmptrst"
)

# A memory operand that is an address, a hint or padding. clflush, clflushopt and clwb are not here:
# they need a readable page.
_NO_ACCESS = re.compile(
    r"lea|nop|ud[012]|prefetch\w*|v(gather|scatter)pf\w*|cldemote|invlpg|bnd\w+"
)

# Sizes that capstone gives wrongly (4 for fnsave, 8 for far pointers), by operand size 2, 4 and 8.
_SIZE_BYTES = {
    "fnstenv": {2: 14, 4: 28, 8: 28},
    "fldenv": {2: 14, 4: 28, 8: 28},
    "fnsave": {2: 94, 4: 108, 8: 108},
    "frstor": {2: 94, 4: 108, 8: 108},
    "far": {2: 4, 4: 6, 8: 10},
}
_FAR_LOAD = frozenset({"lfs", "lgs", "lss"})
_XSAVE = re.compile(r"x(save|rstor)\w*")

_VSIB = re.compile(r"v(?:p?gather|p?scatter)([dq])(d|q|ps|pd)")
_VMASKMOV = {"vmaskmovps": 4, "vmaskmovpd": 8, "vpmaskmovd": 4, "vpmaskmovq": 8}
_MASKMOV = {"maskmovq": 8, "maskmovdqu": 16, "vmaskmovdqu": 16}
_POSITIVE = frozenset(bytes([n]) for n in range(0x80))
_VECTOR_BYTES = {"x": 16, "y": 32, "z": 64}


def memory_operands(
    code: bytes, rip: int, regs: Registers, *, xsave_bytes: int = XSAVE_BYTES
) -> list[MemoryOperand]:
    """Return every memory operand of the instruction at `rip`, explicit and implicit.

    A string instruction gives the one element that it stands at, with `rep` too: the CPU updates
    rcx, rsi and rdi after each element, so it makes progress and faults again where the next page
    is missing; and no count, however wild, asks for pages that the loop may never reach.

    Args:
        code: Up to 15 bytes from guest-virtual address `rip`.
        rip: Where they lie.
        regs: Registers before the instruction.
        xsave_bytes: Size of the XSAVE area for the guest's XCR0 (CPUID leaf 0xd, EBX).

    Raises:
        UndecodableError: `reason` says whether the bytes or the vector registers are missing.
    """
    return operands_of(decode(code, rip), RegisterFile.of(regs), xsave_bytes)


def operands_of(
    insn: Insn, regs: RegisterFile, xsave_bytes: int = XSAVE_BYTES
) -> list[MemoryOperand]:
    """Return what `memory_operands` does, for an instruction that `decode` returned."""
    name = mnemonic(insn)
    if is_repeated(insn) and not regs.gpr["rcx"] & address_mask(insn):
        return []
    found = [*_implicit(insn, name, regs), *_stack(insn, name, regs)]
    n_operands = len(insn.operands)
    for position, op in enumerate(insn.operands):
        if op.type != OP_MEM or not (access := _access(name, position, n_operands)):
            continue
        if (match := _VSIB.fullmatch(name)) is not None:
            found += _elements(insn, op, match, access, regs)
        elif (lane_bytes := _VMASKMOV.get(name)) is not None:
            found += _masked(insn, op, lane_bytes, access, regs)
        else:
            gva = _address(insn, op.mem, regs, _bit_string_offset(insn, name, regs.gpr))
            length_bytes = _size_bytes(insn, name, op.size, regs.gpr, xsave_bytes)
            found.append(MemoryOperand(gva, length_bytes, access))
    return found


def _stack(insn: Insn, name: str, regs: RegisterFile) -> Iterator[MemoryOperand]:
    # What the instruction pushes or pops; in 64-bit mode rsp is always used whole.
    rsp, rbp = regs.gpr["rsp"], regs.gpr["rbp"]
    if length_bytes := pushed_bytes(insn):
        yield MemoryOperand(rsp - length_bytes, length_bytes, WRITE)
    elif name == "pop" or name.startswith("popf"):
        yield MemoryOperand(rsp, width_bytes(insn), READ)
    elif name == "ret":
        yield MemoryOperand(rsp, 8, READ)
    elif name.startswith("retf"):
        yield MemoryOperand(rsp, 2 * width_bytes(insn, default=4), READ)
    elif name.startswith("iret"):
        yield MemoryOperand(rsp, 5 * width_bytes(insn, default=4), READ)
    elif name == "leave":
        yield MemoryOperand(rbp, width_bytes(insn), READ)
    if name == "enter":
        yield from _frame(insn, rsp, rbp)


def _frame(insn: Insn, rsp: int, rbp: int) -> Iterator[MemoryOperand]:
    # What `enter` touches beside its pushes: the outer frame pointers that it copies; and, to see
    # whether the new stack may be written, the slot at its end (SDM, ENTER, exceptions).
    slot_bytes = width_bytes(insn)
    if nesting(insn) > 1:
        copied_bytes = (nesting(insn) - 1) * slot_bytes
        yield MemoryOperand(rbp - copied_bytes, copied_bytes, READ)
    if allocated_bytes := insn.operands[0].imm & 0xFFFF:
        new_rsp = rsp - pushed_bytes(insn) - allocated_bytes
        yield MemoryOperand(new_rsp, slot_bytes, WRITE)


def _implicit(insn: Insn, name: str, regs: RegisterFile) -> Iterator[MemoryOperand]:
    # Operands that are neither written in the instruction nor on the stack.
    gpr = regs.gpr
    base = regs.segment_base(_SEGMENT_PREFIX.get(insn.prefix[1], ""))
    mask = address_mask(insn)
    if name == "xlatb":
        yield MemoryOperand(base + (gpr["rbx"] + (gpr["rax"] & 0xFF) & mask), 1, READ)
    elif name in _MASKMOV:
        # The CPU may fault for masked bytes too (SDM: implementation-dependent).
        yield MemoryOperand(base + (gpr["rdi"] & mask), _MASKMOV[name], WRITE)
    elif name == "clzero":
        yield MemoryOperand(gpr["rax"] & mask & ~63, 64, WRITE)
    elif name == "movdir64b":
        target = _FULL_NAME[insn.reg_name(insn.operands[0].reg)]
        yield MemoryOperand(gpr[target] & mask, 64, WRITE)


def _access(name: str, position: int, n_operands: int) -> int:
    if _NO_ACCESS.fullmatch(name):
        return NO_ACCESS
    if name == "xchg" or (position == 0 and name in _MODIFY):
        return READ_WRITE
    if n_operands == 1:
        return WRITE if _STORE.fullmatch(name) else READ
    return WRITE if position == 0 and name not in _READ_FIRST else READ


def _size_bytes(insn: Insn, name: str, given: int, gpr: dict[str, int], xsave_bytes: int) -> int:
    if name.startswith(("fxsave", "fxrstor")):
        return 512
    if _XSAVE.fullmatch(name):
        # edx:eax chooses the components; bits 0 and 1 lie in the part that is always there.
        wanted = gpr["rdx"] << 32 | gpr["rax"] & 0xFFFFFFFF
        return xsave_bytes if wanted & ~3 else min(xsave_bytes, XSAVE_LEGACY_BYTES)
    kind = "far" if name in _FAR_LOAD or is_far(insn) else name
    if kind in _SIZE_BYTES:
        return _SIZE_BYTES[kind][width_bytes(insn, default=4)]
    return given or 1


def _address(insn: Insn, mem: Memory, regs: RegisterFile, extra_bytes: int = 0) -> int:
    # Base, scaled index and displacement wrap at the address size; then comes the segment base.
    gpr = regs.gpr
    base, index = insn.reg_name(mem.base) or "", insn.reg_name(mem.index) or ""
    if base in {"rip", "eip"}:
        offset = insn.address + insn.size
    else:
        offset = gpr.get(_FULL_NAME.get(base, ""), 0)
        if mnemonic(insn) == "pop" and base in {"rsp", "esp"}:
            offset += width_bytes(insn)  # it pops first, then computes where to (SDM, POP)
    # riz and eiz, capstone's "no index", have no value, like vector registers.
    offset += gpr.get(_FULL_NAME.get(index, ""), 0) * mem.scale + mem.disp + extra_bytes
    segment = insn.reg_name(mem.segment) if mem.segment else ""
    return (offset & address_mask(insn)) + regs.segment_base(segment)


def _bit_string_offset(insn: Insn, name: str, gpr: dict[str, int]) -> int:
    # bt, bts, btr and btc with a register address a bit string: the register's whole, signed value
    # counts bits from the operand, in steps of the operand size.
    if name not in {"bt", "bts", "btr", "btc"} or insn.operands[1].type != OP_REG:
        return 0
    source = insn.operands[1]
    bits = 8 * source.size
    index = gpr[_FULL_NAME[insn.reg_name(source.reg)]] & (1 << bits) - 1
    if index >> (bits - 1):
        index -= 1 << bits
    return index // bits * source.size


def _elements(
    insn: Insn, op: Operand, match: re.Match[str], access: int, regs: RegisterFile
) -> Iterator[MemoryOperand]:
    # Gather and scatter: base + index[i] * scale + disp for every element that the mask lets by.
    index_bytes = 4 if match[1] == "d" else 8
    lane_bytes = 4 if match[2] in {"d", "ps"} else 8
    number, indexes_bytes = _vector_register(insn.reg_name(op.mem.index))
    indexes = regs.regs.vector(number)
    if indexes is None or len(indexes) < indexes_bytes:
        raise UndecodableError(insn.address, bytes(insn.bytes), "its index register is not known")
    registers = [insn.reg_name(o.reg) for o in insn.operands if o.type == OP_REG]
    data_bytes = max(_vector_register(r)[1] for r in registers if r[1:3] == "mm")
    active = _active(registers, lane_bytes, regs)
    for i in range(min(data_bytes // lane_bytes, indexes_bytes // index_bytes)):
        if active(i):
            lane = indexes[i * index_bytes : (i + 1) * index_bytes]
            index = int.from_bytes(lane, "little", signed=True) * op.mem.scale
            yield MemoryOperand(_address(insn, op.mem, regs, index), lane_bytes, access)


def _masked(
    insn: Insn, op: Operand, lane_bytes: int, access: int, regs: RegisterFile
) -> Iterator[MemoryOperand]:
    # vmaskmov: from the first lane to the last that its mask, always operand 1, lets by. A loop
    # uses it to end exactly where its memory ends, so the lanes beyond must not count.
    active = _active([insn.reg_name(insn.operands[1].reg)], lane_bytes, regs)
    lanes = [i for i in range(op.size // lane_bytes) if active(i)]
    if lanes:
        gva = _address(insn, op.mem, regs) + lanes[0] * lane_bytes
        yield MemoryOperand(gva, (lanes[-1] - lanes[0] + 1) * lane_bytes, access)


def _active(registers: list[str], lane_bytes: int, regs: RegisterFile) -> Callable[[int], bool]:
    # The mask is an opmask register (AVX-512), or the last register's sign bit in each lane (AVX).
    opmask = next((r for r in registers if r[0] == "k"), None)
    if opmask is not None:
        bits = regs.regs.mask(int(opmask[1:]))
        return lambda i: bits is None or bool(bits >> i & 1)
    signs = regs.regs.vector(_vector_register(registers[-1])[0]) or b""
    # A lane whose sign is not known (an empty slice) counts.
    return lambda i: signs[(i + 1) * lane_bytes - 1 :][:1] not in _POSITIVE


def _vector_register(name: str) -> tuple[int, int]:
    # "ymm3" -> (3, 32)
    return int(name[3:]), _VECTOR_BYTES[name[0]]
