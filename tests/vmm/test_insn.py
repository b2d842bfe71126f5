"""Disassembly for reports, and finding the store behind rip."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.vmm.insn import disassemble, disassemble_around, store_ending_at
from kvmmm.vmm.register_file import GPR_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

RIP = 0x400800
PAGE = 0x400000
DATA, STACK = 0x70000, 0x90000


class _Registers(SimpleNamespace):
    def vector(self, _number: int) -> bytes:
        return struct.pack("<8i", *range(8))

    def mask(self, _number: int) -> int | None:
        return None


def registers(**values: int) -> _Registers:
    given_values = dict.fromkeys(GPR_NAMES, 0x1000)
    given_values |= {"rdi": DATA, "rsi": 0x60000, "rsp": STACK, "rbp": 0x81000, "rcx": 0}
    given_values |= {"rip": RIP, "rflags": 2, "fs_base": 0x7F0000, "gs_base": 0}
    return _Registers(**(given_values | values))


def reader(code: bytes, start: int) -> Callable[[int, int], bytes]:
    """Memory that holds `code` at `start` and can be read nowhere else."""

    def read(gva: int, n_bytes: int) -> bytes:
        at = gva - start
        return code[at : at + n_bytes] if 0 <= at < len(code) else b""

    return read


def before_rip(code: str, behind: str = "c3") -> Callable[[int, int], bytes]:
    """Nops, then `code` up to RIP, then `behind`."""
    filled = b"\x90" * 0x100 + bytes.fromhex(code)
    return reader(filled + bytes.fromhex(behind), RIP - len(filled))


def test_disassemble():
    assert disassemble(b"\x48\x89\x07\xc3", RIP) == "mov qword ptr [rdi], rax"
    assert disassemble(b"\xf3\xa4", RIP) == "rep movsb byte ptr [rdi], byte ptr [rsi]"
    assert disassemble(b"\xc3", RIP) == "ret"
    assert disassemble(b"\x06", RIP) is None
    assert disassemble(b"", RIP) is None


def test_disassemble_around_gives_one_and_those_behind_it():
    read = reader(bytes.fromhex("488907 4883c708 ffc9 75f5 c3"), RIP)
    lines = disassemble_around(read, RIP)
    assert lines == [
        (RIP, "mov qword ptr [rdi], rax"),
        (RIP + 3, "add rdi, 8"),
        (RIP + 7, "dec ecx"),
        (RIP + 9, f"jne {RIP:#x}"),
    ]
    assert disassemble_around(read, RIP, n_after=0) == lines[:1]


def test_disassemble_around_stops_at_what_it_cannot_read_or_decode():
    assert disassemble_around(reader(b"", RIP), RIP) == []
    assert len(disassemble_around(reader(b"\x90\x06\x90", RIP), RIP)) == 1
    assert len(disassemble_around(reader(b"\x90\x48\x89", RIP), RIP)) == 1


# (code that ends at rip, faulting address, registers after, address of the store, its mnemonic)
STORES = [
    ("488907", DATA, {}, -3, "mov qword ptr [rdi], rax"),
    ("8907", DATA, {}, -2, "mov dword ptr [rdi], eax"),
    ("488907", DATA + 7, {}, -3, "mov qword ptr"),  # a later fragment of it
    ("c60700", DATA, {}, -3, "mov byte ptr [rdi], 0"),
    ("48c70701000000", DATA, {}, -7, "mov qword ptr [rdi], 1"),
    ("c70701000000", DATA, {}, -6, "mov dword ptr [rdi], 1"),
    ("66c7070100", DATA, {}, -5, "mov word ptr [rdi], 1"),
    ("64488907", DATA + 0x7F0000, {}, -4, "mov qword ptr fs:[rdi], rax"),
    ("678907", DATA, {}, -3, "mov dword ptr [edi], eax"),
    ("f00107", DATA, {}, -3, "lock add dword ptr [rdi], eax"),
    ("48874708", DATA + 8, {}, -4, "xchg qword ptr [rdi + 8], rax"),
    ("f0480fc107", DATA, {}, -5, "lock xadd qword ptr [rdi], rax"),
    ("48892d00000000", RIP, {}, -7, "mov qword ptr [rip], rbp"),
    ("0f2907", DATA, {}, -3, "movaps xmmword ptr [rdi], xmm0"),
    ("f30f7f07", DATA + 8, {}, -4, "movdqu xmmword ptr [rdi], xmm0"),
    ("660f7f07", DATA, {}, -4, "movdqa xmmword ptr [rdi], xmm0"),
    ("c5fc1107", DATA + 31, {}, -4, "vmovups ymmword ptr [rdi], ymm0"),
    ("db3f", DATA + 9, {}, -2, "fstp xword ptr [rdi]"),
    ("50", STACK, {}, -1, "push rax"),
    ("4150", STACK, {}, -2, "push r8"),
    ("6a01", STACK + 7, {}, -2, "push 1"),
    ("6650", STACK + 1, {}, -2, "push ax"),
    ("ff37", STACK, {}, -2, "push qword ptr [rdi]"),
    ("9c", STACK, {}, -1, "pushfq"),
    ("8f07", DATA, {}, -2, "pop qword ptr [rdi]"),
    ("8f0424", STACK, {}, -3, "pop qword ptr [rsp]"),  # pops, then writes to where rsp is now
    ("c8100000", 0x81000, {}, -4, "enter 0x10, 0"),
    ("e800000000", STACK, {}, -5, "call 0x400800"),  # to the next instruction
    ("48ab", DATA - 8, {}, -2, "stosq"),
    ("48ab", DATA + 8, {"rflags": 0x402}, -2, "stosq"),
    ("aa", DATA - 1, {}, -1, "stosb"),
    ("a5", DATA - 4, {}, -1, "movsd dword ptr"),
    ("48a5", DATA + 8 + 3, {"rflags": 0x402}, -2, "movsq"),
    ("f348ab", DATA - 8, {}, -3, "rep stosq"),
]


@pytest.mark.parametrize(("code", "addr", "values", "offset", "text"), STORES)
def test_store_is_found_behind_rip(
    code: str, addr: int, values: dict[str, int], offset: int, text: str
):
    found = store_ending_at(before_rip(code), RIP, addr, registers(**values))
    assert found is not None
    assert found[0] == RIP + offset
    assert found[1].startswith(text)


@pytest.mark.parametrize(
    ("code", "addr"),
    [
        ("488b07", DATA),  # a load
        ("488907", DATA + 8),  # a store to elsewhere
        ("488907", DATA - 1),
        ("90", DATA),
        ("50", STACK - 8),  # where the next push would go
        ("48ab", DATA),  # where the next stos would go
        ("488d07", DATA),  # lea
        ("483907", DATA),  # cmp
    ],
)
def test_what_did_not_write_there_is_no_store(code: str, addr: int):
    assert store_ending_at(before_rip(code), RIP, addr, registers()) is None


# Byte sequences with two readings, both of which write to DATA: what stands before decides.
AMBIGUOUS = [
    ("b800000048 8907", -2, "mov dword ptr [rdi], eax"),  # mov eax, 0x48000000
    ("b800000000 488907", -3, "mov qword ptr [rdi], rax"),
    ("b866000066 8907", -2, "mov dword ptr [rdi], eax"),
    ("48b8112233445566f0f0 8907", -2, "mov dword ptr [rdi], eax"),  # an immediate ends in a prefix
    ("6a41 8907", -2, "mov dword ptr [rdi], eax"),
    ("ff7740 8807", -2, "mov byte ptr [rdi], al"),  # push [rdi + 0x40]
    ("c3 90 66666666662e0f1f840000000000 488907", -3, "mov qword ptr [rdi], rax"),
    ("85c0 7402 31c0 f20f1107", -4, "movsd qword ptr [rdi], xmm0"),
    ("85c0 7402 31c0 0f1107", -3, "movups xmmword ptr [rdi], xmm0"),
]


@pytest.mark.parametrize(("code", "offset", "text"), AMBIGUOUS)
def test_forward_reading_settles_what_is_ambiguous(code: str, offset: int, text: str):
    found = store_ending_at(before_rip(code), RIP, DATA, registers())
    assert found == (RIP + offset, text)


@pytest.mark.parametrize(
    ("junk", "size"), [("2e", 2), ("3e", 2), ("48 66", 3), ("48 48", 3), ("f3", 2), ("f2", 2)]
)
def test_idle_prefix_is_not_taken_for_part_of_the_store(junk: str, size: int):
    # Nothing readable stands before: only the look of the candidates can decide.
    code = bytes.fromhex(junk) + b"\x89\x07"
    rip = PAGE + len(code)
    found = store_ending_at(reader(code, PAGE), rip, DATA, registers())
    assert found is not None
    assert found[0] == rip - size


def test_longest_reading_wins_when_nothing_else_decides():
    read = reader(bytes.fromhex("488907"), PAGE)
    found = store_ending_at(read, PAGE + 3, DATA, registers())
    assert found == (PAGE, "mov qword ptr [rdi], rax")


def test_repeated_store_keeps_rip_on_itself():
    # KVM writes one element an exit and moves rip only after the last.
    for code, text in (("f348ab", "rep stosq"), ("f3a4", "rep movsb"), ("f36d", "rep insd")):
        read = before_rip("90", behind=code)
        size = {"rep stosq": 8, "rep movsb": 1, "rep insd": 4}[text]
        found = store_ending_at(read, RIP, DATA - size, registers(rcx=5))
        assert found is not None
        assert found[0] == RIP
        assert found[1].startswith(text)
        assert store_ending_at(read, RIP, DATA, registers(rcx=5)) is None


def test_call_is_found_by_the_return_address_it_pushed():
    site = 0x401000
    calls = {
        "e8fbf7ffff": {},  # call RIP
        "ffd0": {"rax": RIP},
        "41ffd0": {"r8": RIP, "rax": 0},
    }
    for code, values in calls.items():
        body = bytes.fromhex(code)
        read = reader(b"\x90" * 32 + body, site - 32)
        stored = site + len(body)
        regs = registers(**values)
        found = store_ending_at(read, RIP, STACK, regs, stored=stored)
        assert found is not None
        assert found[0] == site
        assert found[1].startswith("call")
        assert store_ending_at(read, RIP + 16, STACK, regs, stored=stored) is None
        assert store_ending_at(read, RIP, STACK + 8, regs, stored=stored) is None


def test_call_through_memory_is_followed():
    site, pointer = 0x401000, DATA
    table = reader(RIP.to_bytes(8, "little"), pointer)
    code = reader(b"\x90" * 16 + b"\xff\x17", site - 16)  # call [rdi]

    def read(gva: int, n_bytes: int) -> bytes:
        return table(gva, n_bytes) or code(gva, n_bytes)

    found = store_ending_at(read, RIP, STACK, registers(), stored=site + 2)
    assert found == (site, "call qword ptr [rdi]")


def test_what_only_looks_like_a_call_is_none():
    site = 0x401000
    for code in ("66ffd0", "ff17", "ff1f"):  # call ax; call [rdi], unreadable; far call [rdi]
        read = reader(bytes.fromhex("90" * 16 + code), site - 16)
        stored = site + len(code) // 2
        assert store_ending_at(read, 0, STACK, registers(), stored=stored) is None


def test_value_that_is_no_return_address_does_no_harm():
    found = store_ending_at(before_rip("488907"), RIP, DATA, registers(), stored=0x1234)
    assert found == (RIP - 3, "mov qword ptr [rdi], rax")


def test_unreadable_page_below_rip():
    rip = 0x400002
    read = reader(bytes.fromhex("8907c3"), 0x400000)
    assert store_ending_at(read, rip, DATA, registers(rip=rip)) == (
        0x400000,
        disassemble(b"\x89\x07", 0),
    )
    assert store_ending_at(read, 0x400000, DATA, registers(rip=0x400000)) is None
    assert store_ending_at(reader(b"", 0), 0, DATA, registers(rip=0)) is None


_FILLER = ["90", "4831c0", "4883c008", "8b4708", "b800000048", "c5fdefc0", "0f1f4000", "e800000000"]
_STORE = ["488907", "8907", "c60700", "48c70701000000", "c5fe7f07", "f00107", "f3480f1107", "dd1f"]


@settings(derandomize=True, max_examples=60)  # a heuristic: adversarial code can defeat it
@given(st.lists(st.sampled_from(_FILLER), min_size=24, max_size=48), st.sampled_from(_STORE))
def test_store_after_straight_code_is_found_exactly(filler: list[str], store: str):
    code = bytes.fromhex("".join([*filler, store]))
    rip = PAGE + len(code)
    found = store_ending_at(reader(code, PAGE), rip, DATA, registers())
    assert found is not None
    assert found[0] == rip - len(store) // 2


@given(st.binary(max_size=80), st.integers(0, 2**64 - 1))
def test_any_bytes_are_survived(code: bytes, addr: int):
    read = reader(code, RIP - len(code) // 2)
    found = store_ending_at(read, RIP, addr, registers(), stored=RIP - 3)
    assert found is None or RIP - 15 <= found[0] <= RIP
    assert all(text for _, text in disassemble_around(read, RIP))
