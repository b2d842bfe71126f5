"""Memory managers that are closed, unborn, copied; processes with strange signal handling."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import weakref

import pytest

from kvmmm.errors import GuestFaultError, KvmmmError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm import MemoryManager
from kvmmm.mm.policy import Policy
from kvmmm.safemem.ffi import CopyCore, GuardedLock, IOOpts, MirrorWindow, PageWalk
from tests.mm.copying import MECHANISMS, N_BYTES, PAGE, START, Ground, through

CALLS = (
    ("copy_in", (START, bytearray(8))),
    ("copy_out", (START, b"12345678")),
    ("copy_out", (START, bytes(100_000))),
    ("write", (START, "text")),
    ("read", (START, 8)),
    ("read", (START, 100_000)),
    ("zero_out", (START, 8)),
    ("copy_in_vec", (AddrRangeSeq([AddrRange(START, START + 8)]), bytearray(8))),
    ("copy_out_vec", (AddrRangeSeq([AddrRange(START, START + 8)]), b"12345678")),
    ("copy_in_many", ([(START, 8)],)),
    ("copy_out_many", ([(START, b"x")],)),
    ("swap_uint32", (START, 1)),
    ("compare_and_swap_uint32", (START, 1, 2)),
    ("load_uint32", (START,)),
)


# ---- managers ----


@pytest.mark.parametrize("mechanism", [None, *MECHANISMS])
def test_closed(mechanism: str | None):
    options = through(mechanism) if mechanism else {}
    with Ground() as ground:
        ground.mm.copy_out(START, bytes(N_BYTES), **options)
        ground.mm.close()
        for name, args in CALLS:
            with pytest.raises(GuestFaultError) as caught:
                getattr(ground.mm, name)(*args, **options)
            assert (caught.value.addr, caught.value.done) == (START, 0)
        ground.map(START, N_BYTES)


def test_unborn():
    """`__init__` has never run: an error of some kind, and no crash."""
    for cls in (MemoryManager, CopyCore):
        for mechanism in (None, *MECHANISMS):
            blank = cls.__new__(cls)
            options = through(mechanism) if mechanism else {}
            for name, args in CALLS:
                with pytest.raises(
                    (KvmmmError, AttributeError, TypeError, ValueError, SystemError)
                ):
                    getattr(blank, name)(*args, **options)
            for name, args in (
                ("forget", (0, PAGE)), ("fill_frames", (0, PAGE, 0, 1)), ("frames", (0, PAGE)),
                ("enter_copy", ()),
            ):  # fmt: skip
                with pytest.raises((ValueError, RuntimeError, AttributeError)):
                    getattr(blank, name)(*args)
            blank.drain()
            assert (blank.walk, blank.mirror, blank.max_addr) == (None, None, 0)
    lock, mirror = GuardedLock.__new__(GuardedLock), MirrorWindow.__new__(MirrorWindow)
    for call in (
        lock.acquire, lock.release, lock.__enter__, lambda: mirror.map(0, PAGE, 0, 0, 1),
        lambda: mirror.clear(0, PAGE), lambda: mirror.populate(0, PAGE),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call()
    mirror.release()
    PageWalk.__new__(PageWalk).close()
    assert PageWalk.__new__(PageWalk).find(0, PAGE, 1) is None
    assert MirrorWindow.__new__(MirrorWindow).find(0, PAGE, 1) is None


def test_a_lock_without_an_mm():
    lock = GuardedLock()
    with lock:
        assert lock.locked()
        assert not lock.acquire(False)
    with Ground() as ground:
        token = ground.mm.enter_copy()
        with lock:  # inside a Reader of whatever mm
            pass
        ground.mm.leave_copy(token)
    assert not lock.locked()
    with pytest.raises(RuntimeError):
        lock.release()
    with pytest.raises(TypeError):
        GuardedLock(None)  # type: ignore[arg-type]


def test_born_twice():
    with Ground() as ground:
        with pytest.raises((KvmmmError, ValueError)):
            ground.mm.__init__(ground.arena, ground.mm.address_space)  # type: ignore[misc]
        assert ground.mm.read(START, 8) == bytes(8)


def test_nobody_copies_or_pickles_one():
    """Two objects would have one set of frames."""
    with Ground() as ground:
        things = (ground.mm, ground.mm.mapping_lock, ground.mm.walk)
        for thing in things:
            for way in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
                    way(thing)
        del thing, things
    for way in (copy.copy, pickle.dumps):
        with pytest.raises((TypeError, pickle.PicklingError)):
            way(IOOpts(mechanism="walk"))


def test_what_it_is_given_for_walk_and_mirror():
    with Ground() as ground:
        mm = ground.mm
        for name in ("walk", "mirror"):
            for wrong in (5, "x", object(), mm, PageWalk):
                with pytest.raises(TypeError):
                    setattr(mm, name, wrong)
        walk = mm.walk
        mm.walk = None
        assert mm.read(START, 8, **through("walk")) == bytes(8)  # by internal mappings
        del mm.walk
        mm.walk = walk
        assert mm.read(START, 8, **through("walk")) == bytes(8)


class Source(str):
    """A text that somebody can wait for the end of."""

    __slots__ = ("__weakref__",)


def test_it_goes_when_nobody_has_it():
    """Nothing in C keeps it, nor what it was given."""
    for mechanism in MECHANISMS:
        with Ground() as ground:
            child = ground.fork()
            child.copy_out(START, bytes(N_BYTES), **through(mechanism))
            ground._children.clear()
            child.policy = Policy(source=Source("here"))
            gone = weakref.ref(child.address_space), weakref.ref(child.policy.source)
            child.close()
            child.address_space.release()
            del child
            gc.collect()
            assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("n_bytes", [8, 100_000])
def test_frames_table_takes_nothing_that_is_wrong(n_bytes: int):
    with Ground() as ground:
        mm = ground.mm
        wrong = -1, 1, 4095, 1 << 40, 1 << 63, 1 << 64
        for bad in wrong:
            for args in ((bad, bad + PAGE), (0, bad), (bad, PAGE)):
                with pytest.raises((ValueError, OverflowError)):
                    mm.forget(*args)
                with pytest.raises((ValueError, OverflowError)):
                    mm.fill_frames(*args, 0, 1)
            with pytest.raises((ValueError, OverflowError)):
                mm.fill_frames(START, START + PAGE, bad, 1)
        with pytest.raises(ValueError, match="bits"):
            mm.fill_frames(START, START + PAGE, 0, 16)
        assert mm.read(START, n_bytes) == bytes(n_bytes)


# ---- processes ----

_PRELUDE = """
import faulthandler, mmap, os, signal, sys, threading
from kvmmm.errors import HostBufferError
from tests.mm.copying import MECHANISMS, START, CutFile, Ground, through
def faulting_copies(ground):
    for mechanism in MECHANISMS:
        for n_pages, n_left in ((3, 1), (80, 70), (80, 0)):
            with CutFile(n_pages, n_left) as cut:
                for copy in (ground.mm.copy_in, ground.mm.copy_out):
                    try:
                        copy(START, cut.map, **through(mechanism))
                    except HostBufferError as e:
                        assert e.done == e.offset == cut.end, e
                    else:
                        raise AssertionError("a copy of what is not there")
def copies(ground):
    for mechanism in MECHANISMS:
        assert ground.mm.copy_out(START, b"x" * 300_000, **through(mechanism)) == 300_000
        assert ground.mm.read(START, 300_000, **through(mechanism)) == b"x" * 300_000
"""


def run(body: str, *options: str) -> subprocess.CompletedProcess[str]:
    code = _PRELUDE + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


FAULTHANDLER = {
    "never": "",
    "before": "faulthandler.enable()",
    "before and off": "faulthandler.enable(); faulthandler.disable()",
}
LATER = {
    "": "",
    "on": "faulthandler.enable()",
    "on and off": "faulthandler.enable(); faulthandler.disable()",
    "off": "faulthandler.disable()",
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("before", FAULTHANDLER)
def test_faulthandler(before: str, later: str):
    done = run(f"""
    {FAULTHANDLER[before]}
    with Ground() as ground:
        faulting_copies(ground)
        {LATER[later]}
        faulting_copies(ground)
    print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


def test_faulthandler_again_and_again():
    done = run("""
    with Ground() as ground:
        for _ in range(100):
            faulthandler.enable()
            copies(ground)
            faulting_copies(ground)
            sorted(map(str, range(300)))  # other things on the stack
            with Ground() as other:
                copies(other)
            faulthandler.disable()
            faulting_copies(ground)
    print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


def test_a_thread_that_has_the_signals_blocked():
    """The kernel would kill the process for a fault, without asking any handler."""
    done = run("""
    def body():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGBUS})
        copies(ground)
        faulting_copies(ground)
        print("alive")
    with Ground() as ground:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        body()
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n" * 2), done.stderr[-2000:]


def test_python_handlers_for_the_signals():
    """They are Python's, and never run for our faults."""
    done = run("""
    seen = []
    for signo in (signal.SIGSEGV, signal.SIGBUS):
        signal.signal(signo, lambda *_: seen.append(1))
    with Ground() as ground:
        faulting_copies(ground)
        for signo in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(signo, signal.SIG_IGN)
        faulting_copies(ground)
        for signo in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(signo, signal.SIG_DFL)
        faulting_copies(ground)
    print("alive", seen)
    """)
    assert (done.returncode, done.stdout) == (0, "alive []\n"), done.stderr[-2000:]


def test_in_a_forked_process():
    done = run("""
    with Ground() as ground:
        copies(ground)
        pid = os.fork()
        copies(ground)
        faulting_copies(ground)
        if not pid:
            print("child", flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "child\nalive\n"), done.stderr[-2000:]


def test_somebody_elses_fault_is_still_one():
    done = run("""
    import ctypes
    with Ground() as ground:
        faulting_copies(ground)
        sys.stdout.write("here")
        sys.stdout.flush()
        ctypes.string_at(1)
    """)
    assert done.returncode == -11, done
    assert done.stdout == "here"
