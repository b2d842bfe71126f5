"""Files behind a guest kernel's memory, and memory that is copied when it is written."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import READ, READ_EXECUTE, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.platform.kvm.abi import KVM_MEM_READONLY
from kvmmm.vmm.result import PAUSED
from tests.vmm.guest_run import describe
from tests.vmm.probe_guest import RET, RING_3_ONLY, WRITES, Probe, apply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import File
    from kvmmm.vmm.microvm import MicroVM

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

AT = 0x80_0000
N_PAGES = 6
SIZE_BYTES = N_PAGES * PAGE_BYTES - 1000
"""Of the file: it ends inside its last page."""


def contents() -> bytes:
    return random.Random(1).randbytes(SIZE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(contents())
    return made


@pytest.fixture(params=[0, 3], ids=["ring 0", "ring 3"])
def ring(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def probe(ring: int) -> Iterator[Probe]:
    with Probe(ring, memory="32M") as made:
        yield made


@pytest.fixture
def file(path: Path, probe: Probe) -> Iterator[HostFile]:
    """A file of the host's; the VM, which maps it, is closed first."""
    with HostFile.open(path, writable=True) as opened:
        yield opened
        probe.vm.close()


def map_file(probe: Probe, file: HostFile, *, private: bool, perms: int = READ_WRITE) -> None:
    probe.vm.mm.mmap(
        HUGE_PAGE_BYTES, perms, addr=AT, fixed=True, replace=True, private=private, mappable=file,
        name="[file]",
    )  # fmt: skip


def word(data: bytes | bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def random_write(rng: random.Random, ring: int) -> tuple[str, int, int]:
    """One of WRITES, often across a page's end."""
    op = rng.choice([op for op in WRITES if ring or op not in RING_3_ONLY])
    at = rng.randrange(SIZE_BYTES - 400)
    if rng.random() < 0.5:
        at = PAGE_BYTES * rng.randrange(1, N_PAGES - 1) - rng.randrange(1, 40)
    return op, at, rng.getrandbits(64)


@pytest.mark.npt
class TestPrivateFile:
    def test_a_guest_reads_it_and_keeps_its_writes_to_itself(self, probe: Probe, file: HostFile):
        map_file(probe, file, private=True)
        model = bytearray(contents())
        assert probe.load(AT + 16) == word(model, 16)
        assert probe.load(AT + PAGE_BYTES - 3) == word(model, PAGE_BYTES - 3)
        slot = probe.vm.vm.memslots.find(AT)
        assert slot is not None
        assert slot.flags == KVM_MEM_READONLY
        probe.store(AT + 16, 0x1122_3344_5566_7788)
        apply(model, "store", 16, 0x1122_3344_5566_7788)
        assert probe.load(AT + 16) == word(model, 16)
        assert probe.vm.mm.read(AT, SIZE_BYTES) == model
        assert os.pread(file.fd, SIZE_BYTES, 0) == contents()

    def test_a_page_is_replaced_within_one_pause(self, probe: Probe, file: HostFile):
        map_file(probe, file, private=True)
        probe.load(AT)
        space = probe.vm.address_space
        before, n_mmio = space.n_pauses, probe.vm.statistics().mmio_faults
        probe.store(AT + 8, 1)
        assert space.n_pauses == before + 1
        assert probe.vm.statistics().mmio_faults == n_mmio + 1
        probe.store(AT + 2 * PAGE_BYTES, 1)  # the same window
        assert space.n_pauses == before + 1
        assert probe.vm.statistics().adds_up

    def test_behind_its_end(self, probe: Probe, file: HostFile):
        """Zeros up to the page's end, a bus error after."""
        map_file(probe, file, private=True)
        end = N_PAGES * PAGE_BYTES
        assert probe.load(AT + SIZE_BYTES + 8) == 0
        for op in ("load", "store", "xadd"):
            result = probe.ends_with(op, AT + end + 8)
            assert (result.outcome, result.addr) == ("fault", AT + end + 8), describe(result)
            assert "the file that is mapped there ends before" in result.report
        for op in ("load", "store"):
            result = probe.ends_with(op, AT + end - 4)
            assert (result.outcome, result.addr) == ("fault", AT + end), describe(result)
        assert probe.vm.statistics().adds_up

    def test_code_in_it(self, probe: Probe, file: HostFile):
        os.pwrite(file.fd, bytes([RET]), PAGE_BYTES)
        map_file(probe, file, private=True, perms=READ_EXECUTE)
        assert probe.do("call", AT + PAGE_BYTES).outcome == PAUSED
        map_file(probe, file, private=True)
        assert probe.ends_with("call", AT + PAGE_BYTES).outcome == "fault"


@pytest.mark.npt
class TestSharedFile:
    def test_a_guests_writes_reach_the_file(
        self, probe: Probe, file: HostFile, scaled: Callable[[int], int]
    ):
        map_file(probe, file, private=False)
        rng = random.Random(probe.ring)
        model = bytearray(contents())
        for _ in range(scaled(60)):
            op, at, value = random_write(rng, probe.ring)
            result = probe.do(op, AT + at, value)
            assert result.outcome == PAUSED, describe(result)
            apply(model, op, at, value)
        assert os.pread(file.fd, SIZE_BYTES, 0) == model
        assert probe.vm.mm.read(AT, SIZE_BYTES) == model

    def test_what_others_write_the_guest_sees(self, probe: Probe, file: HostFile):
        map_file(probe, file, private=False)
        probe.load(AT)
        os.pwrite(file.fd, (77).to_bytes(8, "little"), 0)
        assert probe.load(AT) == 77

    def test_a_fork_shares_it(self, probe: Probe, file: HostFile):
        map_file(probe, file, private=False)
        probe.store(AT, 1)
        with probe.fork() as child:
            assert child.load(AT) == 1
            child.store(AT, 2)
            probe.store(AT + 8, 3)
            assert (probe.load(AT), child.load(AT + 8)) == (2, 3)
        assert os.pread(file.fd, 1, 0) == b"\x02"

    @pytest.mark.parametrize("private", [False, True])
    def test_one_that_somebody_cuts_short(self, probe: Probe, file: HostFile, private: bool):
        map_file(probe, file, private=private)
        assert probe.load(AT + PAGE_BYTES) == word(contents(), PAGE_BYTES)
        assert probe.load(AT) == word(contents(), 0)
        os.ftruncate(file.fd, PAGE_BYTES)
        assert probe.load(AT) == word(contents(), 0)
        result = probe.do("load", AT + PAGE_BYTES)
        assert (result.outcome, result.addr) == ("fault", AT + PAGE_BYTES), describe(result)
        assert "the file that is mapped there ends before" in result.report

    def test_one_that_we_cut_short_and_make_longer(self, probe: Probe, file: HostFile):
        map_file(probe, file, private=False)
        probe.store(AT + PAGE_BYTES, 1)
        file.truncate(PAGE_BYTES)
        assert probe.ends_with("load", AT + PAGE_BYTES).outcome == "fault"
        file.truncate(3 * PAGE_BYTES)
        assert probe.load(AT + PAGE_BYTES) == 0
        assert probe.load(AT) == word(contents(), 0)


class TestCopyOnWrite:
    """What a fork shares: each write is made once, by its own side, to the byte."""

    def test_pure_data(self, probe: Probe, scaled: Callable[[int], int]):
        probe.vm.mm.mmap(HUGE_PAGE_BYTES, addr=AT, fixed=True, replace=True, pure_data=True)
        self.check(probe, scaled(40))

    def test_a_private_file(self, probe: Probe, file: HostFile, scaled: Callable[[int], int]):
        map_file(probe, file, private=True)
        self.check(probe, scaled(40))
        assert os.pread(file.fd, SIZE_BYTES, 0) == contents()

    def check(self, probe: Probe, n_writes: int) -> None:
        rng = random.Random(probe.ring)
        model = bytearray(contents())
        probe.vm.mm.copy_out(AT, model)
        n_writes = max(n_writes, 4)
        with probe.fork() as child, child.fork() as grandchild:
            sides = [(side, bytearray(model)) for side in (probe, child, grandchild)]
            for side, own in sides:
                assert side.load(AT + 100) == word(own, 100)
            for n in range(n_writes):
                side, own = sides[n % 3]
                op, at, value = random_write(rng, probe.ring)
                if n % 4 == 3:
                    # Shared anew, by a child that is gone at once.
                    side.fork().vm.close()
                n_mmio = side.vm.statistics().mmio_faults
                result = side.do(op, AT + at, value)
                assert result.outcome == PAUSED, describe(result)
                assert side.vm.statistics().mmio_faults <= n_mmio + 5
                apply(own, op, at, value)
                for any_side, expected in sides:
                    assert any_side.vm.mm.read(AT, SIZE_BYTES) == expected, (n, op, hex(at))
            for side, own in sides:
                assert side.load(AT + 100) == word(own, 100)
                assert side.vm.statistics().adds_up
                side.vm.mm.check_invariants()

    def test_slots(self, probe: Probe):
        probe.vm.mm.mmap(HUGE_PAGE_BYTES, addr=AT, fixed=True, replace=True, pure_data=True)
        probe.store(AT, 1)
        with probe.fork() as child:
            for side in (probe, child):
                assert side.load(AT) == 1
                assert flags_at(side.vm, AT) == KVM_MEM_READONLY
            n_pauses = child.vm.address_space.n_pauses
            child.store(AT, 2)
            assert child.vm.address_space.n_pauses == n_pauses + 1
            assert flags_at(child.vm, AT) == 0
            assert flags_at(probe.vm, AT) == KVM_MEM_READONLY
            probe.store(AT, 3)
            # The last one that holds a frame keeps it.
            assert probe.vm.mm.counters.cow_breaks == 0
            assert child.vm.mm.counters.cow_breaks == 1
            assert (probe.load(AT), child.load(AT)) == (3, 2)

    def test_a_refused_write_breaks_nothing(self, probe: Probe):
        probe.vm.mm.mmap(HUGE_PAGE_BYTES, addr=AT, fixed=True, replace=True, pure_data=True)
        probe.store(AT, 1)
        with probe.fork() as child:
            child.vm.mm.mprotect(AT, PAGE_BYTES, READ)
            assert child.load(AT) == 1
            assert child.ends_with("store", AT, 2).outcome == "fault"
            assert child.vm.mm.counters.cow_breaks == 0
            assert probe.load(AT) == 1

    def test_a_slot_that_is_gone_before_the_access_is_made(
        self, probe: Probe, monkeypatch: pytest.MonkeyPatch
    ):
        """As when another thread takes a page back just then: the access is made all the same."""
        probe.vm.mm.copy_out(AT, contents())
        space = probe.vm.address_space
        space.unmap([AddrRange(AT, AT + HUGE_PAGE_BYTES)])
        map_file = space.map_file

        def map_and_forget(addr: int, file: File, fr: FileRange, perms: int) -> None:
            map_file(addr, file, fr, perms)
            space.unmap([AddrRange(addr, addr + fr.length_bytes)])

        monkeypatch.setattr(space, "map_file", map_and_forget)
        data = bytearray(contents())
        assert probe.vm.statistics().adds_up
        for op in ("store", "xadd", "store16"):
            assert probe.do(op, AT + PAGE_BYTES - 2, 0x1234_5678).outcome == PAUSED
            apply(data, op, PAGE_BYTES - 2, 0x1234_5678)
        assert probe.load(AT + PAGE_BYTES - 2) == word(data, PAGE_BYTES - 2)
        assert probe.vm.mm.read(AT, SIZE_BYTES) == data
        assert probe.vm.statistics().adds_up


def flags_at(vm: MicroVM, addr: int) -> int:
    slot = vm.vm.memslots.find(addr)
    assert slot is not None
    return slot.flags
