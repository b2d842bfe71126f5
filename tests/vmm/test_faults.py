"""Every kind of access that cannot be served ends the guest, with a report that has the facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.hostarch.access import NO_ACCESS, READ, READ_EXECUTE
from tests.vmm.guest_run import describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.vmm.microvm import MicroVM

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]

PAGE = 4096
AT = 0x80_0000
AFTER = AT + PAGE


def _call(code: Code) -> Code:
    return code.raw("48 8d 63 08").raw("e8 02 00 00 00 eb fe")  # lea rsp, [rbx + 8]; call +2; spin


# name -> (code that accesses [rbx], 8 bytes; verbs the report may use; is it a write)
ACCESSES: dict[str, tuple[Callable[[Code], Code], str, bool]] = {
    "load": (lambda c: c.load("rax", "rbx"), "read from", False),
    "store": (lambda c: c.store("rbx", "rcx"), "write to", True),
    "read-modify-write": (lambda c: c.inc_at("rbx"), "read from|write to", True),
    "rep movs from": (
        lambda c: c.raw("48 89 de 48 8d 7c 24 c0 6a 01 59 f3 a4"),
        "read from",
        False,
    ),
    "rep stos": (lambda c: c.raw("48 89 df 6a 08 59 f3 aa"), "write to", True),
    "push": (lambda c: c.raw("48 8d 63 08 6a 00"), "write to", True),
    "call": (_call, "write to", True),
}


def hole_by_tables(vm: MicroVM) -> None:
    vm.mm.munmap(AT, AFTER - AT)


def no_access_by_tables(vm: MicroVM) -> None:
    vm.mm.mprotect(AT, AFTER - AT, NO_ACCESS)


def readonly_by_tables(vm: MicroVM) -> None:
    vm.mm.mprotect(AT, AFTER - AT, READ)


def on_out(change: Callable[[MicroVM], None]) -> Callable[[MicroVM], None]:
    """Make the change while the guest runs: the boot tables still grant what slots no longer do."""

    def prepare(vm: MicroVM) -> None:
        vm.on_out(0xB0, lambda _port, _value: change(vm), value_only=True)

    return prepare


# name -> (preparation, address, is something mapped there, only writes are refused)
PLACES: dict[str, tuple[Callable[[MicroVM], None], int, bool, bool]] = {
    "null": (lambda _vm: None, 0x18, False, False),
    "beyond memory": (lambda _vm: None, 1 << 30, False, False),
    "hole, by #PF": (hole_by_tables, AT + 8, False, False),
    "no access, by #PF": (no_access_by_tables, AT + 8, True, False),
    "read-only, by #PF": (readonly_by_tables, AT + 8, True, True),
    "hole, by EPT violation": (on_out(hole_by_tables), AT + 8, False, False),
    "read-only, by EPT violation": (on_out(readonly_by_tables), AT + 8, True, True),
}
QUICK_ACCESSES = {"load", "store", "call"}
QUICK_PLACES = {"null", "hole, by EPT violation", "read-only, by EPT violation"}


def cases() -> list[Any]:
    found = []
    for place, (_, _, _, writes_only) in PLACES.items():
        for access, (_, _, is_write) in ACCESSES.items():
            if writes_only and not is_write:
                continue
            for ring in (0, 3):
                is_quick = access in QUICK_ACCESSES and place in QUICK_PLACES
                marks = [pytest.mark.npt] if is_quick else []
                name = f"{place}-{access}-ring{ring}"
                found.append(pytest.param(place, access, ring, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("place", "access", "ring"), cases())
def test_fault(place: str, access: str, ring: int):
    prepare, addr, is_mapped, _ = PLACES[place]
    emit, verbs, _ = ACCESSES[access]
    code = emit(Code().ring(ring).mov("rcx", 7).out32(0xB0).mov("rbx", addr)).spin()
    result = run_code(code, prepare)
    told = describe(result)
    assert result.outcome == "fault", told
    assert addr <= (result.addr or 0) < addr + 8, told
    headline, *rest = result.report.splitlines()
    assert any(f"guest fault: {verb} {result.addr:#x}," in headline for verb in verbs.split("|")), (
        told
    )
    assert ("where nothing is mapped" in headline) != is_mapped, told
    assert f"ring {ring}" in rest[0], told
    assert f"rbx {addr:#018x}" in result.report, told
    assert f"<-- {result.addr:#x}" in result.report, told
    assert result.stats is not None
    assert result.stats.adds_up, told
    assert result.stats.refused == 1, told
    assert result.exit_code == 67


# Where the culprit stands, and what it is called; at an MMIO write rip is past it.
WHERE = {
    "load": "mov rax, qword ptr [rbx]",
    "store": "mov qword ptr [rbx], rcx",
    "push": "push 0",
    "rep stos": "rep stosb byte ptr [rdi], al",
    "call": "call ",
}


@pytest.mark.parametrize("place", ["null", "hole, by EPT violation"])
@pytest.mark.parametrize("access", WHERE)
@pytest.mark.parametrize("ring", [0, 3])
def test_the_report_points_at_the_instruction(place: str, access: str, ring: int):
    prepare, addr, _, _ = PLACES[place]
    code = Code().ring(ring).mov("rcx", 7).out32(0xB0).mov("rbx", addr)
    start = code.here
    ACCESSES[access][0](code).spin()
    report = run_code(code, prepare).report
    pointed = [line for line in report.splitlines() if line.startswith("  => ")]
    assert len(pointed) == 1, report
    rip, text = pointed[0].removeprefix("  => ").split(maxsplit=1)
    assert BASE + start <= int(rip, 16) < BASE + len(code.bytes), report
    assert text.startswith(WHERE[access]), report
    assert f"where  at {rip}" in report, report


@pytest.mark.npt
@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize(
    ("place", "addr"),
    [
        ("beyond memory", 1 << 30),
        ("in data", AT),
        ("in a hole", AT),
        ("null", 0),
        ("hole, late", AT),
    ],
)
@pytest.mark.parametrize("how", ["jump", "call"])
def test_a_jump_to_nowhere(place: str, addr: int, ring: int, how: str):
    prepare: Callable[[MicroVM], None] = lambda _vm: None  # noqa: E731
    if place == "in a hole":
        prepare = hole_by_tables
    if place == "hole, late":
        # Executable by the tables, and gone when it is wanted.
        def prepare(vm: MicroVM) -> None:
            vm.mm.mprotect(AT, AFTER - AT, READ_EXECUTE)
            on_out(hole_by_tables)(vm)

    code = Code().ring(ring).out32(0xB0).mov("rbx", addr)
    result = run_code((code.jump if how == "jump" else code.call)("rbx").spin(), prepare)
    told = describe(result)
    assert (result.outcome, result.addr) == ("fault", addr), told
    assert result.report.startswith(f"guest fault: jump to {addr:#x},"), told
    if place == "in data":
        assert "which is not executable" in result.report, told
    if how == "call":
        assert f"stack  {BASE + code.here - 2:#x}" in result.report, told
    assert result.stats is not None
    assert result.stats.adds_up, told


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("late", [False, True], ids=["by #PF", "by EPT violation"])
@pytest.mark.parametrize("kind", ["load", "store"])
def test_an_access_across_pages_names_the_page_that_is_missing(ring: int, late: bool, kind: str):
    code = Code().ring(ring).out32(0xB0).mov("rbx", AT - 4).mov("rcx", 0x1122334455667788)
    code = (code.load("rax", "rbx") if kind == "load" else code.store("rbx", "rcx")).spin()
    with load_code(code) as vm:
        (on_out(hole_by_tables) if late else hole_by_tables)(vm)
        vm.mm.populate(AT - PAGE, PAGE)
        result = vm.run(timeout=60)
    assert (result.outcome, result.addr) == ("fault", AT), describe(result)


def test_a_write_that_was_refused_changed_nothing():
    code = Code().ring3().out32(0xB0).mov("rbx", AT).mov("rcx", -1).store("rbx", "rcx").spin()
    with load_code(code) as vm:
        vm.mm.copy_out(AT, b"original")
        on_out(readonly_by_tables)(vm)
        assert vm.run(timeout=60).outcome == "fault"
        assert vm.mm.read(AT, 8) == b"original"


def test_non_canonical_is_an_exception():
    result = run_code(Code().ring3().mov("rbx", 1 << 62).load("rax", "rbx").spin())
    assert result.outcome == "exception", describe(result)
    assert "#GP" in result.report
    assert result.exit_code == 68


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("0f 0b", "#UD"),
        ("31 d2 31 c9 f7 f1", "#DE"),
        ("fa", "#GP"),
        ("e4 99", "#GP"),
        ("cc", "#BP"),
    ],
    ids=["ud2", "divide by zero", "cli", "closed port", "int3"],
)
def test_exceptions_that_nobody_handles(raw: str, name: str):
    code = Code().ring3()
    at = BASE + code.here
    result = run_code(code.raw(raw).spin())
    assert result.outcome == "exception", describe(result)
    assert name in result.report.splitlines()[0]
    assert f"{at:#x}"[:-1] in result.report
    assert "ring 3" in result.report
    assert result.addr is None


def test_kvmmms_own_pages_are_not_ring_3s():
    """Tables, GDT, IDT, TSS and stacks lie above memory, for ring 0 alone."""
    for offset in (0x2000, 0x3000, 0x4000, 0x30000):
        addr = (64 << 20) + offset
        result = run_code(Code().ring3().mov("rbx", addr).load("rax", "rbx").spin())
        assert (result.outcome, result.addr) == ("fault", addr), describe(result)


def test_the_whole_map_is_shown_around_the_address():
    report = run_code(Code().ring3().mov("rbx", 0).load("rax", "rbx").spin()).report
    assert "(nothing is mapped here)   <-- 0x0" in report
    assert "rw- [0x1000, 0x200000) [memory]" in report
    assert "rwx [0x200000, 0x201000) [image]" in report
    assert "rw- [0x201000, 0x4000000) [memory]" in report
    assert "page 0 is never mapped" in report
