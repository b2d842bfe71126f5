"""Memslots: ranges, numbers, limits, and what KVM has to say."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import IoctlError, RangeError, StateError
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.memslot import MemslotTable
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import HostMapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.platform.kvm.conftest import Kernel

PAGE = 4096


def test_add_and_remove(kernel: Kernel):
    table = MemslotTable(-1, 8)
    slot = table.add(0x2000, 0x3000, 0x7000_0000, abi.KVM_MEM_READONLY)
    assert kernel.slots == {slot.number: (0x2000, 0x3000, 0x7000_0000, abi.KVM_MEM_READONLY)}
    assert (slot.end, slot.delta) == (0x5000, 0x7000_0000 - 0x2000)
    assert table.find(0x1FFF) is None
    assert table.find(0x2000) is slot
    assert table.find(0x4FFF) is slot
    assert table.find(0x5000) is None
    assert table.overlapping(0x4000, 0x9000) == [slot]
    assert table.overlapping(0x5000, 0x9000) == []
    assert "ro [0x2000, 0x5000)" in repr(slot)
    table.remove(slot)
    assert kernel.slots == {}
    assert len(table) == 0
    assert table.find(0x2000) is None


@pytest.mark.parametrize(
    ("gpa", "length", "hva"),
    [(1, PAGE, 0), (0, 100, 0), (0, 0, 0), (0, -PAGE, 0), (0, PAGE, 8)],
)
def test_only_whole_pages(kernel: Kernel, gpa: int, length: int, hva: int):
    table = MemslotTable(-1, 8)
    with pytest.raises(RangeError, match="whole 4 KiB pages"):
        table.add(gpa, length, hva)
    assert kernel.slots == {}
    assert len(table) == 0


@pytest.mark.parametrize("gpa", [0x1000, 0x2000, 0x4000])
def test_overlap_is_refused_before_the_kernel_is_asked(kernel: Kernel, gpa: int):
    table = MemslotTable(-1, 8)
    table.add(0x2000, 0x3000, 0)
    with pytest.raises(RangeError):
        table.add(gpa, 0x2000, 0)
    assert len(kernel.slots) == len(table) == 1
    # The number that was not used is used next.
    assert table.add(0x8000, PAGE, 0).number == 1


def test_limit(kernel: Kernel):
    table = MemslotTable(-1, 3)
    slots = [table.add(i * PAGE, PAGE, 0) for i in range(3)]
    with pytest.raises(StateError, match="all 3 memslots"):
        table.add(9 * PAGE, PAGE, 0)
    table.remove(slots[1])
    assert table.add(9 * PAGE, PAGE, 0).number == slots[1].number
    assert len(kernel.slots) == 3


def test_numbers_are_reused_and_stay_below_the_limit(kernel: Kernel):
    rng = random.Random(7)
    table = MemslotTable(-1, 16)
    live = []
    for _ in range(2000):
        if live and (len(live) == 16 or rng.random() < 0.5):
            table.remove(live.pop(rng.randrange(len(live))))
        else:
            gpa = next(g for g in range(0, 17 * PAGE, PAGE) if table.find(g) is None)
            live.append(table.add(gpa, PAGE, gpa))
        assert {s.number for s in live} == set(kernel.slots)
        assert all(number < 16 for number in kernel.slots)


def test_a_refusal_leaves_everything_as_it_was(kernel: Kernel):
    table = MemslotTable(-1, 8)
    first = table.add(0, PAGE, 0)
    kernel.error = errno.ENOMEM
    with pytest.raises(IoctlError):
        table.add(PAGE, PAGE, 0)
    with pytest.raises(IoctlError):
        table.remove(first)
    kernel.error = 0
    assert len(table) == len(kernel.slots) == 1
    assert table.find(0) is first
    assert table.add(PAGE, PAGE, 0).number == 1


def test_an_error_names_ioctl_arguments_and_errno(kernel: Kernel):
    kernel.error = errno.EINVAL
    with pytest.raises(IoctlError) as caught:
        MemslotTable(-1, 8).add(0x1000, 0x2000, 0x3000, abi.KVM_MEM_READONLY)
    error = caught.value
    assert error.ioctl == "KVM_SET_USER_MEMORY_REGION"
    assert error.arguments == "slot=0, flags=0x2, gpa=0x1000, size=0x2000, hva=0x3000"
    assert error.errno == errno.EINVAL
    assert str(error) == f"{error.ioctl}({error.arguments}) failed: EINVAL, Invalid argument"
    assert isinstance(error, OSError)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(2 << 20) as arena:
        yield arena


@pytest.mark.kvm
class TestOnKvm:
    def test_kvm_takes_what_the_table_takes(self, arena: Arena):
        with Vm() as vm:
            slots = [vm.memslots.add(i << 21, PAGE, arena.hva + i * PAGE) for i in range(20)]
            for slot in slots[::2]:
                vm.memslots.remove(slot)
            for i in range(10):
                vm.memslots.add((i + 100) << 21, PAGE, arena.hva, abi.KVM_MEM_READONLY)
            assert len(vm.memslots) == 20

    def test_kvm_refuses_what_the_table_cannot_know(self, arena: Arena):
        with Vm() as vm, pytest.raises(IoctlError) as caught:
            vm.memslots.add(1 << 60, PAGE, arena.hva, 1 << 31)  # no such flag
        assert caught.value.errno == errno.EINVAL
        assert "gpa=0x1000000000000000" in str(caught.value)

    def test_a_slot_on_a_vm_that_is_closed(self, arena: Arena):
        vm = Vm()
        vm.close()
        with pytest.raises(IoctlError) as caught:
            vm.memslots.add(0, PAGE, arena.hva)
        assert caught.value.errno == errno.EBADF


def test_host_mapping_refuses_nonsense():
    with pytest.raises(ValueError, match="power of two"):
        HostMapping(0, 4096, 3)
    with pytest.raises(ValueError, match="above zero"):
        HostMapping(0, 0, 4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        HostMapping(-1, 4096, 4096)
