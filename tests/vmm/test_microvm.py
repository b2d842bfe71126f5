"""A MicroVM's life: made, loaded, run, closed; its limits; and what is left when a step fails."""

from __future__ import annotations

import errno
import gc
import struct
from typing import TYPE_CHECKING, Any

import pytest

import kvmmm
from kvmmm.errors import (
    ArenaExhaustedError,
    GuestFaultError,
    ImageError,
    IoctlError,
    KvmmmError,
    RangeError,
    StateError,
)
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.platform.kvm import abi, memslot, trial, vcpu, vm
from kvmmm.platform.kvm.device import open_device
from kvmmm.vmm import bundled
from kvmmm.vmm.microvm import HOLE, MicroVM
from kvmmm.vmm.result import RunResult
from tests.conftest import Footprint, wait_for_no_leak
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code
from tests.vmm.elf_builder import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmm.safemem.ffi import IoExit

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]


def test_200_vms_leave_nothing_behind(footprint: Footprint, scaled: Callable[[int], int]):
    guests = [bundled.find(name).path for name in ("hello", "ro", "null")]
    images = [kvmmm.read_image(path, memory_bytes=64 << 20) for path in guests]
    with MicroVM("64M") as first:  # what a process keeps is there after the first
        first.load(images[0])
        first.run(timeout=TIMEOUT)
    before = Footprint()
    for n in range(scaled(200)):
        with MicroVM("64M") as one:
            one.load(images[n % 3])
            assert one.run(timeout=TIMEOUT).outcome == ("fault" if n % 3 else "exited")
        if n % 50 == 0:
            now = Footprint()
            assert (now.fds, now.mappings) == (before.fds, before.mappings)
    leaks = wait_for_no_leak(before)
    assert not leaks, leaks
    assert Footprint().fds == footprint.fds


def test_vms_that_nobody_closes_are_collected(footprint: Footprint):
    for _ in range(10):
        one = MicroVM("64M")
        one.load(Code().exit(0).bytes, base=BASE)
        assert one.run(timeout=TIMEOUT).ok
        del one
    gc.collect()
    leaks = wait_for_no_leak(footprint)
    assert not leaks, leaks


@pytest.mark.npt
def test_many_vms_at_a_time(no_leak: None, scaled: Callable[[int], int]):
    vms = [load_code(Code().mov("rax", n).out32(0xB8), memory="4M") for n in range(scaled(64))]
    try:
        assert [one.run(timeout=TIMEOUT).status for one in vms] == list(range(len(vms)))
    finally:
        for one in vms:
            one.close()


class TestCalls:
    def test_run_before_load(self):
        with MicroVM("4M") as one, pytest.raises(StateError, match="call load"):
            one.run(timeout=1)

    def test_load_twice(self):
        with load_code(Code().exit(0)) as one:
            with pytest.raises(StateError, match="this VM has a guest"):
                one.load(Code().exit(1).bytes, base=BASE)
            assert one.run(timeout=TIMEOUT).status == 0

    @pytest.mark.parametrize("end", [Code().exit(0), Code().raw("f4"), Code().raw("0f 0b")])
    def test_run_after_the_guest_has_ended(self, end: Code):
        with load_code(end) as one:
            one.run(timeout=TIMEOUT)
            with pytest.raises(StateError, match="has ended"):
                one.run(timeout=TIMEOUT)

    @pytest.mark.parametrize(
        "call",
        [
            lambda one: one.run(timeout=1),
            lambda one: one.load(b"\xf4", base=BASE),
            lambda one: one.stop(),
            lambda one: one.on_out(0xB0, None),
            lambda one: one.statistics(),
        ],
        ids=["run", "load", "stop", "on_out", "statistics"],
    )
    @pytest.mark.parametrize("is_loaded", [False, True])
    def test_after_close(self, call: Callable[[MicroVM], object], is_loaded: bool):
        one = MicroVM("4M")
        if is_loaded:
            one.load(b"\xf4", base=BASE)
        one.close()
        one.close()
        with pytest.raises((StateError, ValueError)) as caught:
            call(one)
        assert "released" not in str(caught.value)  # who releases memoryviews is not the caller's care

    def test_a_rejected_image_leaves_a_vm_that_takes_another(self):
        with MicroVM("4M") as one:
            for image, why in ((b"", "empty"), (b"\x7fELF", "truncated"), (b"text", "ELF")):
                with pytest.raises(ImageError, match=why):
                    one.load(image)
            with pytest.raises(ImageError):
                one.load(Code().exit(0).bytes, base=1 << 40)
            one.load(Code().exit(0).bytes, base=BASE)
            assert one.run(timeout=TIMEOUT).ok

    def test_a_closed_one_is_closed_by_with_too(self, no_leak: None):
        with MicroVM("4M") as one:
            one.close()

    def test_close_while_somebody_holds_guest_memory(self, no_leak: None):
        one = MicroVM("4M")
        view = one.arena.view_of(one.area.file_range)
        with pytest.raises(StateError, match="still held"):
            one.close()
        view.release()
        one.close()

    def test_a_handler_that_answers_nonsense(self):
        with load_code(Code().out32(0xB0).exit(0)) as one:
            one.on_out(0xB0, lambda _port, _value: "nonsense", value_only=True)
            with pytest.raises(KvmmmError, match="'nonsense', which is no RunResult"):
                one.run(timeout=TIMEOUT)

    def test_a_handlers_exception_ends_the_guest(self):
        def handler(_exit: IoExit) -> None:
            raise LookupError("mine")

        with load_code(Code().out32(0xB0).exit(0)) as one:
            one.on_out(0xB0, handler)
            with pytest.raises(LookupError, match="mine"):
                one.run(timeout=TIMEOUT)
            with pytest.raises(StateError, match="has ended"):
                one.run(timeout=TIMEOUT)


class TestOnOut:
    @pytest.mark.npt
    def test_exits_with_values_registers_and_an_end(self):
        seen: list[tuple[Any, ...]] = []

        def handler(exit_: IoExit) -> RunResult | None:
            seen.append((exit_.port, exit_.value, one.vcpu.regs.r9))
            one.vcpu.regs.r9 += 5
            return RunResult("exited", status=3) if len(seen) == 3 else None

        code = Code().ring3().mov("r9", 10).mov("rax", 1)
        loop = code.here
        code.add("rax", 1).out32(0xB1).jump_back(loop)
        with load_code(code) as one:
            one.on_out(0xB1, handler)
            result = one.run(timeout=TIMEOUT)
        assert seen == [(0xB1, 2, 10), (0xB1, 3, 15), (0xB1, 4, 20)]
        assert (result.outcome, result.status) == ("exited", 3)

    def test_in_by_value_and_by_exit(self):
        def by_exit(exit_: IoExit) -> None:
            if not exit_.is_write:
                exit_.value = 0x22

        found: list[int] = []
        code = Code().ring3().mov("rax", 0).in8(0xB0).out32(0xB2).in8(0xB1).out32(0xB2)
        with load_code(code.exit(0)) as one:
            one.on_out(0xB0, lambda _port, value: 0x11 if value is None else None, value_only=True)
            one.on_out(0xB1, by_exit)
            one.on_out(0xB2, lambda _port, value: found.append(value), value_only=True)
            assert one.run(timeout=TIMEOUT).ok
        assert found == [0x11, 0x22]

    @pytest.mark.parametrize("port", [-1, 1 << 16])
    def test_a_port_has_16_bits(self, port: int):
        with MicroVM("4M") as one, pytest.raises(ValueError, match="no port"):
            one.on_out(port, None)

    def test_ring_3_may_use_open_ports_only(self):
        result = run_code(Code().ring3().out32(0xC0).exit(0))
        assert result.outcome == "exception", describe(result)
        assert "#GP" in result.report


class TestMemory:
    @pytest.mark.parametrize(
        ("asked", "given"),
        [("2M", 2), ("3M", 4), ("64M", 64), (5 << 20, 6), ("3G", 3072), ("5G", 5120), ("40G", 40960)],
    )
    def test_its_last_byte_works_and_none_behind_kvmmms_pages(self, asked: str | int, given: int):
        end = given << 20
        with MicroVM(asked) as one:
            assert one.memory_bytes == end <= one.area.start
            code = Code().ring3().mov("rbx", end - 8).mov("rcx", 0x1122334455667788)
            code.store("rbx", "rcx").mov("rbx", one.area.end).load("rax", "rbx").spin()
            one.load(code.bytes, base=0x10_0000)
            result = one.run(timeout=TIMEOUT)
            assert (result.outcome, result.addr) == ("fault", one.area.end), describe(result)
            assert one.mm.read(end - 8, 8) == struct.pack("<Q", 0x1122334455667788)

    @pytest.mark.parametrize("addr", [HOLE.start, HOLE.start + 0x123000, HOLE.end - 8])
    @pytest.mark.parametrize("ring", [0, 3])
    def test_the_hole_below_4_gib_is_no_memory(self, addr: int, ring: int):
        result = run_code(Code().ring(ring).mov("rbx", addr).load("rax", "rbx").spin(), memory="5G")
        assert (result.outcome, result.addr) == ("fault", addr), describe(result)
        assert "nothing is mapped" in result.report

    def test_around_the_hole_memory_is_whole(self):
        code = Code().ring3()
        places = [HOLE.start - 8, HOLE.end, (5 << 30) - 8]
        for addr in places:
            code.mov("rbx", addr).store("rbx", "rbx")
        with load_code(code.exit(0), memory="5G") as one:
            assert one.run(timeout=TIMEOUT).ok
            for addr in places:
                assert one.mm.read(addr, 8) == struct.pack("<Q", addr)
            assert [(s, e) for s, e, v in one.mm.vmas if v.name == "[memory]"] == [
                (0x1000, BASE), (BASE + 0x1000, HOLE.start), (HOLE.end, 5 << 30),
            ]  # fmt: skip
            assert all(not HOLE.overlaps(kvmmm.AddrRange(s, e)) for s, e, _ in one.mm.vmas)

    def test_kvmmms_own_pages_keep_out_of_the_hole(self):
        """Memory that ends inside it, or just below."""
        for memory in (HOLE.start, HOLE.start - (2 << 20), HOLE.start + (4 << 20), HOLE.end):
            with load_code(Code().exit(0), memory=memory) as one:
                assert not HOLE.overlaps(kvmmm.AddrRange(one.area.start, one.area.end))
                assert one.run(timeout=TIMEOUT).ok

    @pytest.mark.parametrize("memory", [0, -1, "0M", "much", "", "1X"])
    def test_nonsense(self, memory: int | str):
        with pytest.raises(ValueError, match="size"):
            MicroVM(memory)

    def test_more_than_the_cpu_can_address(self, no_leak: None):
        bits = open_device().cpuid.physical_bits
        with pytest.raises(RangeError, match=f"{bits} bits"):
            MicroVM(1 << bits)

    def test_the_arena_bounds_what_is_touched(self):
        code = Code().ring3().mov("rbx", 4 << 20)
        loop = code.here
        code.store("rbx", "rbx").add("rbx", 4096).jump_back(loop)
        result = run_code(code, memory="64M", arena="16M")
        assert result.outcome == "memory", describe(result)
        assert result.exit_code == 72
        assert result.addr is not None
        assert "16384 KiB" in result.report
        assert result.stats is not None
        assert result.stats.adds_up
        assert result.stats.used_bytes == 16 << 20

    def test_an_image_that_the_arena_cannot_hold(self, no_leak: None):
        with MicroVM("64M", arena="4M") as one, pytest.raises(ArenaExhaustedError):
            one.load(bytes(8 << 20), base=BASE)

    def test_host_copies(self):
        with load_code(Code().exit(0)) as one:
            assert one.mm.copy_out(0x50_0000, b"hello") == 5
            buffer = bytearray(5)
            assert one.mm.copy_in(0x50_0000, buffer) == 5
            assert buffer == b"hello"
            assert one.mm.read(BASE, 2) == Code().exit(0).bytes[:2]
            with pytest.raises(GuestFaultError):
                one.mm.read(0, 1)
            with pytest.raises(GuestFaultError):
                one.mm.copy_out(one.area.start, b"x")


class TestCommandLine:
    def boot_info(self, one: MicroVM) -> Any:
        from kvmmm.safemem.ffi import ffi

        return ffi.cast("struct kvmmm_boot_info *", one.area.hva + 0x140)

    @pytest.mark.parametrize("args", [[], ["a"], ["one", "two=2", "drei=π"]])
    def test_it_is_there_in_utf_8(self, args: list[str]):
        with MicroVM("4M") as one:
            one.load(Code().exit(0).bytes, base=BASE, args=args)
            info = self.boot_info(one)
            text = " ".join(args).encode()
            assert info.cmdline_bytes == len(text)
            assert one.area.read(info.cmdline, len(text) + 1) == text + b"\0"

    def longest(self) -> int:
        with MicroVM("64M") as one:
            with pytest.raises(ImageError, match="too many") as caught:
                one.load(bundled.find("hello").path, args=["x" * 10_000])
            return int(str(caught.value).rpartition(":")[2].split()[0])

    def test_the_longest_that_fits_arrives(self):
        text = "x" * (self.longest() - 4) + "=end"
        with MicroVM("64M") as one:
            one.load(bundled.find("hello").path, args=[text])
            info = self.boot_info(one)
            assert one.area.read(info.cmdline, info.cmdline_bytes + 1) == text.encode() + b"\0"
            assert one.run(timeout=TIMEOUT).ok

    def test_one_more_is_rejected_and_nothing_is_loaded(self):
        n_bytes = self.longest() + 1
        with MicroVM("64M") as one:
            with pytest.raises(ImageError, match=f"{n_bytes} bytes are too many"):
                one.load(bundled.find("hello").path, args=["x" * n_bytes])
            with pytest.raises(StateError, match="nothing is loaded"):
                one.run(timeout=TIMEOUT)
            one.load(bundled.find("args").path, args=["fits"])
            assert one.run(timeout=TIMEOUT).ok

    def test_what_the_guest_is_told_of_its_memory(self):
        with MicroVM("64M") as one:
            one.load(bundled.find("hello").path)
            info = self.boot_info(one)
            regions = [
                struct.unpack("<QQII", one.area.read(info.regions + 24 * n, 24))
                for n in range(info.n_regions)
            ]
            assert [(s, e) for s, e, _, _ in regions[:-1]] == [(s, e) for s, e, _ in one.mm.vmas]
            assert [flags for *_, flags in regions[:-1]] == [v.perms for _, _, v in one.mm.vmas]
            assert regions[-1] == (one.area.start, one.area.end, 3, READ_WRITE)
            assert info.memory_bytes == 64 << 20
            assert info.stack_top == 64 << 20

    def test_as_many_segments_as_there_is_room_for_regions(self):
        """A page of regions is not enough for all of these: rejected, or all listed."""
        from tests.vmm.elf_builder import Elf, Phdr, R, W, X

        phdrs = [
            Phdr(flags=R | (X if n % 2 == 0 else W), vaddr=BASE + n * 4096, offset=0x9000 + n * 16)
            for n in range(400)
        ]
        elf = Elf(phdrs=phdrs, entry=BASE, contents={0x9000: Code().exit(0).bytes})
        with MicroVM("64M") as one:
            try:
                one.load(elf.build())
            except ImageError as e:
                assert "fit" in str(e) or "memory map" in str(e)  # noqa: PT017
                return
            info = self.boot_info(one)
            last = struct.unpack("<QQII", one.area.read(info.regions + 24 * (info.n_regions - 1), 24))
            assert last[:3] == (one.area.start, one.area.end, 3)


# The ioctls on the way to a VM, and the modules that call them; those of `trial` once a process.
STEPS = [
    (vm, "KVM_CREATE_VM"),
    (memslot, "KVM_SET_USER_MEMORY_REGION"),
    (vm, "KVM_CREATE_VCPU"),
    (vcpu, "KVM_SET_CPUID2"),
    (vcpu, "KVM_SET_XCRS"),
    (trial, "KVM_CREATE_VM"),
    (trial, "KVM_CREATE_VCPU"),
    (trial, "KVM_GET_SREGS"),
    (trial, "KVM_SET_USER_MEMORY_REGION"),
]


class TestFailingSteps:
    """Each ioctl on the way to a VM fails once: an error that names it, and nothing left behind."""

    @pytest.mark.parametrize(("module", "name"), STEPS)
    def test_nothing_leaks(
        self, module: Any, name: str, monkeypatch: pytest.MonkeyPatch, footprint: Footprint
    ):
        number = getattr(abi, name)
        device = open_device()
        if name == "KVM_SET_XCRS" and not device.trial.has_avx:
            pytest.skip("no AVX here")
        if module is trial:
            monkeypatch.setattr(device, "_trial", None)
        real = module.ioctl

        def ioctl(fd: int, request: int, argument: int = 0) -> int:
            return -errno.ENOSPC if request == number else int(real(fd, request, argument))

        with monkeypatch.context() as patch:
            patch.setattr(module, "ioctl", ioctl)
            for _ in range(3):
                with pytest.raises(IoctlError) as caught:
                    MicroVM("4M")
                assert caught.value.ioctl == name
                assert caught.value.errno == errno.ENOSPC
                del caught
        leaks = wait_for_no_leak(footprint)
        assert not leaks, leaks
        assert run_code(Code().exit(5)).status == 5

    def test_a_descriptor_is_closed_once(self, monkeypatch: pytest.MonkeyPatch):
        """Closing it again would close what another thread has opened meanwhile."""
        import os

        number, real = abi.KVM_SET_CPUID2, vcpu.ioctl

        def ioctl(fd: int, request: int, argument: int = 0) -> int:
            return -errno.ENOSPC if request == number else int(real(fd, request, argument))

        with monkeypatch.context() as patch:
            patch.setattr(vcpu, "ioctl", ioctl)
            with pytest.raises(IoctlError) as caught:
                MicroVM("4M")
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
        del caught
        gc.collect()
        for fd in taken:
            os.close(fd)  # EBADF, had somebody closed it

    def test_an_arena_that_cannot_be(self, footprint: Footprint):
        with pytest.raises(RangeError, match="arena"):
            MicroVM("4M", arena=1 << 50)
        leaks = wait_for_no_leak(footprint)
        assert not leaks, leaks


def test_tiny_elf_of_the_loaders_tests_runs():
    """16 bytes of nop at TEXT, then nothing: it runs into the zeros of its page."""
    with MicroVM("4M") as one:
        one.load(tiny())
        result = one.run(timeout=1)
    assert result.outcome in {"fault", "deadline"}, describe(result)
