"""Instructions for a reader: the one at rip, those after it, and the store that has just been done.

At a KVM_EXIT_MMIO for a write, rip is already past the instruction and its registers have changed,
so the culprit has to be found backwards. x86 code cannot be read backwards with certainty; two
things make the answer good: the candidate must have written to the very address that faulted, and
of several candidates the one wins that most forward readings, from further up, arrive at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import WRITE
from kvmmm.hostarch.addr import ADDRESS_LIMIT, page_down
from kvmmm.vmm.decode import (
    MAX_INSN_BYTES,
    OP_MEM,
    OP_REG,
    UndecodableError,
    decode,
    is_far,
    is_repeated,
    is_string,
    mnemonic,
    pushed_bytes,
    text,
    width_bytes,
)
from kvmmm.vmm.operand import operands_of
from kvmmm.vmm.register_file import RegisterFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.decode import Insn
    from kvmmm.vmm.register_file import Registers

    Read = Callable[[int, int], bytes]
    """read(gva, n_bytes): up to n_bytes from there; fewer where the rest cannot be read."""

# How far back forward reading starts. Code read from a wrong byte falls into step after a few
# instructions, so the further up, the surer.
_RUN_UP_BYTES = 192

# es, cs, ss, ds: prefixes that do nothing in 64-bit mode.
_IDLE_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E})


def disassemble(code: bytes, rip: int) -> str | None:
    """Return the first instruction of `code` in Intel syntax; None when it is none.

    Args:
        code: Up to 15 bytes from guest-virtual address `rip`.
        rip: Where they lie.
    """
    try:
        return text(decode(code, rip))
    except UndecodableError:
        return None


def disassemble_around(read: Read, rip: int, n_after: int = 3) -> list[tuple[int, str]]:
    """Return (address, text) of the instruction at `rip` and of up to `n_after` behind it.

    Shorter, even empty, where the bytes are unreadable or no instruction.

    Args:
        read: Reads guest-virtual memory; may give fewer bytes than asked for.
        rip: Guest-virtual address of the first instruction.
        n_after: How many more.
    """
    code = read(rip, (1 + n_after) * MAX_INSN_BYTES)
    lines: list[tuple[int, str]] = []
    at = 0
    while at < len(code) and len(lines) <= n_after:
        try:
            insn = decode(code[at : at + MAX_INSN_BYTES], rip + at)
        except UndecodableError:
            break
        lines.append((rip + at, text(insn)))
        at += insn.size
    return lines


def store_ending_at(
    read: Read, rip: int, addr: int, regs: Registers, *, stored: int | None = None
) -> tuple[int, str] | None:
    """Find the store that has just been done, at a write exit, whose rip is past it.

    A candidate ends exactly at `rip`, and its written operand, computed with the registers wound
    back, covers `addr`. Two kinds end elsewhere: `rep stos` and `rep movs` keep rip on themselves
    to the last element, and a call leaves it at its target.

    Args:
        read: Reads guest-virtual memory; may give fewer bytes than asked for.
        rip: Guest-virtual address where the vCPU stands.
        addr: Guest-virtual address that was written.
        regs: Registers after the store. A store whose own address register it changed (`xchg
            [rax], rax`, a failed `cmpxchg [rax], rcx`) is not found.
        stored: What was written, where all 8 bytes are known: a call pushes its return address,
            the only way to find it.

    Returns:
        (rip of the store, its text), or None: the caller says "before rip".
    """
    after = RegisterFile.of(regs)
    repeated = _decoded(read(rip, MAX_INSN_BYTES), rip)
    if repeated is not None and is_repeated(repeated) and _wrote(repeated, addr, after):
        return rip, text(repeated)
    if stored is not None:
        calls = _ending_at(read, stored, lambda insn: _calls(insn, rip, read, after))
        if calls is not None and _wrote(calls, addr, after):
            return calls.address, text(calls)
    found = _ending_at(read, rip, lambda insn: _wrote(insn, addr, after))
    return None if found is None else (found.address, text(found))


def _ending_at(read: Read, end: int, accepts: Callable[[Insn], bool]) -> Insn | None:
    # The likeliest instruction that ends at `end`, of those that are accepted.
    code = _bytes_before(read, end)
    candidates = []
    for n in range(1, min(MAX_INSN_BYTES, len(code)) + 1):
        insn = _decoded(code[-n:], end - n)
        if insn is not None and insn.size == n and accepts(insn):
            candidates.append(insn)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    votes = _votes(code, end)
    return max(candidates, key=lambda c: (votes.get(c.address, 0), not _is_padded(c), c.size))


def _decoded(code: bytes, rip: int) -> Insn | None:
    try:
        return decode(code, rip)
    except UndecodableError:
        return None


def _bytes_before(read: Read, end: int) -> bytes:
    # What can be read directly below `end`, at most a run-up; the page below may be absent.
    for start in (max(0, end - _RUN_UP_BYTES), max(page_down(end - 1), end - _RUN_UP_BYTES)):
        code = read(start, end - start)
        if len(code) == end - start:
            return code
    return b""


def _wrote(insn: Insn, addr: int, after: RegisterFile) -> bool:
    try:
        operands = operands_of(insn, _wound_back(insn, after))
    except UndecodableError:
        return False
    return any(op.access & WRITE and addr in op for op in operands)


def _wound_back(insn: Insn, after: RegisterFile) -> RegisterFile:
    # The registers before `insn`, as far as its written operand depends on them.
    name, gpr = mnemonic(insn), after.gpr
    if name == "enter":
        # rbp points at the saved rbp, the first thing pushed.
        return after.changed(rsp=gpr["rbp"] + width_bytes(insn))
    if length_bytes := pushed_bytes(insn):
        return after.changed(rsp=gpr["rsp"] + length_bytes)
    if name == "pop":
        return after.changed(rsp=gpr["rsp"] - width_bytes(insn))
    if is_string(insn):
        step = after.step * insn.operands[0].size
        return after.changed(
            rdi=gpr["rdi"] - step, rsi=gpr["rsi"] - step, rcx=gpr["rcx"] + is_repeated(insn)
        )
    return after


def _calls(insn: Insn, target: int, read: Read, regs: RegisterFile) -> bool:
    # Whether `insn` is a near call to `target`; calls change none of what says where they go.
    if mnemonic(insn) != "call" or is_far(insn):
        return False
    op = insn.operands[0]
    if op.type == OP_REG:
        return regs.gpr.get(insn.reg_name(op.reg)) == target
    if op.type != OP_MEM:
        return op.imm & ADDRESS_LIMIT - 1 == target
    pointers = [o for o in operands_of(insn, _wound_back(insn, regs)) if not o.access & WRITE]
    return any(read(o.gva, 8) == target.to_bytes(8, "little") for o in pointers)


def _votes(code: bytes, end: int) -> dict[int, int]:
    # Which starting points in `code`, which ends at `end`, lead forward reading to an instruction
    # that ends there too, by the address of that instruction: the sum of their distances from
    # `end`, since those further up are in step by then. The instruction itself does not count.
    start = end - len(code)
    last: dict[int, int] = {}  # starting point -> address of the last instruction, read from there
    votes: dict[int, int] = {}
    for at in range(end - 1, start - 1, -1):
        insn = _decoded(code[at - start :], at)
        if insn is None:
            continue
        behind = at + insn.size
        if behind == end:
            last[at] = at
        elif behind in last:
            last[at] = found = last[behind]
            votes[found] = votes.get(found, 0) + end - at
    return votes


def _is_padded(insn: Insn) -> bool:
    # Whether it begins with a prefix that does nothing: sooner the end of what stands before it.
    if insn.bytes[0] in _IDLE_PREFIXES:
        return True
    rest = _decoded(bytes(insn.bytes[1:]), insn.address + 1)
    return rest is not None and rest.size == insn.size - 1 and text(rest) == text(insn)
