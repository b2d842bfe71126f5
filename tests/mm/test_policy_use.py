"""What the numbers of the copies' policy do."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from kvmmm.mm import IOOpts, MemoryManager, Policy
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmmm.platform.mirror import Mirror

START = 8 * HUGE


def other_threads_run_during(copy: Any, n_copies: int) -> bool:
    """Whether a copy, made up to so often, lets another thread have the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is told to give it up
    gate = threading.Lock()
    gate.acquire()
    ready, ran = threading.Event(), []

    def wait() -> None:
        ready.set()
        with gate:
            ran.append(True)

    thread = threading.Thread(target=wait)
    try:
        thread.start()
        ready.wait()  # goes on when that thread waits for the gate
        gate.release()
        while not ran and n_copies:
            copy()
            n_copies -= 1
        return bool(ran)
    finally:
        sys.setswitchinterval(before)
        thread.join()


class TestReleasing:
    @pytest.mark.parametrize("release_bytes", [HUGE, 64 << 10])
    def test_from_that_length_on(self, release_bytes: int):
        with Family(Arena(64 << 20), policy=Policy(release_bytes=release_bytes)) as family:
            mm = family.first.mm
            family.first.map(START, START + 2 * HUGE)
            mm.copy_out(START, b"x" * 2 * HUGE)
            below, from_on = bytearray(release_bytes - 1), bytearray(release_bytes)
            assert not other_threads_run_during(lambda: mm.copy_in(START, below), 30)
            assert other_threads_run_during(lambda: mm.copy_in(START, from_on), 100_000)

    def test_whatever_the_length_where_a_buffer_may_wait(self):
        """Memory that is mapped may be another's to bring."""
        with Family(Arena(64 << 20), policy=Policy(release_bytes=HUGE)) as family:
            mm = family.first.mm
            family.first.map(START, START + HUGE)
            mm.copy_out(START, b"x" * HUGE)
            with mmap.mmap(-1, HUGE) as mapped:
                assert other_threads_run_during(lambda: mm.copy_in(START, mapped), 100_000)


REUSES = 8


@pytest.fixture
def family() -> Iterator[Family]:
    numbers = {"mirror": 1, "mirror_reuses": REUSES, "mirror_min_run_pages": 16}
    with Family(Arena(64 << 20), policy=Policy(**numbers)) as made:
        made.first.map(START, START + HUGE)
        yield made


class TestMirroring:
    def use(self, mm: MemoryManager, n: int, addr: int = START, n_bytes: int = 100) -> None:
        for _ in range(n):
            mm.read(addr, n_bytes)

    def mirrored(self, family: Family) -> Mirror:
        """It is all there."""
        mm = family.first.mm
        mm.copy_out(START, bytes(range(256)) * (HUGE // 256))
        self.use(mm, REUSES)
        mirror: Mirror | None = mm.mirror
        assert mirror is not None
        assert mirror.find(START, HUGE, READ_WRITE) is not None
        return mirror

    def test_what_is_copied_often(self, family: Family):
        mm = family.first.mm
        mm.copy_out(START, b"first")
        self.use(mm, REUSES - 2)
        assert mm.mirror is None
        self.use(mm, 1)
        mirror = mm.mirror
        # All that lies side by side there, for a mapping costs the same.
        assert mirror.find(START, HUGE, READ_WRITE) == (mirror.find(START, 1, READ)[0], HUGE)
        assert mirror.n_maps == 1
        self.use(mm, 10 * REUSES)
        assert mirror.n_maps == 1
        assert mm.read(START, 5) == b"first"
        family.check()

    def test_2_mib_are_counted_together_and_by_the_beginning(self, family: Family):
        mm = family.first.mm
        family.first.map(START + HUGE, START + 3 * HUGE)
        mm.ensure_pmas_exist(START, 3 * HUGE)
        for n in range(REUSES - 1):
            mm.read(START + n * PAGE, 10)
            mm.read(START + 2 * HUGE - 1, 10)
        assert mm.mirror is None
        mm.read(START + HUGE - 1, 1)
        assert mm.mirror.find(START, 1, READ) is not None

    def test_short_runs_are_not(self, family: Family):
        mm = family.first.mm
        short = START + 4 * HUGE
        family.first.map(short, short + 15 * PAGE)
        self.use(mm, 5 * REUSES, short)
        assert mm.mirror is None
        family.first.map(short, short + 16 * PAGE)
        self.use(mm, REUSES, short)
        assert mm.mirror.n_resident_pages == 16

    def test_nor_what_is_off(self):
        with Family(Arena(64 << 20), policy=Policy(mirror=0, mirror_reuses=1)) as family:
            family.first.map(START, START + HUGE)
            self.use(family.first.mm, 50)
            assert family.first.mm.mirror is None

    @pytest.mark.parametrize(
        "how",
        [
            {"ignore_permissions": True},
            {"opts": IOOpts(address_space_active=False)},
            {"opts": IOOpts(mechanism="internal")},
        ],
        ids=repr,
    )
    def test_nor_for_copies_that_do_not_use_it(self, family: Family, how: Any):
        for _ in range(5 * REUSES):
            family.first.mm.read(START, 10, **how)
        assert family.first.mm.mirror is None

    def test_copies_are_right_as_before(self, family: Family):
        self.mirrored(family)
        one = family.first
        data = os.urandom(3 * PAGE)
        one.mm.copy_out(START + 100, data)
        assert one.load(START + 100, len(data)) == data
        one.store(START + 5, b"guest")
        assert one.mm.read(START + 5, 5) == b"guest"
        one.mm.zero_out(START, HUGE)
        assert not any(one.load(START, HUGE))
        assert one.mm.swap_uint32(START, 7) == 0
        assert one.mm.load_uint32(START) == 7
        # Beyond it: the rest by another way.
        one.map(START + HUGE, START + 2 * HUGE)
        one.mm.copy_out(START + HUGE - 2, b"edge")
        assert one.load(START + HUGE - 2, 4) == b"edge"
        family.check()

    def test_munmap(self, family: Family):
        mirror = self.mirrored(family)
        mm = family.first.mm
        mm.munmap(START + PAGE, PAGE)
        assert mirror.find(START + PAGE, 1, READ) is None
        assert mirror.find(START, HUGE, READ)[1] == PAGE  # type: ignore[index]
        with pytest.raises(GuestFaultError) as caught:
            mm.read(START, 3 * PAGE)
        assert (caught.value.addr, caught.value.done) == (START + PAGE, PAGE)
        family.first.map(START + PAGE, START + 2 * PAGE)
        assert mm.read(START + PAGE, PAGE) == bytes(PAGE)

    def test_mprotect(self, family: Family):
        mirror = self.mirrored(family)
        mm = family.first.mm
        mm.mprotect(START, HUGE, READ)
        assert mirror.find(START, 1, WRITE) is None
        with pytest.raises(GuestFaultError):
            mm.copy_out(START, b"x")
        self.use(mm, REUSES)
        assert mirror.find(START, HUGE, READ) is not None
        assert mirror.find(START, 1, WRITE) is None
        with pytest.raises(GuestFaultError):
            mm.copy_out(START, b"x")
        mm.mprotect(START, HUGE, READ_WRITE)
        mm.copy_out(START, b"x")
        assert mm.read(START, 1) == b"x"

    def test_fork(self, family: Family):
        mirror = self.mirrored(family)
        parent = family.first
        child = family.fork(parent)
        assert mirror.find(START, 1, READ) is None
        for _ in range(3 * REUSES):
            parent.mm.copy_out(START, b"parent")
            child.mm.copy_out(START, b"child!")
        assert parent.mm.read(START, 6) == b"parent"
        assert child.mm.read(START, 6) == b"child!"
        # What is shared may be read through both mirrors.
        self.use(child.mm, REUSES)
        assert child.mm.mirror is not mirror
        family.check()

    def test_close(self, family: Family):
        mirror = self.mirrored(family)
        family.first.mm.close()
        assert family.first.mm.mirror is None
        assert mirror.n_windows == 0
        assert mirror.n_vmas == 0

    def test_no_vmas_for_it(self):
        numbers = {"mirror": 1, "mirror_reuses": 1, "mirror_vmas": 1}
        with Family(Arena(64 << 20), policy=Policy(**numbers)) as family:
            family.first.map(START, START + HUGE)
            for n in range(10):
                family.first.mm.copy_out(START, bytes([n]))
                assert family.first.mm.read(START, 1) == bytes([n])
            assert family.first.mm.mirror.n_resident_pages == 0

    def test_inside_a_reader_nothing_is_promoted(self, family: Family):
        """That needs the lock, which a Reader cannot have; the copy is done all the same."""
        mm = family.first.mm
        mm.copy_out(START, b"there")
        token = mm.enter_copy()
        try:
            for _ in range(3 * REUSES):
                assert mm.read(START, 5) == b"there"
            assert mm.mirror is None
        finally:
            mm.leave_copy(token)
        self.use(mm, REUSES)
        assert mm.mirror is not None
