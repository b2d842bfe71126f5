"""CPU features that guests may use: vectors, segment bases, CPUID, large pages, translation."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvmmm.doctor.code import (
    BASE,
    CPUID,
    DATA,
    ELSEWHERE,
    END,
    ENTER_RING3,
    LOAD,
    STEP,
    UNTOUCHED,
    jump_back,
    mov_eax,
    u32,
)
from kvmmm.doctor.finding import Check, Finding, differs, missing, ok
from kvmmm.doctor.lab import Lab
from kvmmm.errors import IoctlError
from kvmmm.hostarch.access import READ
from kvmmm.pagetables.pte import flags_of
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.device import open_device
from kvmmm.safemem.ffi import address_of, ffi, ioctl

if TYPE_CHECKING:
    from kvmmm.doctor.lab import Script

_GIB = 1 << 30
_BRAND_LEAF = 0x8000_0002
_BRAND = b"kvmmm doctor 1.0"
_CPUID_ENTRY_BYTES = 40

_SSE = (
    mov_eax(21)
    + b"\x66\x0f\x6e\xc0"  # movd %eax, %xmm0
    + b"\x66\x0f\xfe\xc0"  # paddd %xmm0, %xmm0
    + b"\x66\x0f\x7e\xc0"  # movd %xmm0, %eax
)
_AVX = (
    mov_eax(42)
    + b"\xc5\xf9\x6e\xc0"  # vmovd %eax, %xmm0
    + b"\xc4\xe3\x7d\x18\xc0\x01"  # vinsertf128 $1, %xmm0, %ymm0, %ymm0
    + b"\xc4\xe3\x7d\x19\xc1\x01"  # vextractf128 $1, %ymm0, %xmm1
    + b"\x31\xc0"  # xor %eax, %eax
    + b"\xc5\xf9\x7e\xc8"  # vmovd %xmm1, %eax
)
_FSGSBASE = (
    mov_eax(42)
    + b"\xf3\x48\x0f\xae\xd0"  # wrfsbase %rax
    + b"\x31\xc0"  # xor %eax, %eax
    + b"\xf3\x48\x0f\xae\xc0"  # rdfsbase %rax
)


def _computes_42(code: bytes) -> Finding:
    with Lab(code + END) as lab:
        answer = lab.run()["rax"]
    return ok("in ring 3") if answer == 42 else missing(f"it computed {answer}, not 42")


def _avx() -> Finding:
    with Lab(END, ring=0) as lab:
        has_avx = lab.vm.vcpu.trial.has_avx
    if not has_avx:
        return missing("CR4.OSXSAVE or XCR0 = 7 was refused", "guests are told so, and use SSE")
    return _computes_42(_AVX)


def _fsgsbase() -> Finding:
    with Lab(END, ring=0) as lab:
        has_fsgsbase = lab.vm.vcpu.trial.has_fsgsbase
    if not has_fsgsbase:
        return missing("CR4.FSGSBASE was refused", "guests are told so, and use MSRs in ring 0")
    return _computes_42(_FSGSBASE)


def _cpuid() -> Finding:
    ask = mov_eax(_BRAND_LEAF) + CPUID
    # Ring 0 keeps its answer in r8; ring 3's is what the run ends with.
    with Lab(ask + b"\x49\x89\xc0" + ENTER_RING3 + ask + END, ring=0) as lab:
        _rename_cpu(lab)
        regs = lab.run()
    word = struct.unpack_from("<I", _BRAND)[0]
    in_ring0, in_ring3 = regs["r8"] == word, regs["rax"] == word
    if in_ring0 and in_ring3:
        return ok("what kvmmm sets is what guests see", value="virtual")
    where = "ring 3" if in_ring0 else "any ring"
    return differs(
        f"in {where} guests see the host's own",
        "guests should trust the features in their boot information, not cpuid",
        value="native",
    )


def _rename_cpu(lab: Lab) -> None:
    """Give the vCPU a brand string that no CPU has."""
    source = ffi.buffer(lab.vm.vm.device.cpuid.table)
    table = ffi.new("uint8_t[]", len(source))
    copy = ffi.buffer(table)
    copy[:] = source[:]
    # struct kvm_cpuid2: a count and padding, then entries: function, index, flags, eax to edx, ...
    for offset in range(8, len(source), _CPUID_ENTRY_BYTES):
        if struct.unpack_from("<I", source, offset)[0] == _BRAND_LEAF:
            copy[offset + 12 : offset + 28] = _BRAND
    rc = ioctl(lab.vm.vcpu.fd, abi.KVM_SET_CPUID2, address_of(table))
    if rc < 0:
        raise IoctlError("KVM_SET_CPUID2", "another brand string", -rc)


def _giant_pages() -> Finding:
    if not open_device().cpuid.has_giant_pages:
        return differs("KVM does not offer them: 2 MiB at most", value=False)

    def script(lab: Lab) -> Script:
        tables: Any = lab.vm.area.tables
        # All of memory once more, a GiB higher.
        tables.map(_GIB, _GIB, 0, flags_of(READ, user=True))
        return (yield)

    with Lab(STEP + LOAD + u32(_GIB + DATA) + STEP, data=b"giantpag") as lab:
        seen = lab.play(script(lab))
    if seen != int.from_bytes(b"giantpag", "little"):
        return missing(f"a read through one gave {seen:#x}")
    return ok("a read through a 1 GiB leaf is right", value=True)


def _translate() -> Finding:
    def script(lab: Lab) -> Script:
        tables: Any = lab.vm.area.tables
        tables.map(ELSEWHERE, 0x1000, DATA, flags_of(READ, user=True))
        yield
        asked = (BASE, DATA + 0x123, UNTOUCHED, lab.vm.area.start, ELSEWHERE + 8, 0, ELSEWHERE << 1)
        for gva in asked:
            found = tables.lookup(gva)
            expected = None if found is None else found.gpa + gva - found.gva
            said = lab.vm.vcpu.translate(gva)
            if said != expected:
                return missing(f"says {said} for {gva:#x}; the tables say {expected}")
        return ok(f"agrees with the page tables at {len(asked)} addresses")

    with Lab(STEP + jump_back(2)) as lab:
        finding = lab.play(script(lab))
    assert isinstance(finding, Finding)  # noqa: S101 - the script above answers nothing else
    return finding


CHECKS = (
    Check("sse", "SSE", lambda: _computes_42(_SSE)),
    Check("avx", "AVX", _avx, is_needed=False),
    Check("fsgsbase", "FSGSBASE", _fsgsbase, is_needed=False),
    Check("cpuid", "CPUID", _cpuid, is_needed=False),
    Check("giant_pages", "1 GiB pages", _giant_pages, is_needed=False),
    Check("translate", "KVM_TRANSLATE", _translate),
)
