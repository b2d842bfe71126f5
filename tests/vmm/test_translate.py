"""The boot tables as we read them against the boot tables as KVM walks them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import NO_ACCESS, READ
from kvmmm.vmm.microvm import HOLE, MicroVM
from tests.vmm.guest_run import load_code
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]


def prepared(vm: MicroVM) -> MicroVM:
    """As it is just before its first instruction."""
    vm.stop()
    assert vm.run(timeout=30).outcome == "stopped"
    return vm


def interesting(vm: MicroVM) -> list[int]:
    """Edges of everything, and their neighbours."""
    edges = [0, 0x1000, vm.area.start, vm.area.end, 1 << 30, 1 << 39, 1 << 46, (1 << 47) - 1]
    edges += [HOLE.start, HOLE.end, (1 << 64) - 1, 0xFFFF_8000_0000_0000]
    for start, end, _ in vm.mm.vmas:
        edges += [start, end]
    found = {edge + delta for edge in edges for delta in (-4096, -1, 0, 1, 4095)}
    return sorted(addr for addr in found if 0 <= addr < 1 << 64)


@pytest.mark.npt
@pytest.mark.parametrize("memory", ["3M", "64M", "5G"])
def test_boot_tables(memory: str, scaled: Callable[[int], int]):
    rng = random.Random(memory)
    code = Code().exit(0)
    vm = MicroVM(memory)
    with vm:
        vm.load(code.bytes, base=0x10_0000)
        vm.mm.mprotect(0x11_0000, 0x3000, READ)
        vm.mm.mprotect(0x12_0000, 0x1000, NO_ACCESS)
        vm.mm.munmap(0x13_0000, 0x1000)
        prepared(vm)
        assert vm.area.tables is not None
        samples = [rng.randrange(vm.area.end + (4 << 20)) for _ in range(scaled(600))]
        for gva in interesting(vm) + samples:
            if 1 << 47 <= gva < 0xFFFF_8000_0000_0000:
                continue  # not canonical: nobody asks
            ours = vm.area.tables.lookup(gva)
            kvms = vm.vcpu.translate(gva)
            assert kvms == (None if ours is None else ours.gpa + gva - ours.gva), hex(gva)
            assert kvms in {None, gva}, hex(gva)  # the boot tables are an identity
            if vm.area.start <= gva < vm.area.end:
                continue
            vma = vm.mm.vmas.find_value(gva)
            has_access = vma is not None and vma.effective_perms != 0
            assert (kvms is not None) == has_access, hex(gva)


def test_a_guests_own_tables():
    """A second mapping of the image 1 GiB higher, made by hand in the guest's memory."""
    root, pdpt, directory = 0x60_0000, 0x60_1000, 0x60_2000
    code = Code().mov("rax", root).raw("0f 22 d8").out32(0xB0).exit(0)
    found: list[int | None] = []

    def look(_port: int, _value: int) -> None:
        found.extend(
            vm.vcpu.translate(gva) for gva in (0x20_0000, 0x4020_0010, 0x4000_0000, 0x8000_0000)
        )

    with load_code(code) as vm:
        for table, index, entry in (
            (root, 0, pdpt | 7), (pdpt, 0, directory | 7), (pdpt, 1, directory | 7),
            (directory, 0, 0x83), (directory, 1, 0x20_0000 | 0x83),
        ):  # fmt: skip
            vm.mm.copy_out(table + 8 * index, entry.to_bytes(8, "little"))
        vm.mm.populate(root, 0x3000)  # what a CPU walks must be there
        vm.on_out(0xB0, look, value_only=True)
        assert vm.run(timeout=30).ok
    assert found == [0x20_0000, 0x20_0010, 0, None]
