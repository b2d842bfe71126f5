"""PageTableAddressSpace on KVM: forks, and several vCPUs in one space."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from tests.platform.kvm.user_rig import (
    CODE,
    DATA,
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

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(100)]


@pytest.fixture
def rig() -> Iterator[UserRig]:
    with UserRig() as rig:
        yield rig


class TestFork:
    @pytest.mark.npt
    def test_the_parent_faults_at_its_next_write(self, rig: UserRig):
        fr = rig.frames(0)
        rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
        child = rig.new_space()
        child.unmap([ar(RESULT), ar(CODE)])
        with Turner(rig, write_loop()) as turner:
            turner.sees()
            assert rig.space.fork_into(child)
            written = rig.word_at(fr)
            addr, access = turner.faults()
            assert access == WRITE
            assert addr in {DATA, RESULT, RESULT + 8}
            assert rig.word_at(fr) == written
        assert child.is_mapped(DATA, READ)
        assert not child.is_mapped(DATA, WRITE)
        assert not rig.space.is_mapped(DATA, WRITE)

    def test_each_sees_its_own_after_a_write(self, scaled: Callable[[int], int]):
        """One vCPU goes to and fro between parent and child; pages are given to one of the two."""
        with UserRig() as rig:
            n_pages = scaled(1500)
            shared = rig.frames(1, n_pages=n_pages)
            rig.space.map_file(DATA, rig.arena, shared, READ_WRITE)
            vcpu = rig.load(step_loop(), rsi=DATA)
            vcpu.once(10 * SECOND)

            def seen(space: Any, addr: int) -> int:
                space.activate(vcpu)
                vcpu.regs.rsi = addr
                vcpu.once(10 * SECOND)
                return int(vcpu.regs.rbx)

            for page in range(n_pages):
                seen(rig.space, DATA + page * PAGE)
            child = rig.new_space()
            child.unmap([ar(RESULT), ar(CODE)])
            assert rig.space.fork_into(child)
            want = {rig.space: [1] * n_pages, child: [1] * n_pages}
            rng = random.Random(3)
            for n in range(scaled(300)):
                space = rng.choice([rig.space, child])
                page = rng.randrange(n_pages)
                perms = rng.choice([READ, READ_WRITE])
                space.map_file(DATA + page * PAGE, rig.arena, rig.frames(n + 2), perms)
                want[space][page] = n + 2
                for which in (rig.space, child):
                    for other in (page, rng.randrange(n_pages)):
                        assert seen(which, DATA + other * PAGE) == want[which][other]
            child.release()
            for page in range(0, n_pages, 7):
                assert seen(rig.space, DATA + page * PAGE) == want[rig.space][page]

    def test_other_spaces_cannot_share(self, rig: UserRig):
        with UserRig() as other:
            assert not rig.space.fork_into(other.space)


class TestTwoVcpus:
    @pytest.mark.npt
    def test_both_see_what_changes(self, rig: UserRig, scaled: Callable[[int], int]):
        frames = [rig.frames(word) for word in range(4)]
        rig.space.map_file(DATA, rig.arena, frames[0], READ)
        turners = [Turner(rig, read_loop()), Turner(rig, read_loop())]
        with turners[0], turners[1]:
            for n in range(scaled(60)):
                rig.space.map_file(DATA, rig.arena, frames[n % 4], READ)
                assert [turner.sees() for turner in turners] == [n % 4] * 2
            rig.space.unmap([ar(DATA)])
            assert [turner.faults() for turner in turners] == [(DATA, READ)] * 2

    def test_a_fork_stops_the_writes_of_both(self, rig: UserRig):
        fr = rig.frames(0, n_pages=2)
        rig.space.map_file(DATA, rig.arena, fr, READ_WRITE)
        child = rig.new_space()
        child.unmap([ar(RESULT), ar(CODE)])
        turners = [Turner(rig, write_loop()), Turner(rig, write_loop(), DATA + PAGE)]
        with turners[0], turners[1]:
            for turner in turners:
                turner.sees()
            assert rig.space.fork_into(child)
            before = rig.arena.view[fr.start : fr.end].tobytes()
            for turner in turners:
                turner.faults()
            assert rig.arena.view[fr.start : fr.end].tobytes() == before
        assert len(rig.faults) == 2
        assert {access for _, access in rig.faults} == {WRITE}
