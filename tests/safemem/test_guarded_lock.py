"""GuardedLock: a lock that nobody inside of a Reader or Writer of the same memory can take."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time

import pytest

from kvmmm.errors import StateError
from kvmmm.safemem.ffi import CopyCore, GuardedLock
from tests.safemem.threads import Thread

PAGE = 4096
MAX = 1 << 30


class TestGuardedLock:
    def test_taken_and_given_back(self, core: CopyCore):
        lock = GuardedLock(core)
        assert not lock.locked()
        assert lock.acquire() is True
        assert lock.locked()
        assert lock.acquire(False) is False
        lock.release()
        assert not lock.locked()
        assert lock.acquire(False) is True
        assert lock.locked()
        lock.release()
        with lock as taken:
            assert taken is True
            assert lock.locked()
        assert not lock.locked()
        with pytest.raises(ZeroDivisionError), lock:
            raise ZeroDivisionError
        assert not lock.locked()

    def test_given_back_by_whoever_has_none(self, core: CopyCore):
        lock = GuardedLock(core)
        for give_back in (lock.release, lambda: lock.__exit__(None, None, None)):
            with pytest.raises(RuntimeError, match="release unlocked lock"):
                give_back()
        with lock:
            lock.release()
            lock.acquire()
        with pytest.raises(RuntimeError):
            lock.release()

    @pytest.mark.usefixtures("no_switches")
    def test_two_threads(self, core: CopyCore):
        lock = GuardedLock(core)
        events: list[str] = []

        def second() -> None:
            assert lock.acquire(False) is False
            events.append("waits")
            with lock:
                events.append("second")

        with lock:
            thread = Thread(second)
            while not events:
                time.sleep(0)
            # It runs on as soon as this one sleeps, and is there when it does no more.
            time.sleep(0.01)
            events.append("first")
        thread.join()
        assert events == ["waits", "first", "second"]
        assert not lock.locked()
        # As with any lock, another thread may give it back.
        lock.acquire()
        Thread(lock.release).join()
        assert not lock.locked()

    def test_exclusion(self, core: CopyCore):
        """An addition in two steps: none is lost."""
        lock = GuardedLock(core)
        cell = [0]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        def add() -> None:
            for n in range(3000):
                with lock:
                    was = cell[0]
                    if not n % 16:
                        time.sleep(0)
                    cell[0] = was + 1

        try:
            for thread in [Thread(add) for _ in range(3)]:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        assert cell == [9000]
        assert not lock.locked()

    @pytest.mark.usefixtures("no_switches")
    def test_ctrl_c_while_waiting(self, core: CopyCore):
        """It comes out, and the lock is the other's as before."""
        lock, ended = GuardedLock(core), threading.Event()
        main = threading.get_ident()

        def hold() -> None:
            with lock:
                # Again, for the first may come before it waits.
                while not ended.wait(0.01):
                    signal.pthread_kill(main, signal.SIGUSR1)

        def interrupt(*_: object) -> None:
            ended.set()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            thread = Thread(hold)
            with pytest.raises(KeyboardInterrupt):
                lock.acquire()
        finally:
            ended.set()
            thread.join()
            signal.signal(signal.SIGUSR1, before)
        assert not lock.locked()
        with lock:
            pass

    @pytest.mark.usefixtures("no_switches")
    def test_a_signal_that_raises_nothing(self, core: CopyCore):
        """The wait goes on, and the lock is taken."""
        lock, seen = GuardedLock(core), []
        main = threading.get_ident()

        def hold() -> None:
            with lock:
                while len(seen) < 3:
                    time.sleep(0.002)
                    signal.pthread_kill(main, signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
        try:
            thread = Thread(hold)
            with lock:
                assert len(seen) >= 3
            thread.join()
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_not_from_inside_the_section(self, core: CopyCore):
        """Whoever holds it may wait for all who are inside: so for itself."""
        lock, others = GuardedLock(core), GuardedLock(CopyCore(MAX, PAGE, 0))
        token = core.enter_copy()
        try:
            for take in (lock.acquire, lock.__enter__, lambda: lock.acquire(True)):
                with pytest.raises(StateError, match="inside a Reader or Writer"):
                    take()
            assert lock.acquire(False) is False
            assert not lock.locked()
            # Of another memory, it is a lock as any other; and another thread is not inside.
            with others:
                pass

            def outside() -> str:
                with lock:
                    return "taken"

            assert Thread(outside).join() == "taken"
        finally:
            core.leave_copy(token)
        with lock:
            pass

    def test_held_before_it_is_entered(self, core: CopyCore):
        """As a Writer does: it enters under the lock, then gives that back."""
        lock = GuardedLock(core)
        with lock:
            token = core.enter_copy()
        assert not lock.locked()
        core.leave_copy(token)

    def test_one_of_several_tokens_is_left(self, core: CopyCore):
        lock = GuardedLock(core)
        tokens = [core.enter_copy() for _ in range(3)]
        for token in (tokens[1], tokens[0]):
            core.leave_copy(token)
            with pytest.raises(StateError):
                lock.acquire()
        core.leave_copy(tokens[2])
        with lock:
            pass

    def test_never_made(self, core: CopyCore):
        lock = GuardedLock.__new__(GuardedLock)
        for use in (lock.acquire, lock.__enter__, lambda: lock.acquire(False)):
            with pytest.raises(ValueError, match="never made"):
                use()
        with pytest.raises(RuntimeError):
            lock.release()
        assert not lock.locked()
        lock.__init__(core)  # type: ignore[misc]
        lock.acquire()
        lock.__init__(core)  # type: ignore[misc]
        assert lock.locked()
        with pytest.raises(TypeError):
            GuardedLock("core")  # type: ignore[arg-type]

    def test_it_outlives_its_core(self):
        core = CopyCore(MAX, PAGE, 0)
        lock = GuardedLock(core)
        del core
        gc.collect()
        with lock:
            pass
        lock.acquire()  # and may go while it is taken
