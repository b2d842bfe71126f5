"""How a pinned buffer ends: by the collector, with its process; and the window that it is of."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import StateError
from kvmmm.mm import pin
from kvmmm.safemem.ffi import PinnedWindow
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family

if TYPE_CHECKING:
    from collections.abc import Iterator

START = 8 * HUGE


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(Arena(64 << 20)) as made:
        made.first.map(START, START + 4 * HUGE)
        yield made


def n_mappings() -> int:
    return len(Path("/proc/self/maps").read_bytes().splitlines())


class TestGarbage:
    """The collector may find a buffer at any time, in the middle of anything."""

    def test_with_locks_held(self, family: Family):
        one = family.first

        class Collecting(FakeMappable):
            def translate(self, *args: Any) -> Any:
                assert one.mm.active_lock.locked()
                gc.collect()
                return super().translate(*args)

        one.map(0x10000, 0x14000, mappable=Collecting(FakeFile(4 * PAGE)))
        gc.collect()
        view = one.mm.pin(START, PAGE)
        cycle: list[object] = [view]
        cycle.append(cycle)
        del view, cycle
        one.load(0x10000, 1)
        # It waits for the next time that pins are used, and counts as pinned until then.
        assert len(one.mm.pins) == 1
        family.check()
        one.mm.pin(START, PAGE).release()
        assert not one.mm.pins
        assert family.arena.ref_count(one.offset(START)) == 1

    def test_in_a_callback_of_ours(self, family: Family):
        """Somebody's code that we call: what we hold then nobody knows."""
        one = family.first
        view = one.mm.pin(START, PAGE)
        one.space.on_fault = lambda *args: (view.release(), one.mm.handle_user_fault(*args))[1]
        one.load(START + 2 * HUGE, 1)
        assert not one.mm.pins

    def test_inside_a_reader_or_writer(self, family: Family):
        """It would wait for itself."""
        one = family.first
        view = one.mm.pin(START, PAGE)
        token = one.mm.enter_copy()
        view.release()
        assert len(one.mm.pins) == 1
        with pytest.raises(StateError):
            one.mm.pin(START, PAGE)
        one.mm.leave_copy(token)
        one.mm.pin(START + HUGE, PAGE).release()
        assert not one.mm.pins

    def test_it_can_be_collected_with_all_that_it_belongs_to(self):
        arena = Arena(64 << 20)
        family = Family(arena)
        one = family.first
        one.map(START, START + HUGE)

        class Holder:
            pass

        holder: Any = Holder()
        holder.view = one.mm.pin(START, PAGE)
        holder.family, holder.arena, holder.self = family, arena, holder
        one.space.on_fault = holder  # memory manager -> address space -> holder -> view -> mm
        gone = weakref.ref(holder)
        before = n_mappings()
        del family, one, arena, holder
        gc.collect()
        assert gone() is None
        pin.release_waiting()
        gc.collect()
        assert n_mappings() < before


SCRIPT = """
import gc, sys
from kvmmm.arena import Arena
from kvmmm.mm import MemoryManager
from tests.fakes import FakeAddressSpace
arena = Arena(16 << 20)
mm = MemoryManager(arena, FakeAddressSpace(256 << 20))
ar = mm.mmap(1 << 20, 3)
view = mm.pin(ar.start, 5000)
view[:4] = b"last"
"""


@pytest.mark.parametrize("last", ["", "cycle = [view]; cycle.append(cycle); del view", "del mm"])
def test_the_process_ends_quietly(last: str):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + last],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestPinnedWindow:
    @pytest.fixture
    def fd(self) -> Iterator[int]:
        fd = os.memfd_create("window")
        os.ftruncate(fd, 4 * PAGE)
        for page in range(4):
            os.pwrite(fd, b"%d" % page, page * PAGE)
        yield fd
        os.close(fd)

    def test_pieces(self, fd: int):
        told: list[bool] = []
        window = PinnedWindow([(fd, 2 * PAGE, 2 * PAGE), (fd, 0, PAGE)], told.append)
        with memoryview(window) as view:
            assert bytes(view[::PAGE]) == b"230"
            view[PAGE] = ord("!")
        assert os.pread(fd, 1, 3 * PAGE) == b"!"
        assert not told
        del window
        assert told == [False]

    def test_the_collector_finds_it(self, fd: int):
        told: list[Any] = []
        cycle: list[Any] = [memoryview(PinnedWindow([(fd, 0, PAGE)], told.append))]
        cycle.append(cycle)
        before = n_mappings()
        del cycle
        gc.collect()
        assert told == [True]
        assert n_mappings() < before

    def test_what_it_refuses(self, fd: int):
        told: list[bool] = []
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        before = n_mappings()
        for pieces, error in (
            ([], ValueError),
            ([(fd, 1, PAGE)], ValueError),
            ([(fd, 0, PAGE - 1)], ValueError),
            ([(fd, 0, 0)], ValueError),
            ([(fd, -PAGE, PAGE)], ValueError),
            ([(fd, 0, PAGE), [fd, 0, PAGE]], TypeError),
            ([(fd, 0)], TypeError),
            (((fd, 0, PAGE),), TypeError),
            ([(fd, 0, (1 << 63) - PAGE)] * 2, OverflowError),
            ([(fd, 0, 1 << 50)], OSError),
            ([(fd, 0, PAGE), (-1, 0, PAGE)], OSError),
            ([(fd, 0, PAGE), (reader, 0, PAGE)], PermissionError),
        ):
            with pytest.raises(error):
                PinnedWindow(pieces, told.append)  # type: ignore[arg-type]
        assert n_mappings() == before
        assert not told
        with memoryview(PinnedWindow([(reader, 0, PAGE)], told.append, False)) as view:
            assert view.readonly
        os.close(reader)

    def test_an_error_of_whoever_is_told_is_reported(self, fd: int):
        reported: list[Any] = []
        before, sys.unraisablehook = sys.unraisablehook, reported.append
        try:
            with memoryview(PinnedWindow([(fd, 0, PAGE)], lambda _: 1 // 0)):
                pass
            try:
                {}["mine"]
            except KeyError:
                PinnedWindow([(fd, 0, PAGE)], lambda _: 1 // 0)
                assert isinstance(sys.exc_info()[1], KeyError)
        finally:
            sys.unraisablehook = before
        assert [one.exc_type for one in reported] == [ZeroDivisionError] * 2
        reported.clear()


def test_numbers_that_answer_twice_leave_no_hole(family: Family):
    class Shrinking:
        def __init__(self) -> None:
            self.answers = [2 * PAGE, PAGE]

        def __index__(self) -> int:
            return self.answers.pop(0)

    pieces: list[Any] = [(family.arena.fd, 0, Shrinking())]
    with pytest.raises(ValueError, match="shrunk"):
        PinnedWindow(pieces, lambda _is_collected: None)
