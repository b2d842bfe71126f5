"""A guest's memory: sizes, the hole below 4 GiB, the arena's bound, what it is told of it."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

import kvmmm
from kvmmm.arena import Arena
from kvmmm.errors import (
    ArenaExhaustedError,
    GuestFaultError,
    ImageError,
    RangeError,
    StateError,
    SyscallError,
)
from kvmmm.hostarch.access import READ_WRITE
from kvmmm.platform.kvm.device import open_device
from kvmmm.safemem.ffi import ffi
from kvmmm.vmm import bundled, guest_memory
from kvmmm.vmm.microvm import HOLE, MicroVM
from tests.vmm.elf_builder import Elf, Phdr, R, W, X
from tests.vmm.guest_run import TIMEOUT, describe, load_code, run_code
from tests.vmm.machine_code import BASE, Code

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]


class TestMemory:
    @pytest.mark.parametrize(
        ("asked", "given"),
        [
            ("2M", 2),
            ("3M", 4),
            ("64M", 64),
            (5 << 20, 6),
            ("3G", 3072),
            ("5G", 5120),
            ("40G", 40960),
        ],
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

    @pytest.mark.usefixtures("no_leak")
    def test_more_than_the_cpu_can_address(self):
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

    def test_an_arena_has_room_for_forks_or_what_was_asked_for(self):
        with MicroVM("64M") as one:
            assert one.arena.capacity_bytes == 8 * ((64 << 20) + one.area.end - one.area.start)
        with MicroVM("64M", arena="20M") as one:
            assert one.arena.capacity_bytes == 20 << 20

    def test_an_arena_is_no_larger_than_the_host_permits(self, monkeypatch: pytest.MonkeyPatch):
        def permit(capacity_bytes: int, **options: Any) -> Arena:
            if capacity_bytes > 100 << 20:
                raise SyscallError(errno.ENOMEM, "as if by ulimit -v")
            return Arena(capacity_bytes, **options)

        monkeypatch.setattr(guest_memory, "Arena", permit)
        with load_code(Code().exit(0)) as one:
            assert one.arena.capacity_bytes == one.memory_bytes + one.area.end - one.area.start
            assert one.run(timeout=TIMEOUT).ok

    @pytest.mark.usefixtures("no_leak")
    def test_an_image_that_the_arena_cannot_hold(self):
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
            last = struct.unpack(
                "<QQII", one.area.read(info.regions + 24 * (info.n_regions - 1), 24)
            )
            assert last[:3] == (one.area.start, one.area.end, 3)


def test_page_tables_that_the_host_wrote_can_be_walked():
    """A CPU walks them without a fault that anybody could serve: they must have slots at entry."""
    tables, alias = 0x80_0000, 0x4020_0000
    # mov $tables, %eax; mov %rax, %cr3; mov (alias), %eax; out %eax, $PORT_EXIT
    code = bytes.fromhex("b8") + tables.to_bytes(4, "little") + bytes.fromhex("0f22d8 8b0425")
    code += alias.to_bytes(4, "little") + bytes.fromhex("e7b8")
    entries = {
        0x0000: tables + 0x1003,  # PML4[0]
        0x1000: tables + 0x2003,  # PDPT[0]: the code, one to one
        0x2008: 0x20_0083,
        0x1008: tables + 0x3003,  # PDPT[1]: the same page again, 1 GiB higher
        0x3008: 0x20_0083,
    }
    with MicroVM("64M") as vm:
        vm.load(code, base=0x20_0000)
        for at, entry in entries.items():
            vm.mm.copy_out(tables + at, entry.to_bytes(8, "little"))
        result = vm.run(timeout=TIMEOUT)
        assert (result.outcome, result.status) == ("exited", code[0]), describe(result)
