"""The read section: who is inside is waited for before memory goes."""

from __future__ import annotations

import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest

from kvmmm.arena import Arena
from kvmmm.errors import StateError
from kvmmm.safemem.ffi import CopyCore, GuardedLock
from tests.safemem.threads import Thread

if TYPE_CHECKING:
    from kvmmm._core import CopyToken

PAGE = 4096
MAX = 1 << 30


class TestToken:
    def test_left_once(self, core: CopyCore):
        token = core.enter_copy()
        assert type(token).__name__ == "CopyToken"
        core.leave_copy(token)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="left already"):
                core.leave_copy(token)
        core.drain()

    def test_by_the_thread_that_entered(self, core: CopyCore):
        token = core.enter_copy()
        with pytest.raises(RuntimeError, match="another thread"):
            Thread(lambda: core.leave_copy(token)).join()
        theirs = Thread(core.enter_copy).join()
        with pytest.raises(RuntimeError, match="another thread"):
            core.leave_copy(theirs)
        core.leave_copy(token)
        del theirs
        core.drain()

    def test_of_this_memory(self, core: CopyCore):
        other = CopyCore(MAX, PAGE, 0)
        token = core.enter_copy()
        with pytest.raises(RuntimeError, match="memory manager"):
            other.leave_copy(token)
        core.leave_copy(token)
        for wrong in (None, 0, "token", object()):
            with pytest.raises(TypeError, match="what enter_copy returned"):
                core.leave_copy(wrong)  # type: ignore[arg-type]

    def test_dropped_without_being_left(self, core: CopyCore):
        """An exception may come before anybody has it: it leaves when it goes."""
        lock = GuardedLock(core)
        token = core.enter_copy()
        with pytest.raises(StateError):
            lock.acquire()
        del token
        with lock:
            core.drain()
        core.enter_copy()  # never kept
        core.drain()

    def test_dropped_by_another_thread(self, core: CopyCore):
        """The thread that entered is inside no more."""
        lock = GuardedLock(core)
        held = [core.enter_copy()]
        Thread(held.clear).join()
        with lock:
            core.drain()

    def test_it_keeps_its_memory(self):
        class Mine(CopyCore):
            __slots__ = ("__weakref__",)

        core = Mine(MAX, PAGE, 0)
        gone = weakref.ref(core)
        token = core.enter_copy()
        del core
        gc.collect()
        assert gone() is not None
        del token
        gc.collect()
        assert gone() is None

    def test_only_entering_makes_one(self, core: CopyCore):
        with pytest.raises(TypeError, match="cannot create"):
            type(core.enter_copy())()

    def test_too_many_at_once(self, core: CopyCore):
        tokens: list[CopyToken] = []

        def enter_all() -> None:
            while len(tokens) < 100_000:
                tokens.append(core.enter_copy())

        with pytest.raises(RuntimeError, match="too many"):
            enter_all()
        assert len(tokens) >= 16
        for token in tokens:
            core.leave_copy(token)
        core.leave_copy(core.enter_copy())
        core.drain()

    def test_a_core_never_made(self):
        core = CopyCore.__new__(CopyCore)
        with pytest.raises(RuntimeError):
            core.enter_copy()
        core.drain()


class TestDrain:
    def test_nobody_is_waited_for_where_nobody_is(self, core: CopyCore):
        for _ in range(5):
            core.drain()
            core.forget(0, MAX)

    @pytest.mark.usefixtures("no_switches")
    @pytest.mark.parametrize("how", ["drain", "forget"])
    def test_it_waits_for_who_is_inside(self, core: CopyCore, how: str):
        events: list[str] = []
        core.drain()  # in either phase
        token = core.enter_copy()

        def take_away() -> None:
            events.append("waits")
            if how == "drain":
                core.drain()
            else:
                core.forget(0, MAX)
            events.append("gone")

        thread = Thread(take_away)
        while not events:
            time.sleep(0)
        time.sleep(0.01)
        # Who enters meanwhile is not waited for: it cannot find what is taken away.
        later = core.enter_copy()
        events.append("left")
        core.leave_copy(token)
        thread.join()
        assert events == ["waits", "left", "gone"]
        core.leave_copy(later)

    def test_a_large_copy_in_flight(self):
        """When `forget` returns it has ended, to its last byte."""
        n_bytes = 64 << 20
        with Arena(n_bytes) as arena:
            frames = arena.allocate(n_bytes)
            arena.view[frames.start : frames.end] = b"\x5a" * n_bytes
            core = CopyCore(MAX, arena.hva, n_bytes)
            core.apply_policy(64 << 10, False, 1)
            dst = bytearray(n_bytes)
            n_caught = 0
            for _ in range(50):
                dst[0] = dst[-1] = 0
                core.fill_frames(0, n_bytes, frames.start, 3)
                thread = Thread(lambda: core.copy_in(0, dst))
                while not dst[0] and thread.is_alive:
                    pass
                # Bytes come in ascending order: between the first and the last it is in flight.
                was_in_flight = not dst[-1]
                core.forget(0, n_bytes)
                last = dst[-1]
                assert thread.join() == n_bytes
                if was_in_flight:
                    assert last == 0x5A, "what it was copying was taken away"
                    n_caught += 1
                    if n_caught == 3:
                        break
            assert n_caught, "no copy was caught in flight"
            arena.dec_ref(frames)


def test_two_drains_at_once_both_end(core: CopyCore):
    """The second comes while the first waits, and somebody has entered in between."""
    for _ in range(20):
        first = core.enter_copy()
        drains = [Thread(core.drain)]
        time.sleep(0.001)
        second = core.enter_copy()
        drains.append(Thread(core.drain))
        time.sleep(0.001)
        core.leave_copy(first)
        core.leave_copy(second)
        for drain in drains:
            drain.join()
