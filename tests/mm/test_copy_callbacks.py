"""Hostile Readers and Writers: they run in the middle of a copy, and must not break or stop it."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import GuestFaultError, StateError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.hostarch.ranges_seq import AddrRangeSeq
from kvmmm.mm.policy import Policy
from kvmmm.mm.vector import copy_in_to, copy_out_from
from tests.mm.copying import MECHANISMS, N_BYTES, PAGE, SPARE, START, Ground, through, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.safemem.block import BlockSeq

WARM = START + 64 * PAGE
DATA = bytes(range(256)) * 64


@pytest.fixture
def ground() -> Iterator[Ground]:
    """[WARM, WARM + 16 KiB) holds DATA; [SPARE, SPARE + PAGE) is mapped, and cold."""
    with Ground() as made:
        made.mm.copy_out(WARM, DATA)
        made.map(SPARE, PAGE)
        yield made


class Callback:
    """A Reader and a Writer that does something, then moves bytes as it should."""

    def __init__(self, act: Callable[[BlockSeq], object]) -> None:
        self.act = act
        self.n_calls = 0

    def read_to_blocks(self, dsts: BlockSeq, /) -> int:
        self.n_calls += 1
        self.act(dsts)
        return dsts.copy_from(bytes(dsts.n_bytes))

    def write_from_blocks(self, srcs: BlockSeq, /) -> int:
        self.n_calls += 1
        self.act(srcs)
        return srcs.n_bytes


def both(ground: Ground, callback: Any, n_bytes: int = 5000) -> Iterator[Callable[[], int]]:
    """The two copies with that callback."""
    ar = AddrRange(START + 10, START + 10 + n_bytes)
    yield lambda: copy_out_from(ground.mm, ar, callback)
    yield lambda: copy_in_to(ground.mm, ar, callback)


OPERATIONS: dict[str, Callable[[Ground], object]] = {
    "munmap": lambda g: g.mm.munmap(START, PAGE),
    "munmap elsewhere": lambda g: g.mm.munmap(SPARE, PAGE),
    "mmap": lambda g: g.mm.mmap(PAGE, READ_WRITE),
    "mprotect": lambda g: g.mm.mprotect(START, PAGE, READ),
    "mremap": lambda g: g.mm.mremap(START, PAGE, 2 * PAGE, may_move=True),
    "madvise": lambda g: g.mm.madvise(START, PAGE, 4),
    "fork": lambda g: g.fork(),
    "pin": lambda g: g.mm.pin(START, PAGE),
    "populate": lambda g: g.mm.populate(SPARE, PAGE),
    "fault": lambda g: g.mm.handle_user_fault(SPARE, READ),
    "brk": lambda g: g.mm.set_brk(SPARE + PAGE),
    "close": lambda g: g.mm.close(),
    "read cold": lambda g: g.mm.read(SPARE, 8),
    "write cold": lambda g: g.mm.copy_out(SPARE, b"x"),
    "zero cold": lambda g: g.mm.zero_out(SPARE, 8),
    "swap cold": lambda g: g.mm.swap_uint32(SPARE, 1),
    "many cold": lambda g: g.mm.copy_in_many([(WARM, 8), (SPARE, 8)]),
    "hole": lambda g: g.mm.read(START - PAGE, 8),
    "large cold": lambda g: g.mm.read(START, N_BYTES + PAGE),
    "recursion": lambda g: copy_out_from(g.mm, AddrRange(START, START + 8), Callback(print)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_and_cold_copies_raise(ground: Ground, name: str):
    """And nothing of them is done: the callback goes on, and so does the copy."""
    seen: list[str] = []

    def act(_blocks: BlockSeq) -> None:
        with pytest.raises(StateError) as caught:
            OPERATIONS[name](ground)
        seen.append(str(caught.value))

    before = [(s, e) for s, e, _ in ground.mm.vmas]
    for copy in both(ground, Callback(act)):
        assert copy() == 5000
    assert len(seen) == 2
    assert "Reader" in seen[0]
    assert [(s, e) for s, e, _ in ground.mm.vmas] == before


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_warm_copies_work(ground: Ground, mechanism: str):
    mm, opts = ground.mm, through(mechanism)
    assert mm.read(WARM, len(DATA), **opts) == DATA
    mm.copy_out(WARM, DATA, **opts)
    found: list[bytes] = []

    def act(_blocks: BlockSeq) -> None:
        found.append(mm.read(WARM, len(DATA), **opts))
        mm.copy_out(WARM, b"inside", **opts)
        mm.swap_uint32(WARM + 8, 7, **opts)
        found.extend(mm.copy_in_many([(WARM, 6)], **opts))
        seq = AddrRangeSeq([AddrRange(WARM, WARM + 3), AddrRange(WARM + 3, WARM + 6)])
        dst = bytearray(6)
        mm.copy_in_vec(seq, dst, **opts)
        found.append(bytes(dst))
        mm.zero_out(WARM, len(DATA), **opts)
        mm.copy_out(WARM, DATA, **opts)

    for copy in both(ground, Callback(act)):
        assert copy() == 5000
    assert found == [DATA, b"inside", b"inside"] * 2


def test_warm_copies_that_want_into_the_mirror():
    """The policy would put the memory there, and may have to wait for Readers: not for this one."""
    policy = Policy(mirror=1, mirror_reuses=1, mirror_min_run_pages=1, mirror_vmas=8)
    with Ground(policy=policy) as ground:
        for at in range(START, START + N_BYTES, 8 * PAGE):
            ground.mm.mprotect(at, PAGE, READ)
            ground.mm.read(at, 8 * PAGE)
        for copy in both(ground, Callback(lambda _: ground.mm.read(START, N_BYTES)), 100):
            with contextlib.suppress(GuestFaultError):
                within(10, copy)
        ground.map(START, N_BYTES)


class MineError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        MineError(),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        MemoryError(),
        StopIteration(),
    ],
)
def test_what_it_raises_comes_out(ground: Ground, error: BaseException):
    def act(_blocks: BlockSeq) -> None:
        raise error

    for copy in both(ground, Callback(act)):
        with pytest.raises(type(error)) as caught:
            copy()
        assert caught.value is error
        caught.value.__traceback__ = None
    del caught


def test_an_interrupt_of_the_users(ground: Ground):
    """Ctrl-C while a Reader waits."""

    def act(_blocks: BlockSeq) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for copy in both(ground, Callback(act)):
            with pytest.raises(KeyboardInterrupt):
                copy()
            gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_at_any_moment():
    """It leaves nobody in the read section, wherever it comes; memory that is there stays there."""
    with Ground() as ground:
        ground.mm.copy_out(START, DATA)
        ar = AddrRange(START, START + 100)
        is_armed = False

        def interrupt(*_: object) -> None:
            nonlocal is_armed
            if is_armed:
                is_armed = False
                raise KeyboardInterrupt

        callback = Callback(lambda _: None)
        n_interrupted = 0
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for n in range(1500):
                signal.setitimer(signal.ITIMER_REAL, 5e-6 + n % 50 * 1e-6)
                try:
                    is_armed = True
                    for _ in range(4):
                        copy_in_to(ground.mm, ar, callback)
                    is_armed = False
                except KeyboardInterrupt:
                    n_interrupted += 1
                is_armed = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert n_interrupted
        # Waits for whoever is inside; and this thread is not.
        within(10, lambda: ground.mm.munmap(START, PAGE))
        ground.map(START, PAGE)


KEPT: dict[str, Callable[[BlockSeq], Any]] = {
    "view": lambda blocks: blocks.views()[0],
    "slice": lambda blocks: blocks.views()[0][3:9],
    "cast": lambda blocks: blocks.views()[0][:16].cast("I"),
    "part": lambda blocks: blocks.drop_first(3).views()[0],
}


@pytest.mark.parametrize("name", KEPT)
def test_who_keeps_a_view_is_told_and_cannot_use_it(ground: Ground, name: str):
    kept: list[Any] = []
    for copy in both(ground, Callback(lambda blocks: kept.append(KEPT[name](blocks)))):
        with contextlib.suppress(StateError):
            copy()
        # What it was lent is over; slices of it live on, and the error has said so.
        with contextlib.suppress(ValueError):
            bytes(kept[-1])
        kept.clear()
        gc.collect()


def test_who_keeps_the_blocks_gets_an_error_from_them(ground: Ground):
    kept: list[BlockSeq] = []
    for copy in both(ground, Callback(kept.append)):
        copy()
        ground.mm.munmap(START, PAGE)
        ground.map(START, PAGE)
        for use in (
            kept[-1].views, lambda: kept[-1].copy_from(b"x"),
            lambda: kept[-1].copy_to(bytearray(8)),
            lambda: kept[-1].drop_first(1).views(), lambda: bytes(kept[-1]),
        ):  # fmt: skip
            with pytest.raises(StateError):
                use()


@pytest.mark.parametrize("count", [-1, 5001, 1 << 64, None, 1.5, "5000", True, b""])
def test_counts_that_cannot_be(ground: Ground, count: Any):
    class Liar:
        def read_to_blocks(self, _dsts: BlockSeq, /) -> Any:
            return count

        write_from_blocks = read_to_blocks

    for copy in both(ground, Liar()):
        with pytest.raises((TypeError, ValueError)):
            copy()


def test_two_threads_in_one_reader(ground: Ground):
    """Both are inside at once; removal waits for both."""
    barrier = threading.Barrier(2, timeout=20)
    callback = Callback(lambda _: barrier.wait())
    failures: list[BaseException] = []

    def run(copy: Callable[[], int]) -> None:
        try:
            for _ in range(20):
                assert copy() == 5000
        except BaseException as e:  # noqa: BLE001 - told below
            failures.append(e)

    threads = [threading.Thread(target=run, args=(copy,)) for copy in both(ground, callback)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        within(20, lambda: ground.mm.munmap(SPARE, PAGE))
        ground.map(SPARE, PAGE)
    for thread in threads:
        thread.join()
    assert not failures
    assert callback.n_calls == 40


def test_another_thread_may_do_what_the_reader_may_not(ground: Ground):
    """It waits until the Reader has gone; the Reader must not wait for it."""
    ended = threading.Event()

    def unmap() -> None:
        ground.mm.munmap(START, PAGE)
        ended.set()

    threads: list[threading.Thread] = []

    def act(_blocks: BlockSeq) -> None:
        threads.append(threading.Thread(target=unmap))
        threads[-1].start()
        assert not ended.wait(0.05), "memory was taken away under a Reader"
        # It holds the lock and waits for us: who is inside copies what is there all the same.
        assert ground.mm.read(WARM, 8) == DATA[:8]

    ar = AddrRange(START + 10, START + 5010)
    assert copy_out_from(ground.mm, ar, Callback(act)) == 5000
    assert ended.wait(10)
    threads[-1].join()
    with pytest.raises(GuestFaultError):
        ground.mm.read(START, 1)
    ground.map(START, PAGE)


def test_a_reader_inside_a_reader_of_another_memory(ground: Ground):
    """Only the same memory manager is forbidden."""
    with Ground() as other:

        def refused(_blocks: BlockSeq) -> None:
            with pytest.raises(StateError):
                ground.mm.munmap(START, PAGE)

        def act(_blocks: BlockSeq) -> None:
            other.mm.munmap(START, PAGE)
            other.map(START, PAGE)
            inner = Callback(refused)
            assert copy_out_from(other.mm, AddrRange(START, START + 8), inner) == 8

        for copy in both(ground, Callback(act)):
            assert copy() == 5000


def test_tokens(ground: Ground):
    """What C offers for this: whoever leaves must have entered."""
    mm = ground.mm
    for wrong in (0, 1, 2, -1, 1 << 70, None, "x", 1.5):
        with pytest.raises((RuntimeError, TypeError, ValueError, OverflowError)):
            mm.leave_copy(wrong)  # type: ignore[arg-type]
    tokens = [mm.enter_copy() for _ in range(3)]
    with pytest.raises(StateError):
        mm.munmap(START, PAGE)
    failures: list[BaseException] = []

    def leave() -> None:
        try:
            mm.leave_copy(tokens[0])
        except RuntimeError as e:
            failures.append(e)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert len(failures) == 1  # that thread is not inside
    for token in tokens:
        mm.leave_copy(token)
    with pytest.raises(RuntimeError):
        mm.leave_copy(tokens[0])
