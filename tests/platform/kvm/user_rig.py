"""A VM for guests in ring 3 without kvmmm's upper floors: kernel half, address space, one vCPU.

`Turner` is a guest that turns in a loop on a thread of its own, and tells what it sees.
"""

from __future__ import annotations

import struct
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from kvmmm.arena import Arena
from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange, FileRange
from kvmmm.platform.kvm.guest_physical import GuestPhysical
from kvmmm.platform.kvm.kernel_half import KernelHalf
from kvmmm.platform.kvm.memslot import MemslotTable
from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace
from kvmmm.platform.kvm.vm import Vm
from kvmmm.safemem.ffi import lib
from tests.vmm.machine_code import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.memmap.file import File

PAGE = 4096
HUGE = 2 << 20
SECOND = 1_000_000_000
CODE, RESULT, DATA = 0x40_0000, 0x60_0000, 0x4000_0000


class UserRig:
    """The VM.

    Attributes:
        space: The address space that code and result page are mapped in.
        faults: (addr, access) of every #PF that came to `on_fault`.
    """

    def __init__(
        self, *, lazy_slots: bool = False, arena_bytes: int = 64 << 20, **options: Any
    ) -> None:
        self.arena = Arena(arena_bytes)
        self.vm = Vm()
        self.physical = GuestPhysical(self.vm, self.arena, lazy_slots=lazy_slots)
        self.half = KernelHalf(self.physical, n_vcpus=4)
        self.spaces: list[PageTableAddressSpace] = []
        self.code = self.arena.allocate(PAGE)
        self.result = self.arena.allocate(PAGE)
        self.space = self.new_space(**options)
        self.faults: list[tuple[int, int]] = []

    def new_space(self, **options: Any) -> PageTableAddressSpace:
        space = PageTableAddressSpace(self.physical, self.half.fixed, **options)
        self.spaces.append(space)
        space.map_file(CODE, self.arena, self.code, READ | EXECUTE)
        space.map_file(RESULT, self.arena, self.result, READ_WRITE)
        return space

    def frames(self, *words: int, n_pages: int = 1, align_bytes: int = PAGE) -> FileRange:
        """Frames; the first word of each page is one of `words`."""
        fr = self.arena.allocate(n_pages * PAGE, align_bytes=align_bytes)
        for i in range(n_pages if words else 0):
            at = fr.start + i * PAGE
            struct.pack_into("<Q", self.arena.view, at, words[min(i, len(words) - 1)])
        return fr

    def word_at(self, fr: FileRange) -> int:
        return int(struct.unpack_from("<Q", self.arena.view, fr.start)[0])

    def load(self, code: bytes, **registers: int) -> Any:
        """A vCPU that begins with `code`; ports 0xb0 and 0xb1 are exits."""
        self.arena.view[self.code.start : self.code.start + len(code)] = code
        vcpu = self.vm.create_vcpu()
        self.half.load(vcpu, self.space.root_gpa, rip=CODE, rsp=RESULT + PAGE)
        self.space.activate(vcpu)
        for port in (0xB0, 0xB1):
            vcpu.set_port(port, lib.KVMMM_PORT_KIND_EXIT, None)
        for name, value in registers.items():
            setattr(vcpu.regs, name, value)
        vcpu.on_fault = self._on_fault
        return vcpu

    def _on_fault(self, addr: int, access: int) -> str:
        self.faults.append((addr, access))
        return "fault"

    def close(self) -> None:
        self.vm.close()
        for space in self.spaces:
            space.release()
        self.half.close()
        self.physical.close()
        self.arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ar(start: int, length_bytes: int = PAGE) -> AddrRange:
    return AddrRange(start, start + length_bytes)


def read_loop() -> bytes:
    """Word at rsi to the result page, turn by turn."""
    code = Code()
    loop = code.here
    code.load("rax", "rsi").store("rdi", "rax").add("rdi", 8).inc_at("rdi").add("rdi", -8)
    return code.jump_back(loop).bytes


def write_loop() -> bytes:
    """The word at rsi is counted up, turn by turn."""
    code = Code()
    loop = code.here
    code.inc_at("rsi").load("rax", "rsi").store("rdi", "rax")
    code.add("rdi", 8).inc_at("rdi").add("rdi", -8)
    return code.jump_back(loop).bytes


def step_loop() -> bytes:
    """The word at rsi to rbx, step by step; the host moves rsi."""
    code = Code().out32(0xB0)
    loop = code.here
    return code.load("rbx", "rsi").out32(0xB0).jump_back(loop).bytes


class Turner:
    """A vCPU that turns in a loop, on a thread.

    Attributes:
        answer: What its run came to; None while it runs.
    """

    def __init__(self, rig: UserRig, code: bytes, addr: int = DATA) -> None:
        self.rig = rig
        self._result_offset = 16 * len(rig.vm.vcpus)
        self.vcpu = rig.load(code, rsi=addr, rdi=RESULT + self._result_offset)
        self.answer: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.answer = self.vcpu.run(30 * SECOND)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.vcpu.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _words(self) -> tuple[int, int]:
        at = self.rig.result.start + self._result_offset
        word, turns = struct.unpack_from("<QQ", self.rig.arena.view, at)
        return word, turns

    def sees(self) -> int:
        """The word that it has seen in a turn that began after this was called."""
        turns = self._words()[1]
        self.wait_for(lambda: self._words()[1] >= turns + 2)
        return self._words()[0]

    def faults(self) -> tuple[int, int]:
        """The #PF that ends its run."""
        self.wait_for(lambda: self.answer is not None)
        assert self.answer == "fault"
        return self.rig.faults[-1]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no progress: {self.answer!r}, {self.rig.faults}"
            assert self._thread.is_alive() or condition(), f"ended: {self.answer!r}"
            time.sleep(0)


class FakeVm:
    """Slots without KVM, pauses counted."""

    def __init__(self, limit: int, physical_bits: int) -> None:
        self.fd = 0
        self.memslots = MemslotTable(-1, limit)
        self.device = SimpleNamespace(cpuid=SimpleNamespace(physical_bits=physical_bits))
        self.n_pauses = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.n_pauses += 1
        yield


class WholeFile:
    """A File with one reference on everything; hva as it is given."""

    may_fault = False
    writable = True

    def __init__(self, hva: int, capacity_bytes: int) -> None:
        self.hva = hva
        self.capacity_bytes = capacity_bytes

    def ref_count(self, fo: int) -> int:
        return int(fo < self.capacity_bytes)


def as_file(file: object) -> File:
    return file  # type: ignore[return-value]
