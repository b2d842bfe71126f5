"""The start state: tables taken apart by a reader of their own, and VMX's rules for entry."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from construct import BitsInteger, BitStruct, ByteSwapped, Flag, Nibble

from kvmmm.platform.kvm import boot
from kvmmm.safemem.ffi import ffi, lib
from tests.platform.kvm.conftest import GDT, IDT, IST_TOP, STUBS, TABLES, TSS

# SDM Vol. 3A figure 3-8, from the highest bit down.
DESCRIPTOR = ByteSwapped(
    BitStruct(
        "base_high" / BitsInteger(8), "g" / Flag, "db" / Flag, "l" / Flag, "avl" / Flag,
        "limit_high" / Nibble, "p" / Flag, "dpl" / BitsInteger(2), "s" / Flag, "type" / Nibble,
        "base_low" / BitsInteger(24), "limit_low" / BitsInteger(16),
    )
)  # fmt: skip
# SDM Vol. 3A figure 6-8: a gate of the IDT.
GATE = ByteSwapped(
    BitStruct(
        "zero" / BitsInteger(32), "offset_high" / BitsInteger(32),
        "offset_middle" / BitsInteger(16), "p" / Flag, "dpl" / BitsInteger(2), "s" / Flag,
        "type" / Nibble, "zero2" / BitsInteger(5), "ist" / BitsInteger(3),
        "selector" / BitsInteger(16), "offset_low" / BitsInteger(16),
    )
)  # fmt: skip

TSS_GPA = 0x12_3456_7000


def descriptor(selector: int) -> Any:
    at = selector & ~7
    parsed = DESCRIPTOR.parse(boot.gdt(TSS_GPA)[at : at + 8])
    return SimpleNamespace(
        **{k: v for k, v in parsed.items() if not k.startswith("_")},
        base=parsed.base_high << 24 | parsed.base_low,
        limit=parsed.limit_high << 16 | parsed.limit_low,
    )


class TestGdt:
    @pytest.mark.parametrize(
        ("selector", "dpl", "kind", "is_long", "db"),
        [
            (lib.KVMMM_KERNEL_CS, 0, 11, True, False),
            (lib.KVMMM_KERNEL_DS, 0, 3, False, True),
            (lib.KVMMM_USER32_CS, 3, 11, False, True),
            (lib.KVMMM_USER_DS, 3, 3, False, True),
            (lib.KVMMM_USER_CS, 3, 11, True, False),
        ],
    )
    def test_segments(self, selector: int, dpl: int, kind: int, is_long: bool, db: bool):
        found = descriptor(selector)
        # Type 11 and 3 hold "accessed": a CPU that had to set it would write to the table.
        assert (found.type, found.dpl, found.l, found.db) == (kind, dpl, is_long, db)
        assert found.p
        assert found.s
        assert (found.base, found.limit, found.g) == (0, 0xFFFFF, True)
        assert selector & 3 == dpl

    def test_tss_descriptor_is_busy_and_whole(self):
        found = descriptor(lib.KVMMM_TSS_SELECTOR)
        table = boot.gdt(TSS_GPA)
        high = struct.unpack_from("<Q", table, lib.KVMMM_TSS_SELECTOR + 8)[0]
        assert (found.type, found.s, found.p, found.dpl, found.g) == (11, False, True, 0, False)
        assert found.base | high << 32 == TSS_GPA
        assert found.limit == boot.TSS_BYTES - 1
        assert lib.KVMMM_TSS_SELECTOR + 16 == len(table) == boot.GDT_BYTES

    def test_null_descriptor_is_null(self):
        assert boot.gdt(TSS_GPA)[:8] == bytes(8)


class TestTss:
    def test_stacks_and_bitmap(self):
        tss = boot.tss(0x1122_3344_5560)
        assert len(tss) == boot.TSS_BYTES
        assert struct.unpack_from("<Q", tss, 4)[0] == 0x1122_3344_5560  # RSP0
        assert struct.unpack_from("<Q", tss, 36)[0] == 0x1122_3344_5560  # IST1
        start = struct.unpack_from("<H", tss, 102)[0]
        assert start == 104
        assert tss[-1] == 0xFF  # SDM Vol. 1 19.5.2
        opened = {
            port
            for port in range((len(tss) - start) * 8)
            if not tss[start + port // 8] >> port % 8 & 1
        }
        assert opened == set(boot.OPEN_PORTS)

    def test_what_is_open(self):
        for port in (
            *(lib.KVMMM_PORT_EXIT, lib.KVMMM_PORT_DOORBELL, lib.KVMMM_PORT_INPUT),
            *(lib.KVMMM_PORT_DEBUGCON, lib.KVMMM_PORT_DEBUG_EXIT, lib.KVMMM_PORT_COM1 + 5),
        ):
            assert port in boot.OPEN_PORTS
        for first in (lib.KVMMM_PORT_EXIT, lib.KVMMM_PORT_DEBUG_EXIT):
            assert set(range(first, first + 4)) <= set(boot.OPEN_PORTS)  # a 4-byte out
        assert lib.KVMMM_PORT_TRAP not in boot.OPEN_PORTS
        # Some KVMs enter the SYSCALL stub in ring 3.
        assert lib.KVMMM_PORT_SYSCALL in boot.OPEN_PORTS


class TestIdt:
    @pytest.mark.parametrize("vector", [0, 1, 3, 4, 6, 8, 13, 14, 32, 255])
    def test_every_gate_leads_to_its_stub(self, vector: int):
        stubs = 0x7_1234_5400
        gate = GATE.parse(boot.idt(stubs)[16 * vector : 16 * vector + 16])
        offset = gate.offset_high << 32 | gate.offset_middle << 16 | gate.offset_low
        assert offset == stubs + 4 * vector
        assert (gate.p, gate.type, gate.s, gate.ist) == (True, 14, False, 1)
        assert gate.selector == lib.KVMMM_KERNEL_CS
        assert gate.dpl == (3 if vector in {3, 4} else 0)
        assert gate.zero == gate.zero2 == 0

    def test_256_of_them(self):
        assert len(boot.idt(STUBS)) == boot.IDT_BYTES == 4096

    def test_a_stub_is_one_out(self):
        assert len(boot.STUBS) == boot.STUBS_BYTES == 1024
        for vector in range(256):
            assert boot.STUBS[4 * vector : 4 * vector + 2] == bytes([0xE6, lib.KVMMM_PORT_TRAP])

    @pytest.mark.parametrize(
        ("offset", "vector"),
        [(0, 0), (2, 0), (1, None), (3, None), (56, 14), (58, 14), (1024, None)],
    )
    def test_vector_of_stub(self, offset: int, vector: int | None):
        """At an OUT rip is on it (VMX, SVM) or past it: two addresses a stub."""
        assert boot.vector_of_stub(STUBS + offset, STUBS) == vector
        assert boot.vector_of_stub(STUBS - 4, STUBS) is None


BUSY = frozenset({11})


def is_canonical(addr: int) -> bool:
    return addr >> 47 in {0, 0x1FFFF}


def has_consistent_granularity(limit: int, g: int) -> bool:
    """SDM Vol. 3C 27.3.1.2: limit[11:0] not all ones: G = 0; limit[31:20] not zero: G = 1."""
    if limit & 0xFFF != 0xFFF and g:
        return False
    return not (limit >> 20 and not g)


def check_entry_rules(sregs: Any, rflags: int, cpl: int, tss_types: frozenset[int] = BUSY) -> None:
    """SDM Vol. 3C 27.3.1.1 to 27.3.1.4, for a 64-bit guest without unrestricted-guest mode."""
    cs, ss, tr = sregs.cs, sregs.ss, sregs.tr
    assert cs.type in {9, 11, 13, 15}
    assert cs.s == cs.present == 1
    assert (cs.l, cs.db) == (1, 0)
    assert cs.dpl == cpl if cs.type in {9, 11} else cs.dpl <= cpl
    assert cs.selector & 3 == ss.selector & 3 == cpl
    assert ss.type in {3, 7} or ss.unusable
    assert ss.dpl == cpl
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs):
        if not segment.unusable:
            assert segment.type & 1
            assert segment.s == segment.present == 1
            assert not segment.type & 8 or segment.type & 2
            if segment.type <= 11:
                assert segment.dpl >= segment.selector & 3
    for segment in (cs, ss, sregs.ds, sregs.es, sregs.fs, sregs.gs):
        if not segment.unusable:
            assert has_consistent_granularity(segment.limit, segment.g)
            assert segment.padding == 0
    for segment in (cs, ss, sregs.ds, sregs.es):
        assert segment.base >> 32 == 0
    for base in (sregs.fs.base, sregs.gs.base, tr.base, sregs.gdt.base, sregs.idt.base):
        assert is_canonical(base)
    assert tr.type in tss_types
    assert (tr.s, tr.present, tr.unusable) == (0, 1, 0)
    assert not tr.selector & 4
    assert tr.limit >= 0x67
    assert has_consistent_granularity(tr.limit, tr.g)
    assert sregs.ldt.unusable or sregs.ldt.type == 2
    assert sregs.gdt.limit <= 0xFFFF
    assert sregs.idt.limit <= 0xFFFF
    assert rflags & 2
    assert not rflags & ~0x3F_7FD7
    assert not rflags & 1 << 17
    # CR0.PG needs PE; a 64-bit guest needs PAE, LME and LMA; NE is fixed to 1 in VMX operation.
    assert sregs.cr0 & boot.CR0_PG
    assert sregs.cr0 & boot.CR0_PE
    assert sregs.cr0 & boot.CR0_NE
    assert sregs.cr4 & boot.CR4_PAE
    assert sregs.efer & boot.EFER_LME
    assert sregs.efer & boot.EFER_LMA


def test_start_state_obeys_vmx_rules_for_entry():
    sregs = ffi.new("struct kvm_sregs *")
    boot.fill_sregs(sregs)
    check_entry_rules(sregs, boot.RFLAGS_RESERVED, 0)


@pytest.mark.parametrize(("cs", "ss", "cpl"), [(0x10, 0x18, 0), (0x33, 0x2B, 3)])
def test_returning_to_a_frame_obeys_them_too(cs: int, ss: int, cpl: int):
    sregs = ffi.new("struct kvm_sregs *")
    boot.fill_sregs(sregs)
    boot.load_return_segments(sregs, cs, ss)
    check_entry_rules(sregs, 0x202, cpl)


@pytest.mark.kvm
@pytest.mark.npt
@pytest.mark.parametrize("ring", [0, 3])
def test_a_running_guest_has_that_state(rig: Any, ring: int):
    from tests.vmm.machine_code import Code

    one = rig(Code().out32(0xB0).bytes, ring)
    one.vcpu.set_port(0xB0, lib.KVMMM_PORT_KIND_EXIT, None)
    one.once()
    sregs = one.vcpu.get_sregs()
    # An SVM in need of another type of TSS has been found by trying: it is none that checks.
    tried = ffi.new("struct kvm_sregs *")
    ffi.memmove(tried, one.vcpu.trial.sregs, ffi.sizeof("struct kvm_sregs"))
    check_entry_rules(sregs, one.vcpu.regs.rflags, ring, BUSY | {tried.tr.type})
    assert (sregs.cr3, sregs.gdt.base, sregs.idt.base, sregs.tr.base) == (TABLES, GDT, IDT, TSS)
    assert sregs.gdt.limit == boot.GDT_BYTES - 1
    assert sregs.idt.limit == boot.IDT_BYTES - 1
    assert bool(sregs.cr4 & boot.CR4_OSXSAVE) == one.vcpu.trial.has_avx
    assert bool(sregs.cr4 & boot.CR4_FSGSBASE) == one.vcpu.trial.has_fsgsbase


@pytest.mark.kvm
@pytest.mark.npt
@pytest.mark.parametrize(
    ("code", "vector", "error_code"),
    [("0f 0b", 6, None), ("cc", 3, None), ("31 d2 31 c9 f7 f1", 0, None), ("e4 99", 13, 0)],
    ids=["ud2", "int3", "div by zero", "in on a closed port"],
)
def test_exceptions_of_ring_3_leave_through_their_stub(
    rig: Any, code: str, vector: int, error_code: int | None
):
    one = rig(bytes.fromhex(code), 3)
    one.vcpu.set_port(lib.KVMMM_PORT_TRAP, lib.KVMMM_PORT_KIND_EXIT, None)
    exit_ = one.once()
    assert exit_.port == lib.KVMMM_PORT_TRAP
    regs = one.vcpu.regs
    assert boot.vector_of_stub(regs.rip, STUBS) == vector
    assert regs.rsp == IST_TOP - (40 if error_code is None else 48)
    frame = bytes(one.memory[regs.rsp : IST_TOP])
    if error_code is not None:
        assert struct.unpack_from("<Q", frame)[0] == error_code
    _rip, cs, rflags, _rsp, ss = struct.unpack_from("<5Q", frame, len(frame) - 40)
    assert (cs, ss) == (lib.KVMMM_USER_CS, lib.KVMMM_USER_DS)
    assert rflags & 2


def test_xcrs_with_avx():
    nr_xcrs, flags, xcr, reserved, value = struct.unpack_from(
        "<IIIIQ", ffi.buffer(boot.xcrs_with_avx())
    )
    assert (nr_xcrs, flags, xcr, reserved, value) == (1, 0, 0, 0, 7)
