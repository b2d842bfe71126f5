"""System calls without a CPU: what reaches the mm, in which order mistakes are found, write(2)."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, MmError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm import MemoryManager
from kvmmm.mm.layout import Layout
from kvmmm.mm.vma import LOCK_EAGER
from kvmmm.vmm import user_memory_calls as calls
from kvmmm.vmm.user_process import STREAMS, Process
from kvmmm.vmm.user_syscall import SYS_ARCH_PRCTL, SYS_WRITE, Syscalls
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
TOP = 0x7FFF_FFFF_F000
MINUS_1 = (1 << 64) - 1
PRIVATE_ANON = calls.MAP_PRIVATE | calls.MAP_ANONYMOUS


class RecordingMm:
    """Takes every call, and remembers it."""

    max_addr = TOP
    layout = Layout(0x10000, TOP)

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, args, kwargs))
            return AddrRange(0x7000, 0x8000) if name == "mmap" else 0x9000

        return call


@pytest.fixture
def mm() -> RecordingMm:
    return RecordingMm()


@pytest.fixture
def process(mm: RecordingMm) -> Any:
    return SimpleNamespace(mm=mm, files={5: "a file"}, streams=STREAMS)


def refusal(call: Any, process: Any, *args: int) -> str:
    with pytest.raises(MmError) as caught:
        call(process, (*args, *[0] * (6 - len(args))))
    assert not process.mm.seen, "refused before the mm was asked"
    return errno.errorcode[caught.value.errno or 0]


def mmap(process: Any, addr: int, length: int, prot: int, flags: int, *rest: int) -> dict[str, Any]:
    """The keywords that an mmap hands to the mm."""
    fd, offset = rest or (MINUS_1, 0)
    assert calls.mmap(process, (addr, length, prot, flags, fd, offset)) == 0x7000
    (name, args, kwargs) = process.mm.seen.pop()
    assert (name, args) == ("mmap", (length, prot & 7))
    return {key: value for key, value in kwargs.items() if value}


class TestMmap:
    def test_plain(self, process: Any):
        assert mmap(process, 0, PAGE, 3, PRIVATE_ANON) == {"private": True}

    def test_shared(self, process: Any):
        flags = calls.MAP_SHARED | calls.MAP_ANONYMOUS
        assert mmap(process, 0, PAGE, 3, flags) == {}

    def test_every_flag(self, process: Any):
        flags = PRIVATE_ANON | calls.MAP_32BIT | calls.MAP_GROWSDOWN | calls.MAP_STACK
        flags |= calls.MAP_POPULATE | calls.MAP_LOCKED | 0x4000
        assert mmap(process, 0, PAGE, 7, flags) == {
            "private": True, "low_32bit": True, "grows_down": True, "stack": True,
            "populate": True, "lock_mode": LOCK_EAGER,
        }  # fmt: skip

    def test_fixed_replaces_and_noreplace_does_not(self, process: Any):
        fixed = mmap(process, 0x20000, PAGE, 3, PRIVATE_ANON | calls.MAP_FIXED)
        assert fixed == {"private": True, "addr": 0x20000, "fixed": True, "replace": True}
        for flags in (calls.MAP_FIXED_NOREPLACE, calls.MAP_FIXED_NOREPLACE | calls.MAP_FIXED):
            kept = mmap(process, 0x20000, PAGE, 3, PRIVATE_ANON | flags)
            assert kept == {"private": True, "addr": 0x20000, "fixed": True, "no_replace": True}

    def test_hints_are_rounded(self, process: Any):
        assert mmap(process, 0x20FFF, PAGE, 3, PRIVATE_ANON)["addr"] == 0x20000
        assert mmap(process, 0x1000, PAGE, 3, PRIVATE_ANON)["addr"] == 0x10000
        assert "addr" not in mmap(process, 0xFFF, PAGE, 3, PRIVATE_ANON)

    def test_a_file(self, process: Any):
        private = mmap(process, 0, PAGE, 1, calls.MAP_PRIVATE, 5, 0x3000)
        assert private == {"private": True, "mappable": "a file", "offset": 0x3000}
        for kind in (calls.MAP_SHARED, calls.MAP_SHARED_VALIDATE):
            assert mmap(process, 0, PAGE, 1, kind, 5, 0)["mappable"] == "a file"

    def test_an_anonymous_mapping_does_not_look_at_its_descriptor(self, process: Any):
        assert "mappable" not in mmap(process, 0, PAGE, 1, PRIVATE_ANON, 5, 0)

    def test_only_the_low_half_of_a_descriptor_counts(self, process: Any):
        assert mmap(process, 0, PAGE, 1, calls.MAP_PRIVATE, 7 << 32 | 5, 0)["mappable"] == "a file"

    @pytest.mark.parametrize(
        ("args", "name"),
        [
            ((0, PAGE, 3, PRIVATE_ANON, MINUS_1, 1), "EINVAL"),
            ((0, PAGE, 3, calls.MAP_ANONYMOUS, MINUS_1, 0), "EINVAL"),
            ((0, PAGE, 3, calls.MAP_ANONYMOUS | calls.MAP_SHARED_VALIDATE, MINUS_1, 0), "EINVAL"),
            ((0, PAGE, 3, calls.MAP_PRIVATE, 9, 0), "EBADF"),
            ((0, PAGE, 3, calls.MAP_PRIVATE, MINUS_1, 0), "EBADF"),
            ((0, 0, 3, calls.MAP_PRIVATE, 9, 0), "EBADF"),
            ((0, PAGE, 3, calls.MAP_PRIVATE, 9, 1), "EINVAL"),
            ((0, PAGE, 3, calls.MAP_SHARED, 1, 0), "ENODEV"),
            ((0, PAGE, 3, calls.MAP_SHARED_VALIDATE | 1 << 40, 5, 0), "ENOTSUP"),
            ((0, PAGE, 3, 0x21 | calls.MAP_GROWSDOWN, MINUS_1, 0), "EINVAL"),
            ((0, PAGE, 3, PRIVATE_ANON | calls.MAP_HUGETLB, MINUS_1, 0), "ENOMEM"),
        ],
    )
    def test_refused(self, process: Any, args: tuple[int, ...], name: str):
        assert refusal(calls.mmap, process, *args) == name


class TestOthers:
    def test_munmap(self, process: Any, mm: RecordingMm):
        assert calls.munmap(process, (PAGE, 7, 0, 0, 0, 0)) == 0
        assert mm.seen.pop() == ("munmap", (PAGE, 7), {})
        assert refusal(calls.munmap, process, 0xFFFF_FF80_0000_0000, PAGE) == "EINVAL"
        assert refusal(calls.munmap, process, TOP - PAGE, 2 * PAGE) == "EINVAL"
        assert refusal(calls.munmap, process, PAGE, MINUS_1) == "EINVAL"

    def test_mprotect(self, process: Any, mm: RecordingMm):
        assert calls.mprotect(process, (PAGE, 9, 3 | calls.PROT_SEM, 0, 0, 0)) == 0
        assert mm.seen.pop() == ("mprotect", (PAGE, 9, 3), {"grows_down": False})
        calls.mprotect(process, (PAGE, 9, 1 | calls.PROT_GROWSDOWN, 0, 0, 0))
        assert mm.seen.pop() == ("mprotect", (PAGE, 9, 1), {"grows_down": True})

    @pytest.mark.parametrize(
        ("args", "name"),
        [
            ((PAGE + 1, 0, 3), "EINVAL"),
            ((PAGE, 0, calls.PROT_GROWSDOWN | calls.PROT_GROWSUP), "EINVAL"),
            ((PAGE, MINUS_1, 3), "ENOMEM"),
            ((MINUS_1 - 4095, PAGE, 0x40), "ENOMEM"),
            ((PAGE, PAGE, 0x40), "EINVAL"),
            ((PAGE, PAGE, calls.PROT_GROWSUP), "EINVAL"),
        ],
    )
    def test_mprotect_refused(self, process: Any, args: tuple[int, ...], name: str):
        assert refusal(calls.mprotect, process, *args) == name

    def test_mprotect_of_nothing_looks_at_no_prot(self, process: Any, mm: RecordingMm):
        assert calls.mprotect(process, (PAGE, 0, 0x40, 0, 0, 0)) == 0
        assert not mm.seen

    def test_mremap(self, process: Any, mm: RecordingMm):
        assert calls.mremap(process, (PAGE, 1, 2, 0, 77, 0)) == 0x9000
        assert mm.seen.pop() == ("mremap", (PAGE, 1, 2), {"may_move": False, "new_addr": None})
        calls.mremap(process, (PAGE, 1, 2, 3, 0x8000, 0))
        assert mm.seen.pop()[2] == {"may_move": True, "new_addr": 0x8000}
        for flags in (2, 4, 5, 8, 1 << 32):
            assert refusal(calls.mremap, process, PAGE, 1, 2, flags) == "EINVAL"

    def test_brk_and_madvise(self, process: Any, mm: RecordingMm):
        assert calls.brk(process, (5, 0, 0, 0, 0, 0)) == 0x9000
        assert calls.madvise(process, (PAGE, 5, 1 << 32 | 4, 0, 0, 0)) == 0
        assert [name for name, _, _ in mm.seen] == ["brk", "madvise"]
        assert mm.seen[1][1] == (PAGE, 5, 4), "an int has 32 bits"


class FakeVm:
    """As much of a UserVM as system calls need, over a real memory manager."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.output: list[bytes] = []
        self.bases: dict[str, int] = {}
        self.vcpu = SimpleNamespace(regs=SimpleNamespace())
        self.scheduler = SimpleNamespace()

    def write_console(self, chunk: bytes) -> None:
        self.output.append(chunk)

    def set_segment_base(self, name: str, base: int) -> None:
        self.bases[name] = base

    def segment_base(self, name: str) -> int:
        return self.bases[name]


class Machine:
    """A process over a fake address space, and its system calls."""

    def __init__(self, arena: Arena) -> None:
        self.mm = MemoryManager(arena, FakeAddressSpace(TOP), layout=Layout(0x10000, TOP))
        space: Any = self.mm.address_space
        image: Any = None
        self.vm: Any = FakeVm(Process(1, self.mm, space, image))
        self.syscalls = Syscalls(self.vm)

    def call(self, number: int, *args: int) -> Any:
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        for name, value in zip(names, (*args, *[0] * 6), strict=False):
            setattr(self.vm.vcpu.regs, name, value & MINUS_1)
        return self.syscalls.serve(number)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Arena(4 << 20) as arena:
        made = Machine(arena)
        yield made
        made.mm.close()


class TestWrite:
    def test_partial(self, machine: Machine):
        start = machine.mm.mmap(2 * PAGE, 3).start
        machine.mm.munmap(start + PAGE, PAGE)
        machine.mm.write(start + PAGE - 3, b"abc")
        assert machine.call(SYS_WRITE, 1, start + PAGE - 3, 100) == 3
        assert machine.call(SYS_WRITE, 2, start + PAGE, 100) == -errno.EFAULT
        assert machine.vm.output == [b"abc"]

    def test_large(self, machine: Machine):
        start = machine.mm.mmap(1 << 20, 3).start
        machine.mm.write(start, bytes(range(256)) * 4096)
        assert machine.call(SYS_WRITE, 1, start + 1, (1 << 20) - 1) == (1 << 20) - 1
        assert b"".join(machine.vm.output) == (bytes(range(256)) * 4096)[1:]

    @pytest.mark.parametrize(
        ("args", "answer"),
        [
            ((0, 0, 0), -errno.EBADF),
            ((3, 0, 0), -errno.EBADF),
            ((MINUS_1, 0, 0), -errno.EBADF),
            ((1, 0, 0), 0),
            ((1, TOP, 0), 0),
            ((1, TOP + 1, 0), -errno.EFAULT),
            ((1, 0, 1), -errno.EFAULT),
            ((1, MINUS_1, 1), -errno.EFAULT),
            ((1, 0x20000, MINUS_1), -errno.EFAULT),
            ((1, TOP - 1, 2), -errno.EFAULT),
        ],
    )
    def test_refused(self, machine: Machine, args: tuple[int, int, int], answer: int):
        assert machine.call(SYS_WRITE, *args) == answer
        assert machine.vm.output == []

    def test_what_is_forbidden_cannot_be_written(self, machine: Machine):
        start = machine.mm.mmap(PAGE, 0).start
        assert machine.call(SYS_WRITE, 1, start, 1) == -errno.EFAULT


class TestServe:
    def test_errors_become_errnos(self, machine: Machine):
        def fail(error: Exception) -> Any:
            def call(*_: Any) -> int:
                raise error

            return call

        for error, answer in (
            (MmError(errno.EEXIST, "x", 0, "why"), -errno.EEXIST),
            (ArenaExhaustedError(1, 2, 3), -errno.ENOMEM),
        ):
            machine.syscalls.set(500, fail(error))
            assert machine.call(500) == answer
        machine.syscalls.set(500, fail(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            machine.call(500)
        machine.syscalls.set(500, None)
        assert machine.call(500) == -errno.ENOSYS
        assert machine.syscalls.n_served == 4

    def test_mmap_answers_with_an_address(self, machine: Machine):
        addr = machine.call(9, 0, 100, 3, PRIVATE_ANON, MINUS_1, 0)
        assert addr % PAGE == 0
        machine.mm.write(addr, b"x")
        assert machine.call(11, addr, 100) == 0
        assert machine.call(11, addr + 1, 100) == -errno.EINVAL

    def test_arch_prctl(self, machine: Machine):
        start = machine.mm.mmap(PAGE, 3).start
        assert machine.call(SYS_ARCH_PRCTL, 0x1002, 0x1234) == 0
        assert machine.call(SYS_ARCH_PRCTL, 0x1003, start) == 0
        assert machine.mm.read(start, 8) == b"\x34\x12\0\0\0\0\0\0"
        assert machine.call(SYS_ARCH_PRCTL, 0x1003, 0) == -errno.EFAULT
        assert machine.call(SYS_ARCH_PRCTL, 0x1001, TOP) == -errno.EPERM
        assert machine.call(SYS_ARCH_PRCTL, 0x3001, 0) == -errno.EINVAL
        assert machine.vm.bases == {"fs": 0x1234}
