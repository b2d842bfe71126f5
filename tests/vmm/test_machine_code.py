"""The tests' own assembler against capstone."""

from __future__ import annotations

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs

from tests.vmm.machine_code import Code

CASES = [
    (Code().mov("rax", 0x1122334455667788), "movabs rax, 0x1122334455667788"),
    (Code().mov("r9", 5), "movabs r9, 5"),
    (Code().load("rdx", "rbx"), "mov rdx, qword ptr [rbx]"),
    (Code().load("r9", "r13"), "mov r9, qword ptr [r13]"),
    (Code().store("rbp", "r15"), "mov qword ptr [rbp], r15"),
    (Code().store("r8", "rcx"), "mov qword ptr [r8], rcx"),
    (Code().inc_at("rdi"), "inc qword ptr [rdi]"),
    (Code().inc_at("r14"), "inc qword ptr [r14]"),
    (Code().add("rbx", -8), "add rbx, -8"),
    (Code().dec("r11"), "dec r11"),
    (Code().jump("rsi"), "jmp rsi"),
    (Code().jump("r10"), "jmp r10"),
    (Code().call("r9"), "call r9"),
    (Code().raw("90 90").jump_back(1), "nop; nop; jmp 1"),
    (Code().raw("90").jump_back_unless_zero(0), "nop; jne 0"),
    (Code().spin(), "jmp 0"),
    (Code().out8(0xE9, 65), "mov al, 0x41; out 0xe9, al"),
    (Code().out32(0xB0), "out 0xb0, eax"),
    (Code().in8(0xB0), "in al, 0xb0"),
    (Code().exit(3), "mov al, 3; out 0xb8, al"),
    (
        Code().ring3(),
        "mov rcx, rsp; push 0x2b; push rcx; push 2; push 0x33; lea rax, [rip + 3]; push rax; iretq",
    ),
]


@pytest.mark.parametrize(("code", "listing"), CASES, ids=[text for _, text in CASES])
def test_code(code: Code, listing: str):
    insns = list(Cs(CS_ARCH_X86, CS_MODE_64).disasm(code.bytes, 0))
    assert "; ".join(f"{i.mnemonic} {i.op_str}".strip() for i in insns) == listing
    assert sum(i.size for i in insns) == len(code.bytes)
