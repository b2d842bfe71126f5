"""The report: its facts are there, and it fits a screen."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.hostarch.access import EXECUTE, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.vmm import report
from kvmmm.vmm.register_file import GPR_NAMES
from kvmmm.vmm.report import FaultFacts, GuestState, StopFacts, render_fault, render_stop
from kvmmm.vmm.vector import trap_name

TEXT = 0x200000
CODE = bytes.fromhex("488907 4883c708 ffc9 75f5 c3 0f0b".replace(" ", ""))
REGS = {
    **{name: n * 0x1111 for n, name in enumerate(GPR_NAMES)},
    "rip": TEXT + 3,
    "rflags": 0x246,
    "cs": 0x33,
    "ss": 0x2B,
    "cr2": 0x3000,
    "cr3": 0x4001000,
}
VMAS = [
    (TEXT, TEXT + 0x1000, READ_EXECUTE, "text"),
    (0x1000, 0x2000, READ_WRITE, "low ram"),
    (0x3000, 0x4000, READ, "rodata"),
    (0x201000, 0x4000000, READ_WRITE, "ram"),
    (0x4000000, 0x4200000, READ_WRITE, "system"),
]

GOLDEN = """\
guest fault: write to 0x3000, which is read-only (r-- "rodata" [0x3000, 0x4000))
warning: the GDT lies in text
  where  at 0x200000 (main+0x0), ring 3
  => 0x200000  mov qword ptr [rdi], rax
     0x200003  add rdi, 8   <-- rip
     0x200007  dec ecx
     0x200009  jne 0x200000
  rax 0x0000000000000000  rbx 0x0000000000001111  rcx 0x0000000000002222  rdx 0x0000000000003333
  rsi 0x0000000000004444  rdi 0x0000000000005555  rbp 0x0000000000006666  rsp 0x0000000000007777
  r8  0x0000000000008888  r9  0x0000000000009999  r10 0x000000000000aaaa  r11 0x000000000000bbbb
  r12 0x000000000000cccc  r13 0x000000000000dddd  r14 0x000000000000eeee  r15 0x000000000000ffff
  rip 0x0000000000200003  rflags 0x246 [PF ZF IF]
  cr2 0x0000000000003000  cr3 0x0000000004001000  cs 0x33  ss 0x2b  ring 3
  rw- [0x1000, 0x2000) low ram
  r-- [0x3000, 0x4000) rodata   <-- 0x3000
  r-x [0x200000, 0x201000) text
  rw- [0x201000, 0x4000000) ram
  rw- [0x4000000, 0x4200000) system
  hint   a segment's permissions are those of its ELF program header; --rwx gives all of them to all
         segments, as a boot loader would
"""


def read(gva: int, n_bytes: int) -> bytes:
    return CODE[gva - TEXT :][:n_bytes] if TEXT <= gva < TEXT + len(CODE) else b""


def symbols(addr: int) -> str | None:
    return f"main+{addr - TEXT:#x}" if TEXT <= addr < TEXT + 0x1000 else None


def state(**changed: int) -> GuestState:
    return GuestState(REGS | changed, read=read, symbols=symbols, vmas=VMAS)


def lines_of(text: str) -> list[str]:
    assert text.endswith("\n")
    lines = text.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= report.MAX_COLUMNS
    assert all(line.rstrip() == line for line in lines)
    return lines


def test_write_to_read_only_memory():
    store = (TEXT, "mov qword ptr [rdi], rax")
    facts = FaultFacts(
        *(state(), 0x3000, WRITE), is_past=True, store=store, warnings=["the GDT lies in text"]
    )
    assert lines_of(render_fault(facts)) == GOLDEN.splitlines()


@pytest.mark.parametrize(
    ("addr", "access", "headline", "hint"),
    [
        (0x10, READ, "read from 0x10, where nothing is mapped", "null pointer"),
        (0x2800, WRITE, "write to 0x2800, where nothing is mapped", "check the pointer"),
        (0x7777 - 8, WRITE, "write to 0x776f, where nothing is mapped", "stack overflowed"),
        (0x9999999, READ, "read from 0x9999999, where nothing is", "memory ends at 0x4200000"),
        (0x1004, EXECUTE, "jump to 0x1004, which is not executable (rw-", "program header"),
        (TEXT, WRITE, "write to 0x200000, which is read-only (r-x", "--rwx"),
        (0x1004, WRITE, "write to 0x1004, which the map allows (rw-", "own page tables"),
        (0x3000, READ | WRITE, "read and write of 0x3000, which is read-only", "--rwx"),
    ],
)
def test_headline_and_hint(addr: int, access: int, headline: str, hint: str):
    text = render_fault(FaultFacts(state(), addr, access))
    lines = lines_of(text)
    assert lines[0].startswith(f"guest fault: {headline}")
    assert hint in text
    assert sum(f"<-- {addr:#x}" in line for line in lines) == 1


def test_hole_is_marked_between_its_neighbours():
    lines = lines_of(render_fault(FaultFacts(state(), 0x2800, READ)))
    at = lines.index("  (nothing is mapped here)   <-- 0x2800")
    assert "low ram" in lines[at - 1]
    assert "rodata" in lines[at + 1]


def test_map_shows_three_neighbours_only():
    vmas = [(n * 0x2000, n * 0x2000 + 0x1000, READ, f"v{n}") for n in range(100)]
    where = GuestState(REGS, vmas=reversed(vmas))
    text = render_fault(FaultFacts(where, 50 * 0x2000, WRITE))
    assert [f"v{n}" in text for n in range(46, 55)] == [False, *[True] * 7, False]


def test_store_that_was_not_found_is_before_rip():
    lines = lines_of(render_fault(FaultFacts(state(), 0x3000, WRITE, is_past=True)))
    assert "  where  before 0x200003 (main+0x3), ring 3" in lines
    assert not any("=>" in line for line in lines)
    assert any(line.startswith("     0x200003") for line in lines)


def test_call_is_shown_where_it_stands_though_rip_is_elsewhere():
    store = (TEXT + 2, "call 0x300000")
    where = state(rip=0x300000)
    text = render_fault(FaultFacts(where, 0x3000, WRITE, is_past=True, store=store))
    assert "at 0x200002 (main+0x2)" in text
    assert "rip 0x0000000000300000" in text


def test_wild_jump_names_what_may_be_its_return_address():
    stack = (TEXT + 7).to_bytes(8, "little")
    where = GuestState(
        REGS | {"rip": 0x50000000, "rsp": 0x1100},
        read=lambda gva, n_bytes: stack[:n_bytes] if gva == 0x1100 else b"",
        symbols=symbols,
    )
    lines = lines_of(render_fault(FaultFacts(where, 0x50000000, EXECUTE)))
    top = "0x200007 (main+0x7) on top: the return address, if this was a call"
    assert f"  stack  {top}" in lines


def test_trap_is_decoded():
    facts = FaultFacts(state(cpl=0), 0x3000, WRITE, vector=14, error_code=3)
    lines = lines_of(render_fault(facts))
    trap = "#PF page fault (vector 14), error code 0x3: page present, write, from ring 0 to 2"
    assert f"  trap   {trap}" in lines
    assert any(line.endswith("ring 0") for line in lines)


@pytest.mark.parametrize(
    ("vector", "error_code", "expected"),
    [
        (0, None, "#DE divide error (vector 0)"),
        (6, None, "#UD invalid opcode (vector 6)"),
        (15, None, "reserved (vector 15)"),
        (32, None, "interrupt (vector 32)"),
        (8, 0, "#DF double fault (vector 8), error code 0x0"),
        (13, 0, "#GP general protection (vector 13), error code 0x0"),
        (13, 0x18, "error code 0x18: selector 0x18 in the GDT"),
        (11, 0x1C, "error code 0x1c: selector 0x18 in the LDT"),
        (13, 0x82 + 1, "error code 0x83: IDT entry 16, external event"),
        (14, 0x14, "page not present, fetch, from ring 3"),
        (14, 0x9, "page present, read, from ring 0 to 2, reserved bit set"),
    ],
)
def test_exception_names(vector: int, error_code: int | None, expected: str):
    assert expected in trap_name(vector, error_code)


def test_every_architectural_vector_has_a_name():
    for vector in range(32):
        assert (trap_name(vector).startswith("reserved")) == (vector in {15, *range(22, 28), 31})


@pytest.mark.parametrize(
    ("cause", "headline"),
    [
        (report.DEADLINE, "stopped after 2.0 s, the deadline, at 0x200003 (main+0x3), ring 3: add"),
        (report.INTERRUPT, "interrupted after 2.0 s, at 0x200003 (main+0x3), ring 3: add rdi, 8"),
        (report.STOP, "stopped after 2.0 s, at 0x200003 (main+0x3), ring 3: add rdi, 8"),
        (report.SHUTDOWN, "the guest triple-faulted after 2.0 s: an exception could not be"),
        (report.ARENA, "guest memory is exhausted after 2.0 s"),
    ],
)
def test_stops(cause: str, headline: str):
    warnings = ["CR3 points into read-only memory"]
    facts = StopFacts(cause, state(), elapsed_ns=2_000_000_000, warnings=warnings)
    lines = lines_of(render_stop(facts))
    assert lines[0].startswith(headline)
    assert lines[1] == "warning: CR3 points into read-only memory"
    assert any("main+0x3" in line for line in lines)
    assert any(line.startswith("  => 0x200003  add rdi, 8") for line in lines)
    assert any("rflags 0x246 [PF ZF IF]" in line for line in lines)


def test_shutdown_without_registers():
    lines = lines_of(render_stop(StopFacts(report.SHUTDOWN)))
    assert lines[0] == "the guest triple-faulted: an exception could not be delivered"
    assert "lidt" in lines[1]


def test_emulation_failure_shows_instruction_bytes_and_hint():
    facts = StopFacts(report.EMULATION, state(), code=bytes.fromhex("c5fdfe07"))
    text = render_stop(facts)
    assert lines_of(text)[:3] == [
        "KVM cannot run this instruction here: vpaddd ymm0, ymm0, ymmword ptr [rdi]",
        "  bytes  c5 fd fe 07",
        "  where  at 0x200003 (main+0x3), ring 3",
    ]
    assert "-mgeneral-regs-only" in text


def test_arena_exhaustion_says_why_and_what_to_do():
    detail = "the arena is exhausted: 2048 KiB wanted, 0 KiB of 65536 KiB free"
    text = render_stop(StopFacts(report.ARENA, state(), detail=detail, hint="buy memory"))
    assert f"  why    {detail}" in lines_of(text)
    assert "  hint   buy memory" in text
    assert "--arena" not in text


def test_exception_of_the_guest():
    text = render_stop(StopFacts(report.EXCEPTION, state(), vector=13, error_code=0x18))
    lines = lines_of(text)
    assert lines[0].startswith("guest exception #GP general protection (vector 13) at 0x200003")
    assert "error code 0x18: selector 0x18 in the GDT" in lines[1]


def test_code_that_cannot_be_read():
    where = GuestState(REGS)
    assert lines_of(render_stop(StopFacts(report.STOP, where)))[0] == "stopped, at 0x200003, ring 3"
    lines_of(render_fault(FaultFacts(where, 0x3000, READ)))


def test_long_warning_is_wrapped():
    warning = "the guest's GDT at 0x201000 lies in read-only memory, where a CPU cannot mark it: "
    warning += "put it in a writable section, or load with --rwx"
    lines = lines_of(render_fault(FaultFacts(state(), 0x3000, WRITE, warnings=[warning])))
    assert lines[1].startswith("warning: the guest's GDT at 0x201000 lies")
    assert lines[2].startswith("         ")
    assert lines[2].endswith("--rwx")


def test_many_warnings_leave_room_for_the_rest():
    facts = FaultFacts(state(), 0x3000, WRITE, warnings=[f"warning {n}" for n in range(9)])
    lines = lines_of(render_fault(facts))
    assert lines[1:4] == ["warning: warning 0", "warning: warning 1", "warning: and 7 more"]


@settings(max_examples=30, deadline=None)
@given(
    addr=st.integers(0, 2**64 - 1),
    access=st.sampled_from([READ, WRITE, EXECUTE, READ_WRITE]),
    regs=st.lists(st.integers(0, 2**64 - 1), min_size=20, max_size=20),
    code=st.binary(max_size=60),
    name=st.text("abcxyz_<>:,~ ", max_size=200),
    text=st.text("abc de", max_size=600),
    vector=st.none() | st.integers(0, 255),
    error_code=st.none() | st.integers(0, 2**32 - 1),
)
def test_any_facts_fit_a_screen(
    addr: int, access: int, regs: list[int], code: bytes, name: str, text: str,
    vector: int | None, error_code: int | None,
):  # fmt: skip
    names = (*GPR_NAMES, "rip", "rflags", "cr2", "cr3")
    ends = (0, 1 << 63, 1 << 64)
    where = GuestState(
        dict(zip(names, regs, strict=True)) | {"cs": 0x10, "ss": 0x18},
        read=lambda _gva, n_bytes: code[:n_bytes],
        symbols=lambda _addr: name,
        vmas=[(a, b, READ, name) for a, b in pairwise(ends)],
    )
    facts = FaultFacts(
        *(where, addr, access), vector=vector, error_code=error_code, warnings=[text] * 5, hint=text
    )
    lines = lines_of(render_fault(facts))
    assert sum(line.endswith(f"<-- {addr:#x}") for line in lines) == 1
    for cause in (report.DEADLINE, report.EMULATION, report.EXCEPTION):
        stop = StopFacts(
            *(cause, where), code=code, detail=text, warnings=[text], hint=text,
            vector=vector, error_code=error_code,
        )  # fmt: skip
        lines_of(render_stop(stop))
