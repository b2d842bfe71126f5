"""PageTableAddressSpace on KVM: what a running guest in ring 3 sees of every change."""

from __future__ import annotations

import os
import random
import struct
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.platform.kvm import abi
from kvmmm.platform.kvm.device import open_device
from kvmmm.platform.kvm.shootdown_trial import proven_on
from tests.platform.kvm.user_rig import (
    DATA,
    HUGE,
    PAGE,
    RESULT,
    SECOND,
    Turner,
    UserRig,
    ar,
    read_loop,
    step_loop,
    write_loop,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmmm.safemem.ffi import MmioExit

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]


@pytest.fixture
def rig() -> Iterator[UserRig]:
    with UserRig() as rig:
        yield rig


class TestRunning:
    """Every change under a vCPU that does not leave the guest."""

    @pytest.mark.npt
    def test_a_frame_that_is_replaced_is_the_one_that_is_seen(
        self, rig: UserRig, scaled: Callable[[int], int]
    ):
        frames = [rig.frames(word) for word in range(4)]
        rig.space.map_file(DATA, rig.arena, frames[0], READ)
        with Turner(rig, read_loop()) as turner:
            for n in range(scaled(200)):
                word = n % 4
                rig.space.map_file(DATA, rig.arena, frames[word], READ)
                assert turner.sees() == word
        assert rig.space.statistics.n_dontneed >= scaled(200) - 1
        assert rig.faults == []

    def test_without_a_shootdown_it_is_not(self):
        """The test above tests something. With nested paging the CPU's own cache may be lucky."""
        if proven_on(open_device()).is_nested:
            pytest.skip("nested paging: a CPU may forget by itself")
        with UserRig(has_shootdown=False) as rig:
            frames = [rig.frames(word) for word in range(4)]
            rig.space.map_file(DATA, rig.arena, frames[0], READ)
            with Turner(rig, read_loop()) as turner:
                assert turner.sees() == 0
                stale = 0
                for n in range(1, 9):
                    rig.space.map_file(DATA, rig.arena, frames[n % 4], READ)
                    stale += turner.sees() != n % 4
            assert stale

    @pytest.mark.npt
    def test_what_is_unmapped_faults(self, rig: UserRig):
        rig.space.map_file(DATA, rig.arena, rig.frames(7), READ)
        with Turner(rig, read_loop()) as turner:
            assert turner.sees() == 7
            rig.space.unmap([ar(DATA)])
            turns = turner._words()[1]
            assert turner.faults() == (DATA, READ)
            assert turner._words()[1] <= turns + 1

    @pytest.mark.npt
    def test_what_may_not_be_written_any_more_faults_at_once(self, rig: UserRig):
        fr = rig.frames(0)
        rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
        with Turner(rig, write_loop()) as turner:
            turner.sees()
            rig.space.map_file(DATA, rig.arena, fr, READ)
            written = rig.word_at(fr)
            assert turner.faults() == (DATA, WRITE)
            assert rig.word_at(fr) == written

    def test_what_may_be_written_again_needs_no_shootdown(self, rig: UserRig):
        fr = rig.frames(0)
        rig.space.map_file(DATA, rig.arena, fr, READ)
        vcpu = rig.load(write_loop(), rsi=DATA, rdi=RESULT)
        vcpu.on_fault = lambda addr, _access: rig.space.map_file(addr, rig.arena, fr, READ_WRITE)
        vcpu.run(SECOND // 10)
        assert rig.word_at(fr) > 0
        assert rig.space.statistics.n_dontneed + rig.space.statistics.n_zaps == 0

    def test_copy_on_write_by_the_fault_itself(self, rig: UserRig):
        old, new = rig.frames(5), rig.frames(5)
        rig.space.map_file(DATA, rig.arena, old, READ)
        vcpu = rig.load(write_loop(), rsi=DATA, rdi=RESULT)
        seen = []

        def on_fault(addr: int, access: int) -> None:
            seen.append((addr, access))
            rig.space.map_file(DATA, rig.arena, new, READ_WRITE)

        vcpu.on_fault = on_fault
        vcpu.run(SECOND // 10)
        assert seen == [(DATA, WRITE)]
        assert rig.word_at(old) == 5
        assert rig.word_at(new) > 5

    @pytest.mark.npt
    @pytest.mark.parametrize("leaf_bytes", [PAGE, HUGE])
    def test_a_part_of_a_large_range_is_replaced(self, leaf_bytes: int):
        """With large leaves, a superpage is split under the guest."""
        with UserRig(max_leaf_bytes=leaf_bytes) as rig:
            whole = rig.frames(1, n_pages=512, align_bytes=HUGE)
            rig.space.map_file(DATA, rig.arena, whole, READ)
            page = rig.frames(2)
            at = DATA + 37 * PAGE
            with Turner(rig, read_loop(), at) as turner:
                assert turner.sees() == 1
                rig.space.map_file(at, rig.arena, page, READ)
                assert turner.sees() == 2
                rig.space.map_file(DATA, rig.arena, whole, READ)
                assert turner.sees() == 1
                rig.space.unmap([ar(DATA, HUGE)])
                assert turner.faults() == (at, READ)

    @pytest.mark.parametrize("leaf_bytes", [PAGE, HUGE])
    def test_large_leaves_change_places(self, leaf_bytes: int, scaled: Callable[[int], int]):
        with UserRig(max_leaf_bytes=leaf_bytes) as rig:
            frames = [rig.frames(word, n_pages=512, align_bytes=HUGE) for word in (1, 2)]
            rig.space.map_file(DATA, rig.arena, frames[0], READ)
            with Turner(rig, read_loop(), DATA + 100 * PAGE) as turner:
                for n in range(scaled(20)):
                    rig.space.map_file(DATA, rig.arena, frames[n & 1], READ)
                    assert turner.sees() == 1 + (n & 1)

    def test_many_pages_are_dropped_by_one_zap(self, rig: UserRig):
        fr = rig.frames(3, n_pages=2048)
        rig.space.map_file(DATA, rig.arena, fr, READ)
        with Turner(rig, read_loop(), DATA + 2047 * PAGE) as turner:
            assert turner.sees() == 3
            rig.space.unmap([ar(DATA + n * 16 * PAGE, 16 * PAGE) for n in range(128)])
            assert turner.faults()[0] == DATA + 2047 * PAGE
        assert (rig.space.statistics.n_zaps, rig.space.statistics.n_dontneed) == (1, 0)

    def test_many_ranges_are_one_shootdown(self, rig: UserRig):
        rig.space.map_file(DATA, rig.arena, rig.frames(3, n_pages=64), READ)
        with Turner(rig, read_loop(), DATA + 63 * PAGE) as turner:
            turner.sees()
            rig.space.unmap([ar(DATA + n * PAGE) for n in range(0, 64, 3)])
            assert turner.faults() == (DATA + 63 * PAGE, READ)
        statistics = rig.space.statistics
        assert (statistics.n_zaps, statistics.n_dontneed, statistics.n_pages) == (0, 1, 22)


class TestSpaces:
    @pytest.mark.npt
    def test_a_running_vcpu_changes_spaces(self, rig: UserRig, scaled: Callable[[int], int]):
        other = rig.new_space()
        rig.space.map_file(DATA, rig.arena, rig.frames(1), READ)
        other.map_file(DATA, rig.arena, rig.frames(2), READ)
        with Turner(rig, read_loop()) as turner:
            for _ in range(scaled(50)):
                assert turner.sees() == 1
                other.activate(turner.vcpu)
                assert turner.sees() == 2
                rig.space.activate(turner.vcpu)

    def test_what_changes_while_nobody_is_in_it(self, rig: UserRig):
        other = rig.new_space()
        rig.space.map_file(DATA, rig.arena, rig.frames(1), READ)
        with Turner(rig, read_loop()) as turner:
            for n in range(2, 9):
                turner.sees()
                other.map_file(DATA, rig.arena, rig.frames(n + 10), READ)
                other.activate(turner.vcpu)
                assert turner.sees() == n + 10
                rig.space.map_file(DATA, rig.arena, rig.frames(n), READ)
                rig.space.activate(turner.vcpu)
                assert turner.sees() == n
        assert rig.physical.loaded == {turner.vcpu: rig.space}

    def test_one_that_nobody_was_ever_in_needs_no_shootdown(self, rig: UserRig):
        other = rig.new_space()
        for n in range(10):
            other.map_file(DATA, rig.arena, rig.frames(n, n_pages=4), READ)
        other.unmap([ar(DATA, 4 * PAGE)])
        assert not other.is_mapped(DATA, READ)
        statistics = other.statistics
        assert (statistics.n_dontneed, statistics.n_zaps, statistics.n_pages) == (0, 0, 0)

    def test_tables_of_spaces_that_are_gone_are_used_again(self, scaled: Callable[[int], int]):
        """Through quarantine and zaps: no old translation shows in a later space."""
        with UserRig(arena_bytes=8 << 20) as rig:
            vcpu = rig.load(step_loop(), rsi=DATA)
            vcpu.once(10 * SECOND)
            fr = rig.frames(0, 1, 2, 3, 4, 5, 6, 7, n_pages=8)
            n_rounds = scaled(200)
            for n in range(n_rounds):
                space = rig.new_space()
                for i in range(8):
                    start = fr.start + ((i + n) % 8) * PAGE
                    at = DATA + (i << 30)
                    space.map_file(at, rig.arena, FileRange(start, start + PAGE), READ)
                space.activate(vcpu)
                for i in range(8):
                    vcpu.regs.rsi = DATA + (i << 30)
                    vcpu.once(10 * SECOND)
                    assert vcpu.regs.rbx == (i + n) % 8
                rig.space.activate(vcpu)
                space.release()
            assert rig.physical.n_zaps or n_rounds < 100


class TestFiles:
    def test_two_files_and_the_arena(self, rig: UserRig, tmp_path: Path):
        files = []
        for name in ("a", "b"):
            path = tmp_path / name
            path.write_bytes(struct.pack("<Q", ord(name)).ljust(3 * PAGE, b"\0"))
            files.append(HostFile.open(path, writable=name == "a"))
        with files[0], files[1]:
            for n, file in enumerate(files):
                rig.space.map_file(DATA + n * PAGE, file, FileRange(0, PAGE), READ)
            rig.space.map_file(DATA + 2 * PAGE, rig.arena, rig.frames(99), READ)
            vcpu = rig.load(step_loop(), rsi=DATA)
            vcpu.once(10 * SECOND)
            for n, word in enumerate((ord("a"), ord("b"), 99)):
                vcpu.regs.rsi = DATA + n * PAGE
                vcpu.once(10 * SECOND)
                assert vcpu.regs.rbx == word
            # What is written to the file by others shows, as in any shared mapping.
            os.pwrite(files[0].fd, b"\x21", 0)
            vcpu.regs.rsi = DATA
            vcpu.once(10 * SECOND)
            assert vcpu.regs.rbx == 0x21
            rig.space.unmap([ar(DATA, 2 * PAGE)])
            for file in files:
                rig.physical.forget(file)
            assert len(rig.vm.memslots) == 1


class TestLazySlots:
    @pytest.mark.npt
    def test_a_missing_slot_comes_with_the_violation(self):
        with UserRig(lazy_slots=True) as rig:
            fr = rig.frames(*range(100, 132), n_pages=32)
            rig.frames(0, n_pages=4096)
            far = rig.frames(77, align_bytes=HUGE)
            far_gpa = rig.physical.gpa_of(rig.arena, far.start)
            assert rig.vm.memslots.find(far_gpa) is None
            rig.frames(0, n_pages=512)
            rig.code = rig.frames(align_bytes=HUGE)
            rig.space.map_file(0x40_0000, rig.arena, rig.code, READ | EXECUTE)
            rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
            rig.space.map_file(DATA + HUGE, rig.arena, far, READ_WRITE)
            vcpu = rig.load(step_loop(), rsi=DATA)
            exits = []

            def on_cold(reason: int) -> None:
                # The first fetch: KVM cannot emulate it, and restarts it.
                assert reason == abi.KVM_EXIT_INTERNAL_ERROR
                gpa = rig.space.gpa_at(vcpu.regs.rip)
                assert gpa is not None
                rig.physical.serve_violation(gpa, READ | EXECUTE)

            def on_mmio(exit_: MmioExit) -> None:
                exits.append(exit_.gpa)
                rig.physical.serve_violation(exit_.gpa, WRITE if exit_.is_write else READ)
                rig.physical.complete(exit_)

            vcpu.on_mmio, vcpu.on_cold = on_mmio, on_cold
            vcpu.set_port(0xB0, 1, lambda _exit: "step")
            assert vcpu.run(10 * SECOND) == "step"
            for addr, word in ((DATA, 100), (DATA + 5 * PAGE, 105), (DATA + HUGE, 77)):
                vcpu.regs.rsi = addr
                assert vcpu.run(10 * SECOND) == "step"
                assert vcpu.regs.rbx == word
            assert far_gpa in exits
            assert rig.physical.n_violations == len(exits) + 1
            n_exits = len(exits)
            vcpu.regs.rsi = DATA + HUGE
            assert vcpu.run(10 * SECOND) == "step"
            assert len(exits) == n_exits


def test_kvm_translates_as_the_space_says(rig: UserRig, scaled: Callable[[int], int]):
    """The third oracle: what KVM's own walk of the tables gives, after random changes."""
    rng = random.Random(11)
    fr = rig.frames(n_pages=2048, align_bytes=HUGE)
    vcpu = rig.load(step_loop(), rsi=RESULT)
    base = rig.physical.gpa_of(rig.arena, 0)
    model: dict[int, int] = {}
    for _ in range(scaled(150)):
        first = rng.choice([0, 0, 512, rng.randrange(1024)])
        n_pages = rng.choice([1, 2, 17, 512, 600])
        if rng.random() < 0.7:
            start = fr.start + rng.choice([0, 512, rng.randrange(1400)]) * PAGE
            frames = FileRange(start, start + n_pages * PAGE)
            rig.space.map_file(DATA + first * PAGE, rig.arena, frames, rng.choice([1, 3]))
            model.update({first + i: start + i * PAGE for i in range(n_pages)})
        else:
            rig.space.unmap([ar(DATA + first * PAGE, n_pages * PAGE)])
            for i in range(n_pages):
                model.pop(first + i, None)
        vcpu.once(10 * SECOND)  # a new root is loaded on the way into the guest
        for page in rng.sample(range(1700), 10):
            found = vcpu.translate(DATA + page * PAGE + 5)
            want = base + model[page] + 5 if page in model else None
            assert found == want == rig.space.gpa_at(DATA + page * PAGE + 5)
            assert rig.space.is_mapped(DATA + page * PAGE, READ) == (page in model)
