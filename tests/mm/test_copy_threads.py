"""Memory that changes under large copies without the GIL: old bytes or new, never others'."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest

from kvmmm.errors import ArenaExhaustedError, GuestFaultError, NoProgressError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.mm.advice import MADV_DONTNEED
from tests.mm.copying import MECHANISMS, N_BYTES, PAGE, RELEASES_GIL, START, Ground, through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OTHERS = START + (64 << 20)
OURS_BYTE, THEIRS_BYTE = 0xAA, 0xBB
OURS, THEIRS = bytes([OURS_BYTE]), bytes([THEIRS_BYTE])
SECONDS = 0.7
LONGEST = 60.0


@pytest.fixture
def ground() -> Iterator[Ground]:
    # Little room: what is freed is soon somebody else's.
    with Ground(arena_bytes=14 << 20) as made:
        yield made


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Threads:
    """Run in threads until the block ends; what one of them raises comes out then."""

    def __init__(self, *bodies: Callable[[], object]) -> None:
        self.end = threading.Event()
        self.failures: list[BaseException] = []
        self.n_rounds = [0] * len(bodies)
        self._threads = [
            threading.Thread(target=self._run, args=(n, body)) for n, body in enumerate(bodies)
        ]

    def _run(self, n: int, body: Callable[[], object]) -> None:
        try:
            while not self.end.is_set():
                # What a copy is refused while memory comes and goes, it is refused.
                with contextlib.suppress(GuestFaultError, ArenaExhaustedError):
                    body()
                self.n_rounds[n] += 1
        except BaseException as e:  # noqa: BLE001 - raised at the end
            self.failures.append(e)
            self.end.set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def for_a_while(step: Callable[[], object], threads: Threads, seconds: float = SECONDS) -> int:
    """Repeat a step for so long, and until each thread has had its turn, however busy the host."""
    begin = time.monotonic()
    n = 0
    while not threads.end.is_set():
        step()
        n += 1
        taken = time.monotonic() - begin
        if taken > seconds and (min(threads.n_rounds) > 0 or taken > LONGEST):
            break
    return n


def writer(ground: Ground, options: dict[str, Any]) -> Callable[[], object]:
    """Fill our region with our bytes, by every way that there is."""
    data = OURS * RELEASES_GIL
    rng = random.Random(1)

    def write() -> None:
        addr = START + rng.randrange(0, N_BYTES - RELEASES_GIL)
        if rng.random() < 0.8:
            ground.mm.copy_out(addr, data, **options)
        else:
            ground.mm.zero_out(addr, RELEASES_GIL, **options)

    return write


def reader(ground: Ground, options: dict[str, Any]) -> Callable[[], object]:
    """Whatever is read there is ours, or zero."""
    rng = random.Random(2)
    buffer = bytearray(RELEASES_GIL)

    def read() -> None:
        buffer[:] = bytes(len(buffer))
        with contextlib.suppress(GuestFaultError):
            ground.mm.copy_in(START + rng.randrange(0, N_BYTES - RELEASES_GIL), buffer, **options)
        assert THEIRS not in buffer, "another mapping's bytes were read"

    return read


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_frames_that_are_given_to_others(ground: Ground, mechanism: str):
    """Our memory goes, its frames are others': they see nothing of our copies, nor we of theirs."""
    mm, options, rng = ground.mm, through(mechanism), random.Random(3)
    theirs = THEIRS * N_BYTES

    def give() -> None:
        n_bytes = PAGE * rng.choice((1, 16, 512))
        addr = START + rng.randrange(0, N_BYTES - n_bytes + 1, PAGE)
        kind = rng.randrange(3)
        if kind == 0:
            mm.munmap(addr, n_bytes)
        elif kind == 1:
            mm.madvise(addr, n_bytes, MADV_DONTNEED)
        else:
            mm.munmap(START, N_BYTES)
        with contextlib.suppress(ArenaExhaustedError):
            ground.map(OTHERS, n_bytes)
            # Zeros at first, whoever had the frame; then what we write, and nothing else.
            assert not mm.read(OTHERS, n_bytes).strip(b"\0"), "others' memory is not empty"
            mm.copy_out(OTHERS, theirs[:n_bytes])
            if rng.random() < 0.3:
                time.sleep(0.001)
            assert mm.read(OTHERS, n_bytes) == theirs[:n_bytes], "others' memory was written"
            mm.munmap(OTHERS, n_bytes)
        ground.map(START, N_BYTES)

    bodies = writer(ground, options), reader(ground, options), writer(ground, options)
    with Threads(*bodies) as threads:
        assert for_a_while(give, threads)
    assert min(threads.n_rounds) > 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_is_write_protected_does_not_change(ground: Ground, mechanism: str):
    """From the moment that mprotect returns."""
    mm, options = ground.mm, through(mechanism)

    def protect() -> None:
        mm.mprotect(START, N_BYTES, READ)
        first = mm.read(START, N_BYTES)
        time.sleep(0.002)
        assert mm.read(START, N_BYTES) == first
        mm.mprotect(START, N_BYTES, READ_WRITE)
        time.sleep(0.001)

    with Threads(writer(ground, options), writer(ground, options)) as threads:
        assert for_a_while(protect, threads)
    assert min(threads.n_rounds) > 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_fork_under_copies(ground: Ground, mechanism: str):
    """Neither sees the other's writes: the child's memory is what it was at some moment."""
    mm, options = ground.mm, through(mechanism)

    def fork() -> None:
        with contextlib.suppress(ArenaExhaustedError):
            child = ground.fork()
            try:
                first = child.read(START, N_BYTES)
                assert not first.strip(OURS + b"\0")
                time.sleep(0.002)
                assert child.read(START, N_BYTES) == first, "the parent's copies reach its child"
                child.copy_out(START, THEIRS * N_BYTES, **options)
                time.sleep(0.001)
                assert THEIRS not in mm.read(START, N_BYTES), "the child's copies reach its parent"
                assert child.read(START, N_BYTES) == THEIRS * N_BYTES
            finally:
                child.close()

    bodies = writer(ground, options), reader(ground, options)
    with Threads(*bodies) as threads:
        assert for_a_while(fork, threads)
    assert min(threads.n_rounds) > 0


def test_all_at_once_and_all_mechanisms(ground: Ground):
    """Nothing is lost in a crowd: the fixture looks at the end."""
    mm, rng = ground.mm, random.Random(4)

    def change() -> None:
        addr = START + PAGE * rng.randrange(N_BYTES // PAGE - 16)
        kind = rng.randrange(5)
        if kind == 0:
            mm.munmap(addr, 16 * PAGE)
        elif kind == 1:
            ground.map(addr, 16 * PAGE, rng.choice((READ, READ_WRITE)))
        elif kind == 2:
            mm.mprotect(START, N_BYTES // 2, READ_WRITE)
        elif kind == 3:
            mm.madvise(addr, 16 * PAGE, MADV_DONTNEED)
        else:
            with contextlib.suppress(ArenaExhaustedError):
                ground.fork().close()
        if rng.random() < 0.2:
            ground.map(START, N_BYTES)

    def step() -> None:
        with contextlib.suppress(OSError):  # a range with a hole cannot be protected
            change()

    words = random.Random(5)

    def swap() -> None:
        addr = START + 4 * words.randrange(N_BYTES // 4)
        mm.swap_uint32(addr, int.from_bytes(OURS * 4, "little"))
        found = mm.compare_and_swap_uint32(addr, 0, 0)
        assert found in {0, int.from_bytes(OURS * 4, "little")}

    def batch() -> None:
        mm.copy_out_many([(START + PAGE * words.randrange(512), OURS * 70_000) for _ in range(4)])

    bodies = [writer(ground, through(mechanism)) for mechanism in MECHANISMS]
    with Threads(*bodies, reader(ground, {}), swap, batch) as threads:
        assert for_a_while(step, threads, 2.0)


def test_a_copy_ends_although_its_pages_are_taken_again_and_again(ground: Ground):
    """It is served, or says that it makes no progress; it does not go on for ever."""
    mm = ground.mm

    def take() -> None:
        mm.madvise(START, N_BYTES, MADV_DONTNEED)

    with Threads(take, take):
        for mechanism in MECHANISMS:
            for _ in range(20):
                with contextlib.suppress(NoProgressError):
                    assert mm.copy_out(START, OURS * N_BYTES, **through(mechanism)) == N_BYTES
                with contextlib.suppress(NoProgressError):
                    assert len(mm.read(START, N_BYTES, **through(mechanism))) == N_BYTES


def test_closed_under_copies():
    """Who closes waits for copies in flight; later ones find nothing."""
    for mechanism in MECHANISMS:
        with Ground() as ground:
            options = through(mechanism)
            with Threads(writer(ground, options), reader(ground, options)):
                time.sleep(0.05)
                ground.mm.close()
                ground.mm.close()
                time.sleep(0.01)
                with pytest.raises(GuestFaultError):
                    ground.mm.read(START, 1)
            ground.map(START, N_BYTES)
