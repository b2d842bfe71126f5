"""`PageTableAddressSpace.walk` on KVM: it finds what CPUs would; a change leaves nobody inside."""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.hostarch.access import EXECUTE, READ, READ_WRITE, WRITE
from kvmmm.hostarch.ranges import FileRange
from kvmmm.memmap.host_file import HostFile
from kvmmm.platform.kvm.kernel_half import KERNEL_START
from tests.platform.kvm.user_rig import (
    CODE,
    DATA,
    HUGE,
    PAGE,
    RESULT,
    SECOND,
    UserRig,
    ar,
    step_loop,
    write_loop,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmmm.platform.kvm.page_table_space import PageTableAddressSpace

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]


@pytest.fixture
def rig() -> Iterator[UserRig]:
    with UserRig() as rig:
        yield rig


def offset_of(
    rig: UserRig, space: PageTableAddressSpace, addr: int, access: int = READ, n_bytes: int = 1
) -> tuple[int, int] | None:
    """What the walk finds, as an offset in the arena."""
    found = space.walk.find(addr, n_bytes, access)
    return found and (found[0] - rig.arena.hva, found[1])


class TestFinds:
    @pytest.mark.npt
    def test_what_the_guest_wrote_and_reads(self, rig: UserRig):
        fr = rig.frames(7)
        rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
        vcpu = rig.load(step_loop(), rsi=DATA + 8)
        offset, n = offset_of(rig, rig.space, DATA + 8, WRITE, PAGE) or (0, 0)
        assert (offset, n) == (fr.start + 8, PAGE - 8)
        struct.pack_into("<Q", rig.arena.view, offset, 0x1234_5678_9ABC)
        vcpu.once(10 * SECOND)
        vcpu.once(10 * SECOND)
        assert vcpu.regs.rbx == 0x1234_5678_9ABC

    def test_permissions(self, rig: UserRig):
        fr = rig.frames(0)
        can = {}
        for perms in range(8):
            rig.space.map_file(DATA, rig.arena, fr, perms)
            accesses = (READ, WRITE, EXECUTE)
            can[perms] = [a for a in accesses if offset_of(rig, rig.space, DATA, a)]
        assert can == {
            0: [], 1: [READ], 2: [READ, WRITE], 3: [READ, WRITE], 4: [READ, EXECUTE],
            5: [READ, EXECUTE], 6: [READ, WRITE, EXECUTE], 7: [READ, WRITE, EXECUTE],
        }  # fmt: skip

    def test_the_kernels_half_is_not_there(self, rig: UserRig):
        vcpu = rig.load(step_loop(), rsi=RESULT)
        vcpu.once(10 * SECOND)
        assert vcpu.translate(KERNEL_START) is not None
        assert rig.space.walk.find(KERNEL_START, 1, READ) is None

    def test_files_are_not_there(self, rig: UserRig, tmp_path: Path):
        path = tmp_path / "file"
        path.write_bytes(bytes(PAGE))
        fr = rig.frames(1, n_pages=2)
        with HostFile.open(path) as file:
            rig.space.map_file(DATA, rig.arena, FileRange(fr.start, fr.start + PAGE), READ)
            rig.space.map_file(DATA + PAGE, file, FileRange(0, PAGE), READ)
            assert offset_of(rig, rig.space, DATA, READ, 2 * PAGE) == (fr.start, PAGE)
            assert offset_of(rig, rig.space, DATA + PAGE) is None
            rig.space.unmap([ar(DATA, 2 * PAGE)])
            rig.physical.forget(file)

    def test_nothing_after_release(self, rig: UserRig):
        space = rig.new_space()
        assert offset_of(rig, space, CODE)
        space.release()
        assert offset_of(rig, space, CODE) is None


@pytest.mark.npt
@pytest.mark.parametrize("leaf_bytes", [PAGE, HUGE])
def test_it_finds_what_kvm_and_the_space_say(leaf_bytes: int, scaled: Callable[[int], int]):
    """Random changes and forks; KVM's own walk knows the gpa, the space knows the rights."""
    with UserRig(max_leaf_bytes=leaf_bytes) as rig:
        rng = random.Random(12)
        fr = rig.frames(n_pages=2048, align_bytes=HUGE)
        vcpu = rig.load(step_loop(), rsi=RESULT)
        base = rig.physical.gpa_of(rig.arena, 0)
        child = rig.new_space(max_leaf_bytes=leaf_bytes)
        for n in range(scaled(150)):
            space = rng.choice([rig.space, child])
            first = rng.choice([0, 0, 512, rng.randrange(1024)])
            n_pages = rng.choice([1, 2, 17, 512, 600])
            addr = DATA + first * PAGE
            if n % 25 == 24:
                child.unmap([ar(0, 1 << 47)])
                assert rig.space.fork_into(child)
            elif rng.random() < 0.7:
                start = fr.start + rng.choice([0, 512, rng.randrange(1400)]) * PAGE
                frames = FileRange(start, start + n_pages * PAGE)
                space.map_file(addr, rig.arena, frames, rng.choice([READ, READ_WRITE, EXECUTE]))
            else:
                space.unmap([ar(addr, n_pages * PAGE)])
            rig.space.activate(vcpu)
            vcpu.once(10 * SECOND)  # a new root is loaded on the way into the guest
            for page in rng.sample(range(1700), 20):
                addr = DATA + page * PAGE + 5
                gpa = vcpu.translate(addr)
                found = offset_of(rig, rig.space, addr)
                assert found == (None if gpa is None else (gpa - base, 1))
                for access in (WRITE, EXECUTE):
                    may = rig.space.is_mapped(addr, access)
                    assert offset_of(rig, rig.space, addr, access) == (found if may else None)
                    may = child.is_mapped(addr, access)
                    assert bool(offset_of(rig, child, addr, access)) == may


class Inside:
    """A walk that takes a while, on another thread, as a copy without the GIL would."""

    PAGES = 1 << 20
    """4 GiB: a walk of about a millisecond."""

    def __init__(self) -> None:
        self.rig = UserRig(arena_bytes=5 << 30, max_leaf_bytes=PAGE)
        self.space = self.rig.space
        self.fr = self.rig.frames(n_pages=self.PAGES, align_bytes=HUGE)
        self.space.map_file(DATA, self.rig.arena, self.fr, READ)
        self.pages = [self.rig.frames(n) for n in range(4)]
        self.at = DATA - HUGE
        self.answers: list[object] = []

    def _walk(self) -> None:
        self.answers.append(self.space.walk.find(DATA, self.PAGES * PAGE, READ))

    def during(self, change: Callable[[], object]) -> bool:
        """Make a change while a walk is on; nobody is inside when it returns. Whether one was."""
        thread = threading.Thread(target=self._walk)
        n_answers = len(self.answers)
        thread.start()
        try:
            while not self.space.walk.n_inside and len(self.answers) == n_answers:
                time.sleep(0)
            was_inside = bool(self.space.walk.n_inside)
            change()
            assert not self.space.walk.n_inside
        finally:
            thread.join()
        return was_inside

    def until_inside(self, prepare: Callable[[], object], change: Callable[[], object]) -> None:
        """Try until a walk was on when the change began."""
        for _ in range(500):
            prepare()
            if self.during(change):
                return
        pytest.fail("no walk was ever on")


@pytest.fixture
def inside() -> Iterator[Inside]:
    inside = Inside()
    yield inside
    inside.rig.close()


class TestNobodyIsInside:
    """What a walk has found is not used any more when the change is done."""

    @pytest.mark.parametrize("loaded", [False, True])
    def test_after_unmap(self, inside: Inside, loaded: bool):
        rig = inside.rig
        if loaded:
            rig.load(step_loop())
        inside.until_inside(
            lambda: inside.space.map_file(inside.at, rig.arena, inside.pages[0], READ),
            lambda: inside.space.unmap([ar(inside.at)]),
        )

    @pytest.mark.parametrize("loaded", [False, True])
    @pytest.mark.parametrize("perms", [READ, READ_WRITE])
    @pytest.mark.parametrize("quickly", [False, True])
    def test_after_a_frame_was_replaced(
        self, inside: Inside, loaded: bool, perms: int, quickly: bool
    ):
        rig, space = inside.rig, inside.space
        if loaded:
            rig.load(step_loop())
        old, new = inside.pages[:2]

        def change() -> None:
            if quickly:
                assert space.map_quickly(inside.at, PAGE, rig.arena, new.start, READ_WRITE)
            else:
                space.map_file(inside.at, rig.arena, new, READ_WRITE)

        inside.until_inside(
            lambda: space.map_file(inside.at, rig.arena, old, perms),
            change,
        )
        assert offset_of(rig, space, inside.at, WRITE) == (new.start, 1)

    @pytest.mark.parametrize("quickly", [False, True])
    def test_after_a_right_was_taken(self, inside: Inside, quickly: bool):
        rig, space, fr = inside.rig, inside.space, inside.pages[0]

        def change() -> None:
            if quickly:
                assert space.map_quickly(inside.at, PAGE, rig.arena, fr.start, READ)
            else:
                space.map_file(inside.at, rig.arena, fr, READ)

        inside.until_inside(
            lambda: space.map_file(inside.at, rig.arena, fr, READ_WRITE),
            change,
        )

    def test_after_a_fork(self, inside: Inside):
        children: list[PageTableAddressSpace] = []

        def prepare() -> None:
            child = inside.rig.new_space()
            child.unmap([ar(0, 1 << 46)])
            children.append(child)

        inside.until_inside(prepare, lambda: inside.space.fork_into(children[-1]))
        assert not inside.space.is_mapped(DATA, WRITE)

    def test_after_release(self, inside: Inside):
        def prepare() -> None:
            inside.space.release()
            inside.space = inside.rig.new_space(max_leaf_bytes=PAGE)
            inside.space.map_file(DATA, inside.rig.arena, inside.fr, READ)

        inside.until_inside(prepare, lambda: inside.space.release())  # noqa: PLW0108 - late
        assert inside.space.walk.find(DATA, 1, READ) is None

    def test_what_is_only_added_waits_for_nobody(self, inside: Inside):
        """A walk may go on: nothing that it has found is gone."""
        rig, space = inside.rig, inside.space
        n_inside_after = 0
        for n in range(500):
            thread = threading.Thread(target=inside._walk)
            thread.start()
            space.map_file(inside.at - n * PAGE, rig.arena, inside.pages[0], READ)
            n_inside_after += space.walk.n_inside
            thread.join()
            if n_inside_after:
                return
        pytest.fail("each map waited for the walk")


class Storm:
    """Maps, unmaps, forks, and the faults of a guest that writes; some pages stay throughout.

    They lie in three tables, the outer ones together with pages that change.
    """

    N_PAGES = 700
    AT = DATA + HUGE - 50 * PAGE
    LAST = AT + (N_PAGES - 1) * PAGE

    def __init__(self, rig: UserRig) -> None:
        self.rig = rig
        self.random = random.Random(4)
        self.lock = threading.Lock()  # the mm's, here
        self.stay = rig.frames(*range(1000, 1000 + self.N_PAGES), n_pages=self.N_PAGES)
        self.others = rig.frames(n_pages=64)
        rig.space.map_file(self.AT, rig.arena, self.stay, READ_WRITE)
        self.vcpu = rig.load(write_loop(), rsi=self.LAST, rdi=RESULT)
        self.vcpu.on_fault = self._on_fault
        self.done = threading.Event()
        self.wrong: list[object] = []
        self.n_faults = 0
        self.n_found = [0, 0]

    def _on_fault(self, addr: int, _access: int) -> None:
        # A fork took W; the frame may stay.
        last = FileRange(self.stay.end - PAGE, self.stay.end)
        frames = last if addr == self.LAST else self.rig.result
        with self.lock:
            self.n_faults += 1
            self.rig.space.map_file(addr & -PAGE, self.rig.arena, frames, READ_WRITE)

    def look(self, which: int) -> None:
        """Walk over what stays, until it is done."""
        rng = random.Random(which)
        while not self.done.is_set() and not self.wrong:
            skip = rng.randrange(self.N_PAGES) * PAGE
            left = self.N_PAGES * PAGE - skip
            found = offset_of(self.rig, self.rig.space, self.AT + skip, READ, left)
            if found != (self.stay.start + skip, left):
                self.wrong.append((skip, found))
            self.n_found[which] += 1

    def run_guest(self) -> None:
        """Count up a word of the last page that stays."""
        self.vcpu.run(60 * SECOND)

    def change(self) -> None:
        """Do something to pages beside those that stay, or fork."""
        rng, space = self.random, self.rig.space
        addr = rng.choice([self.AT - 64 * PAGE, self.LAST + PAGE]) + rng.randrange(32) * PAGE
        kind = rng.random()
        if kind < 0.5:
            start = self.others.start + rng.randrange(32) * PAGE
            frames = FileRange(start, start + 32 * PAGE)
            space.map_file(addr, self.rig.arena, frames, rng.choice([READ, READ_WRITE]))
        elif kind < 0.9:
            space.unmap([ar(addr, 32 * PAGE)])
        else:
            child = self.rig.new_space()
            child.unmap([ar(0, 1 << 46)])
            assert space.fork_into(child)
            child.release()
            self.rig.spaces.remove(child)


def test_walks_while_a_guest_writes_and_pages_change(rig: UserRig, scaled: Callable[[int], int]):
    storm = Storm(rig)
    threads = [
        threading.Thread(target=storm.run_guest),
        *(threading.Thread(target=storm.look, args=(which,)) for which in (0, 1)),
    ]
    for thread in threads:
        thread.start()
    n = 0
    try:
        while n < scaled(400) or (min(storm.n_found) < 50 and not storm.wrong):
            with storm.lock:
                storm.change()
            n += 1
    finally:
        storm.done.set()
        storm.vcpu.stop()
        for thread in threads:
            thread.join(20)
    assert not storm.wrong
    assert storm.n_faults > 1
    assert rig.space.statistics.n_roots > 2
