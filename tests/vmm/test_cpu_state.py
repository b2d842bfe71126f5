"""Registers of a stopped vCPU: general, control and vector ones, as they were at its last exit."""

from __future__ import annotations

import pytest

from kvmmm.vmm.cpu_state import CpuState
from kvmmm.vmm.microvm import MicroVM
from tests.vmm.guest_run import TIMEOUT, load_code
from tests.vmm.machine_code import BASE, Code

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60)]


def states(vm: MicroVM, n_outs: int = 1) -> list[CpuState]:
    """One at each `out` to 0xb0."""
    found: list[CpuState] = []
    vm.on_out(0xB0, lambda _port, _value: found.append(CpuState(vm.vcpu)), value_only=True)
    assert vm.run(timeout=TIMEOUT).ok
    assert len(found) == n_outs
    return found


@pytest.mark.npt
def test_general_and_control_registers():
    code = Code().ring3().mov("rbx", 0xABCD).mov("r15", 1 << 63).out32(0xB0).exit(0)
    with load_code(code) as vm:
        seen: list[dict[str, int]] = []
        vm.on_out(0xB0, lambda _p, _v: seen.append(CpuState(vm.vcpu).values), value_only=True)
        assert vm.run(timeout=TIMEOUT).ok
        root = vm.area.layout().root_gpa
    values = seen[0]
    assert (values["rbx"], values["r15"]) == (0xABCD, 1 << 63)
    assert (values["cs"], values["ss"], values["cr3"]) == (0x33, 0x2B, root)
    assert BASE < values["rip"] < BASE + len(code.bytes)
    assert values["rflags"] & 2


def test_it_is_a_copy():
    code = Code().mov("rbx", 1).out32(0xB0).mov("rbx", 2).out32(0xB0).exit(0)
    with load_code(code) as vm:
        first, second = states(vm, 2)
    assert (first.rbx, second.rbx) == (1, 2)
    with pytest.raises(AttributeError):
        _ = first.rzx


@pytest.mark.npt
def test_vector_registers():
    """Xmm3 by two halves, and ymm3's upper half where there is AVX."""
    code = Code().ring3().mov("rax", 0x1111_2222_3333_4444).raw("66 48 0f 6e d8")  # movq xmm3, rax
    code.raw("66 0f 6c db")  # punpcklqdq xmm3, xmm3
    half = (0x1111_2222_3333_4444).to_bytes(8, "little")
    with MicroVM("64M") as vm:
        has_avx = vm.vcpu.trial.has_avx
        if has_avx:
            code.raw("c4 e3 65 18 db 01")  # vinsertf128 ymm3, ymm3, xmm3, 1
        vm.load(code.out32(0xB0).exit(0).bytes, base=BASE)
        found: list[bytes | None] = []

        def look(_port: int, _value: int) -> None:
            cpu = CpuState(vm.vcpu)
            found.extend([cpu.vector(3), cpu.vector(16)])
            assert cpu.mask(1) is None

        vm.on_out(0xB0, look, value_only=True)
        assert vm.run(timeout=TIMEOUT).ok
    assert found == [half * (4 if has_avx else 2) + bytes(0 if has_avx else 16), None]


def test_segment_bases():
    """Wrmsr of FS.base and GS.base, from ring 0."""
    code = Code()
    for msr, low in ((0xC000_0100, 0x12345000), (0xC000_0101, 0x6789A000)):
        code.mov("rcx", msr).mov("rax", low).mov("rdx", 0).raw("0f 30")
    with load_code(code.out32(0xB0).exit(0)) as vm:
        found: list[tuple[int, int]] = []

        def look(_port: int, _value: int) -> None:
            cpu = CpuState(vm.vcpu)
            found.append((cpu.fs_base, cpu.gs_base))

        vm.on_out(0xB0, look, value_only=True)
        assert vm.run(timeout=TIMEOUT).ok
    assert found == [(0x12345000, 0x6789A000)]
