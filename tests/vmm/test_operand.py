"""Memory operands: a table of instructions, addresses computed otherwise, and the CPU itself."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.vmm.decode import UndecodableError, decode
from kvmmm.vmm.operand import MemoryOperand, memory_operands
from kvmmm.vmm.register_file import GPR_NAMES

HERE = Path(__file__).parent
CODE = 0x30000000
_ACCESS = {"r": READ, "w": WRITE, "rw": READ_WRITE}

VALUES = {
    "rax": 7,
    "rbx": 0x50000,
    "rcx": 3,
    "rdx": 0,
    "rsi": 0x60000,
    "rdi": 0x70000,
    "rbp": 0x81000,
    "rsp": 0x90000,
    "r8": -16 % 2**64,
    "r9": 0x1_0000_1000,
    "r10": -65 % 2**64,
    "r11": 200,
    "r12": 0x40,
    "r13": 0xA0000,
    "r14": 0,
    "r15": 2**64 - 4,
}
FS_BASE, GS_BASE = 0x7F00_0000_0000, 0x6F00_0000_0000
VECTORS = [
    bytes(32),
    struct.pack("<8i", -1, 1, -1, -1, -1, 0, -1, -1),
    struct.pack("<8i", 0, -3, 300, 5, 1000, -900, 7, 8),
    struct.pack("<8i", -1, -1, 0, -1, -1, -1, -1, 0),
]

# Not for the CPU under a test: they need ring 0, a segment base, or leave with what they loaded.
_NOT_NATIVE = (
    *("movabs", "mov %fs", "mov %rax,%gs", "mov %rax,(%r15)", "sgdt", "smsw", "lss", "syscall"),
    *("rdfsbase", "lcall", "ljmp", "rex.W lcall", "call .", "clzero", "mov %ds", "mov 0x1000"),
    *("mov -4(%r14d", "mov (%r9d", "xlat %gs", "lodsq %gs", "movsl %fs", "push %fs"),
)

# Left to the vendor by the SDM: whether reserved or masked bytes, state in its initial
# configuration, or enter's final stack pointer are touched.
_VENDOR_DEPENDENT = ("fxsave", "fxrstor", "xsave", "xrstor", "maskmov", "enter")


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
    for line in (HERE / "operands.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
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
def test_operands_of_each_instruction(
    text: str, expected: list[MemoryOperand], assembled: dict[str, bytes]
):
    found = memory_operands(assembled[text], CODE, registers())
    assert ordered(found) == ordered(expected)


def test_table_is_wide():
    assert len(rows()) >= 150


def test_undecodable_bytes_name_themselves():
    with pytest.raises(UndecodableError, match=r"at 0x1000 .*06 06: no known instruction") as e:
        memory_operands(b"\x06\x06", 0x1000, registers())
    assert (e.value.rip, e.value.code) == (0x1000, b"\x06\x06")
    with pytest.raises(UndecodableError, match="rest is unreadable"):
        memory_operands(b"\x48\x89", 0x1000, registers())
    with pytest.raises(UndecodableError, match="no bytes"):
        memory_operands(b"", 0x1000, registers())


def test_gather_without_its_index_register_is_undecodable():
    regs = registers()
    regs.vectors = [None] * 16
    with pytest.raises(UndecodableError, match="index register"):
        memory_operands(bytes.fromhex("c4e265900c97"), CODE, regs)


def test_lanes_whose_mask_is_unknown_count():
    regs = registers()
    regs.vectors = [bytes(32), b"", VECTORS[2], None]
    gathered = memory_operands(bytes.fromhex("c4e265900c97"), CODE, regs)  # vpgatherdd, mask ymm3
    assert len(gathered) == 8
    masked = memory_operands(bytes.fromhex("c4e2752c17"), CODE, regs)  # vmaskmovps, mask ymm1
    assert masked == [MemoryOperand(0x70000, 32, READ)]


def test_avx512_gather_and_scatter_follow_the_opmask():
    regs = registers()
    regs.vectors = [struct.pack("<16i", *range(16))] * 4
    gather = bytes.fromhex("62f27d4990" + "0c97")  # vpgatherdd zmm1{k1}, [rdi + zmm2 * 4]
    scatter = bytes.fromhex("62f27d49a0" + "0c97")
    assert len(memory_operands(gather, CODE, regs)) == 16
    regs.mask = {1: 0b1001}.get
    expected = [0x70000, 0x7000C]
    assert memory_operands(gather, CODE, regs) == [MemoryOperand(a, 4, READ) for a in expected]
    assert memory_operands(scatter, CODE, regs) == [MemoryOperand(a, 4, WRITE) for a in expected]


def test_repeated_string_instruction_with_count_zero_touches_nothing():
    rep_movsb, rep_ret = b"\xf3\xa4", b"\xf3\xc3"
    assert memory_operands(rep_movsb, CODE, registers(rcx=0)) == []
    assert memory_operands(b"\x67" + rep_movsb, CODE, registers(rcx=1 << 32)) == []
    assert len(memory_operands(b"\xa4", CODE, registers(rcx=0))) == 2
    assert len(memory_operands(rep_ret, CODE, registers(rcx=0))) == 1


def test_string_element_does_not_depend_on_direction():
    backwards = registers(rflags=2 | 1 << 10)
    assert memory_operands(b"\x48\xab", CODE, backwards) == [MemoryOperand(0x70000, 8, WRITE)]


@pytest.mark.parametrize(
    ("rax", "rdx", "xsave_bytes", "expected"),
    [(7, 0, 832, 832), (3, 0, 832, 576), (0, 1, 2696, 2696), (2**64 - 1, 2**64 - 1, 576, 576)],
)
def test_xsave_size_follows_the_requested_components(
    rax: int, rdx: int, xsave_bytes: int, expected: int
):
    xsave = bytes.fromhex("0fae27")
    regs = registers(rax=rax, rdx=rdx)
    found = memory_operands(xsave, CODE, regs, xsave_bytes=xsave_bytes)
    assert found == [MemoryOperand(0x70000, expected, WRITE)]


def test_segment_bases_are_asked_for_only_when_used():
    class Sparse(_Registers):
        @property
        def fs_base(self) -> int:
            raise AssertionError("asked for fs")

        @property
        def gs_base(self) -> int:
            return GS_BASE

    regs = Sparse(**VALUES, rflags=2)
    assert memory_operands(bytes.fromhex("488907"), CODE, regs)
    assert memory_operands(bytes.fromhex("65488907"), CODE, regs)[0].gva == GS_BASE + 0x70000


def test_capstone_is_not_imported_before_it_is_needed():
    code = "import sys, kvmmm.vmm.operand, kvmmm.vmm.insn, kvmmm.vmm.report; "
    code += "sys.exit('capstone' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(
    base=st.integers(0, 15),
    index=st.integers(0, 15).filter(lambda n: n != 4),  # 4 means: no index
    scale=st.integers(0, 3),
    disp=st.integers(-(2**31), 2**31 - 1),
    segment=st.sampled_from([None, "fs", "gs"]),
    is_addr32=st.booleans(),
    values=st.lists(st.integers(0, 2**64 - 1), min_size=16, max_size=16),
)
def test_address_against_an_encoder_of_our_own(
    base: int,
    index: int,
    scale: int,
    disp: int,
    segment: str | None,
    is_addr32: bool,
    values: list[int],
):
    # mov [segment: base + index << scale + disp32], rax, by hand (SDM volume 2, 2.1.5 and 2.2.1).
    prefixes = {None: b"", "fs": b"\x64", "gs": b"\x65"}[segment] + b"\x67" * is_addr32
    rex = 0x48 | (index >> 3) << 1 | base >> 3
    modrm, sib = 0b10_000_100, scale << 6 | (index & 7) << 3 | base & 7
    code = prefixes + bytes([rex, 0x89, modrm, sib]) + struct.pack("<i", disp)
    order = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *GPR_NAMES[8:])
    regs = registers(**dict(zip(order, values, strict=True)))
    offset = (values[base] + (values[index] << scale) + disp) % (2**32 if is_addr32 else 2**64)
    gva = (offset + {None: 0, "fs": FS_BASE, "gs": GS_BASE}[segment]) % 2**64
    assert memory_operands(code, CODE, regs) == [MemoryOperand(gva, 8, WRITE)]


# ---- The CPU as oracle: which pages does each instruction really fault on? ----------------------

_REGION, _PAGES = 0x20000000, 16
_EDGE = _REGION + 8 * 4096
_DELTAS = sorted(
    {1, 17, -3, -7, -20, -48, -192, -496, -768}
    | {
        -size + d
        for size in (1, 2, 4, 6, 8, 10, 14, 16, 28, 32, 64, 94, 108, 512, 832)
        for d in (0, 1)
    }
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that runs single instructions and says which pages they touched."""
    if platform.machine() != "x86_64" or " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs an x86-64 CPU with AVX2 as the oracle")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to build the oracle")
    path = tmp_path_factory.mktemp("oracle")
    flags = ["-O1", "-no-pie", "-fno-pie", "-fcf-protection=none"]
    subprocess.run(["gcc", *flags, "-o", path / "h", HERE / "operand_oracle.c"], check=True)
    return path / "h"


def around_the_edge(delta: int) -> _Registers:
    """All pointers at the same distance from a page boundary, each with pages of its own."""
    return registers(
        rdi=_EDGE + delta,
        rbx=_EDGE + delta,
        rsi=_EDGE - 3 * 4096 + delta,
        rsp=_EDGE + 4 * 4096 + delta,
        rbp=_EDGE - 5 * 4096 + delta,
        rcx=1,
    )


def pages_of(operands: list[MemoryOperand]) -> list[int]:
    """Per page of the region 1 where it is only read, 2 where it is written."""
    pages = [0] * _PAGES
    for operand in operands:
        first = (operand.gva - _REGION) // 4096
        last = (operand.gva + operand.length_bytes - 1 - _REGION) // 4096
        for page in range(max(first, 0), min(last, _PAGES - 1) + 1):
            pages[page] = max(pages[page], 2 if operand.access & WRITE else 1)
    return pages


def test_cpu_touches_exactly_the_predicted_pages(assembled: dict[str, bytes], harness: Path):
    left_out = _NOT_NATIVE
    if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        left_out += _VENDOR_DEPENDENT
    texts = [text for text, _ in rows() if not text.startswith(left_out)]
    requests, cases = [], []
    for text in texts:
        size = decode(assembled[text], CODE).size
        for delta in _DELTAS:
            regs = around_the_edge(delta)
            values = [getattr(regs, name) for name in GPR_NAMES]
            code = assembled[text][:size].ljust(16, b"\x90")
            requests.append(struct.pack("<16Q", *values) + b"".join(VECTORS))
            requests.append(code + struct.pack("<Q", size))
            cases.append((text, delta, pages_of(memory_operands(code, CODE, regs))))
    run = subprocess.run(
        [harness], input=b"".join(requests), stdout=subprocess.PIPE, check=True, timeout=60
    )
    verified, wrong = set(), []
    for (text, delta, predicted), line in zip(cases, run.stdout.splitlines(), strict=True):
        trap, *granted = map(int, line.split())
        if trap in {6, 13}:  # not on this CPU, or not in ring 3, or misaligned
            continue
        verified.add(text)
        touched = [2 if bits & 2 else bits for bits in granted]
        if touched != predicted:
            wrong.append(f"{text} at {delta}: touched {touched}, predicted {predicted}")
    assert not wrong, "\n".join(wrong[:20])
    assert len(verified) >= 120, sorted(set(texts) - verified)
