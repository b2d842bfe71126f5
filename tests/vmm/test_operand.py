"""Memory operands: a table of instructions, an independent address computation, and the CPU itself."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.vmm.decode import UndecodableError, decode
from kvmmm.vmm.operand import GPR_NAMES, MemoryOperand, memory_operands

CODE = 0x30000000
_ACCESS = {"r": READ, "w": WRITE, "rw": READ_WRITE}

VALUES = {
    **{"rax": 7, "rbx": 0x50000, "rcx": 3, "rdx": 0, "rsi": 0x60000, "rdi": 0x70000},
    **{"rbp": 0x81000, "rsp": 0x90000, "r8": -16 % 2**64, "r9": 0x1_0000_1000, "r10": -65 % 2**64},
    **{"r11": 200, "r12": 0x40, "r13": 0xA0000, "r14": 0, "r15": 2**64 - 4},
}
FS_BASE, GS_BASE = 0x7F00_0000_0000, 0x6F00_0000_0000
VECTORS = [
    bytes(32),
    struct.pack("<8i", -1, 1, -1, -1, -1, 0, -1, -1),
    struct.pack("<8i", 0, -3, 300, 5, 1000, -900, 7, 8),
    struct.pack("<8i", -1, -1, 0, -1, -1, -1, -1, 0),
]

# instruction | its operands: address (hex) + size (decimal) access
TABLE = """
mov %rax,(%rdi)                       | 70000+8w
mov (%rdi),%al                        | 70000+1r
movw $1,8(%rdi)                       | 70008+2w
movabs %rax,0x1122334455667788        | 1122334455667788+8w
movzbl (%rdi),%eax                    | 70000+1r
movslq (%rdi),%rax                    | 70000+4r
movbe %rax,(%rdi)                     | 70000+8w
movbe (%rdi),%eax                     | 70000+4r
movnti %rax,(%rdi)                    | 70000+8w
mov %ds,(%rdi)                        | 70000+2w
rex.W mov %ds,(%rdi)                  | 70000+2w
add %eax,(%rdi)                       | 70000+4rw
add (%rdi),%eax                       | 70000+4r
cmp %eax,(%rdi)                       | 70000+4r
test %eax,(%rdi)                      | 70000+4r
testb $1,(%rdi)                       | 70000+1r
notq (%rdi)                           | 70000+8rw
rcll $1,(%rdi)                        | 70000+4rw
sarb %cl,(%rdi)                       | 70000+1rw
shld $3,%rax,(%rdi)                   | 70000+8rw
mulq (%rdi)                           | 70000+8r
imul $3,(%rdi),%rax                   | 70000+8r
sete (%rdi)                           | 70000+1w
cmove (%rdi),%rax                     | 70000+8r
popcnt (%rdi),%rax                    | 70000+8r
pdep (%rdi),%rax,%rbx                 | 70000+8r
crc32q (%rdi),%rax                    | 70000+8r
lock incl (%rdi)                      | 70000+4rw
xchg %rax,(%rdi)                      | 70000+8rw
lock xadd %rax,(%rdi)                 | 70000+8rw
lock cmpxchg %rax,(%rdi)              | 70000+8rw
lock cmpxchg8b (%rdi)                 | 70000+8rw
lock cmpxchg16b (%rdi)                | 70000+16rw
bt %r11,(%rdi)                        | 70018+8r
bts %r10,(%rdi)                       | 6fff0+8rw
btr %r10d,(%rdi)                      | 6fff4+4rw
btc %r11w,(%rdi)                      | 70018+2rw
btl $5,(%rdi)                         | 70000+4r
btsq $77,(%rdi)                       | 70000+8rw
mov 0x20(%rip),%rax                   | 30000027+8r
movb $1,0x20(%rip)                    | 30000027+1w
mov %fs:8,%rax                        | 7f0000000008+8r
mov %rax,%gs:(%rdi)                   | 6f0000070000+8w
mov %fs:(%r8),%eax                    | 7effffffffff0+4r
mov (%edi),%eax                       | 70000+4r
mov (%r9d),%eax                       | 1000+4r
mov -4(%r14d),%eax                    | fffffffc+4r
mov %fs:-4(%r14d),%eax                | 7f00fffffffc+4r
mov 0x10(%rdi,%r12,4),%eax            | 70110+4r
mov (%rdi,%r8,2),%eax                 | 6ffe0+4r
mov 0x1000(,%r12,8),%al               | 1200+1r
mov %rax,(%r15)                       | fffffffffffffffc+8w
lea (%rdi),%rax                       |
nopw 8(%rdi)                          |
prefetcht0 (%rdi)                     |
prefetchw (%rdi)                      |
cldemote (%rdi)                       |
clflush (%rdi)                        | 70000+1r
clwb (%rdi)                           | 70000+1r
push %rax                             | 8fff8+8w
push $1                               | 8fff8+8w
pushw %ax                             | 8fffe+2w
push (%rdi)                           | 8fff8+8w 70000+8r
push (%rsp)                           | 8fff8+8w 90000+8r
push %fs                              | 8fff8+8w
pushf                                 | 8fff8+8w
pop %rax                              | 90000+8r
popw %ax                              | 90000+2r
pop (%rdi)                            | 90000+8r 70000+8w
pop 8(%rsp)                           | 90000+8r 90010+8w
popf                                  | 90000+8r
call *(%rdi)                          | 8fff8+8w 70000+8r
call *%rax                            | 8fff8+8w
call .+0x100                          | 8fff8+8w
lcall *(%rdi)                         | 8fff8+8w 70000+6r
rex.W lcall *(%rdi)                   | 8fff0+16w 70000+10r
jmp *8(%rdi)                          | 70008+8r
ljmp *(%rdi)                          | 70000+6r
ret                                   | 90000+8r
ret $8                                | 90000+8r
rep ret                               | 90000+8r
lretl                                 | 90000+8r
lretq                                 | 90000+16r
iretq                                 | 90000+40r
iretl                                 | 90000+20r
enter $16,$0                          | 8fff8+8w
enter $16,$3                          | 8ffe0+32w 80ff0+16r
leave                                 | 81000+8r
movsq                                 | 70000+8w 60000+8r
rep movsb                             | 70000+1w 60000+1r
rep stosq                             | 70000+8w
stosw                                 | 70000+2w
lodsl                                 | 60000+4r
lodsq %gs:(%rsi),%rax                 | 6f0000060000+8r
movsl %fs:(%esi),%es:(%edi)           | 70000+4w 7f0000060000+4r
repne scasb                           | 70000+1r
repe cmpsw                            | 60000+2r 70000+2r
insl                                  | 70000+4w
rep outsb                             | 60000+1r
xlat                                  | 50007+1r
xlat %gs:(%rbx)                       | 6f0000050007+1r
movss (%rdi),%xmm1                    | 70000+4r
movss %xmm1,(%rdi)                    | 70000+4w
movsd %xmm1,(%rdi)                    | 70000+8w
movaps %xmm1,(%rdi)                   | 70000+16w
movups %xmm1,9(%rdi)                  | 70009+16w
movdqu (%rdi),%xmm1                   | 70000+16r
movlps %xmm1,(%rdi)                   | 70000+8w
movhpd %xmm1,(%rdi)                   | 70000+8w
movhps (%rdi),%xmm1                   | 70000+8r
movq %xmm1,(%rdi)                     | 70000+8w
movd %xmm1,(%rdi)                     | 70000+4w
movntdq %xmm1,(%rdi)                  | 70000+16w
pextrb $1,%xmm1,(%rdi)                | 70000+1w
extractps $1,%xmm1,(%rdi)             | 70000+4w
pinsrw $1,(%rdi),%xmm1                | 70000+2r
pmovzxbq (%rdi),%xmm1                 | 70000+2r
cvtsi2sdq (%rdi),%xmm1                | 70000+8r
roundsd $1,(%rdi),%xmm1               | 70000+8r
cmpsd $1,(%rdi),%xmm1                 | 70000+8r
ucomiss (%rdi),%xmm1                  | 70000+4r
maskmovdqu %xmm1,%xmm2                | 70000+16w
movq %mm1,(%rdi)                      | 70000+8w
maskmovq %mm1,%mm2                    | 70000+8w
punpckldq (%rdi),%mm1                 | 70000+4r
ldmxcsr (%rdi)                        | 70000+4r
stmxcsr (%rdi)                        | 70000+4w
vmovups %ymm1,(%rdi)                  | 70000+32w
vmovdqu (%rdi),%ymm1                  | 70000+32r
vmovaps %xmm1,(%rdi)                  | 70000+16w
vmovss %xmm1,(%rdi)                   | 70000+4w
vmovlps (%rdi),%xmm1,%xmm2            | 70000+8r
vmovhps %xmm1,(%rdi)                  | 70000+8w
vpaddd (%rdi),%ymm1,%ymm2             | 70000+32r
vpslld (%rdi),%ymm1,%ymm2             | 70000+16r
vbroadcastss (%rdi),%ymm1             | 70000+4r
vbroadcasti128 (%rdi),%ymm1           | 70000+16r
vextracti128 $1,%ymm1,(%rdi)          | 70000+16w
vinsertf128 $1,(%rdi),%ymm1,%ymm2     | 70000+16r
vcvtps2ph $0,%ymm1,(%rdi)             | 70000+16w
vpmovsxbq (%rdi),%ymm1                | 70000+4r
vmovddup (%rdi),%xmm1                 | 70000+8r
vfmadd231ss (%rdi),%xmm1,%xmm2        | 70000+4r
vmaskmovps (%rdi),%ymm1,%ymm2         | 70000+32r
vmaskmovps %ymm1,%ymm2,(%rdi)         | 70004+20w
vpmaskmovq (%rdi),%ymm3,%ymm2         | 70000+24r
vpmaskmovd (%rdi),%ymm0,%ymm2         |
vpgatherdd %ymm3,(%rdi,%ymm2,4),%ymm1 | 70000+4r 6fff4+4r 70014+4r 70fa0+4r 6f1f0+4r 7001c+4r
vpgatherdq %ymm3,8(%rdi,%xmm2,8),%ymm1 | 70008+8r 70030+8r 6fff0+8r
vgatherqpd %xmm3,(%rdi,%xmm0,8),%xmm1 | 70000+8r 70000+8r
flds (%rdi)                           | 70000+4r
fldt (%rdi)                           | 70000+10r
fstps (%rdi)                          | 70000+4w
fstpl (%rdi)                          | 70000+8w
fstpt (%rdi)                          | 70000+10w
fistpq (%rdi)                         | 70000+8w
fisttps (%rdi)                        | 70000+2w
fildl (%rdi)                          | 70000+4r
fbld (%rdi)                           | 70000+10r
fbstp (%rdi)                          | 70000+10w
faddl (%rdi)                          | 70000+8r
fcoms (%rdi)                          | 70000+4r
fnstcw (%rdi)                         | 70000+2w
fldcw (%rdi)                          | 70000+2r
fnstsw (%rdi)                         | 70000+2w
fnstenv (%rdi)                        | 70000+28w
fldenvs (%rdi)                        | 70000+14r
fnsave (%rdi)                         | 70000+108w
frstors (%rdi)                        | 70000+94r
fxsave (%rdi)                         | 70000+512w
fxrstor64 (%rdi)                      | 70000+512r
xsave (%rdi)                          | 70000+832w
xrstor (%rdi)                         | 70000+832r
sgdt (%rdi)                           | 70000+10w
lidt (%rdi)                           | 70000+10r
smsw (%rdi)                           | 70000+2w
invlpg (%rdi)                         |
lss (%rdi),%eax                       | 70000+6r
clzero                                | 0+64w
rdfsbase %rax                         |
syscall                               |
"""

# Not for the CPU under a test: they need ring 0, a segment base, or leave with what they loaded.
_NOT_NATIVE = (
    *("movabs", "mov %fs", "mov %rax,%gs", "mov %rax,(%r15)", "sgdt", "smsw", "lss", "syscall"),
    *("rdfsbase", "lcall", "ljmp", "rex.W lcall", "call .", "clzero", "mov %ds", "mov 0x1000"),
    *("mov -4(%r14d", "mov (%r9d", "xlat %gs", "lodsq %gs", "movsl %fs", "push %fs"),
)


class _Registers(SimpleNamespace):
    vectors = VECTORS

    def vector(self, number: int) -> bytes:
        return self.vectors[number]

    def mask(self, _number: int) -> int | None:
        return None


def registers(**values: int) -> _Registers:
    given = {"rip": CODE, "rflags": 2, "fs_base": FS_BASE, "gs_base": GS_BASE}
    return _Registers(**(VALUES | given | values))


def rows() -> list[tuple[str, list[MemoryOperand]]]:
    parsed = []
    for line in TABLE.strip().splitlines():
        text, _, operands = line.partition("|")
        expected = []
        for operand in operands.split():
            addr, _, rest = operand.partition("+")
            size = rest.rstrip("rw")
            expected.append(MemoryOperand(int(addr, 16), int(size), _ACCESS[rest[len(size) :]]))
        parsed.append((text.strip(), expected))
    return parsed


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Machine code of every row, 16 bytes each: the instruction, then nops."""
    for tool in ("as", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (binutils) to assemble the table")
    if platform.machine() != "x86_64":
        pytest.skip("needs an assembler for x86-64")
    path = tmp_path_factory.mktemp("operand")
    texts = [text for text, _ in rows()]
    (path / "a.s").write_text("".join(f"{text}\n.balign 16, 0x90\n" for text in texts))
    subprocess.run(["as", "-o", path / "a.o", path / "a.s"], check=True, capture_output=True)
    subprocess.run(["objcopy", "-O", "binary", path / "a.o", path / "a.bin"], check=True)
    code = (path / "a.bin").read_bytes()
    return {text: code[16 * i : 16 * i + 16] for i, text in enumerate(texts)}


def ordered(operands: list[MemoryOperand]) -> list[tuple[int, int, int]]:
    return sorted((o.gva, o.length_bytes, o.access) for o in operands)


@pytest.mark.parametrize(("text", "expected"), rows(), ids=[text for text, _ in rows()])
def test_operands_of_each_instruction(text, expected, assembled):
    found = memory_operands(assembled[text], CODE, registers())
    assert ordered(found) == ordered(expected)


def test_table_is_wide():
    assert len(rows()) >= 150
