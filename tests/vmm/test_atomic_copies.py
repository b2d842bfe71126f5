"""Words that host and guest change at once: no update is lost, by any mechanism.

The guest is guest/user/atomic: in ring 3 it adds with `lock xadd` and `lock cmpxchg`, and gives
tokens for tokens with `xchg`, while this process does the same from another thread. Neither side
gets further ahead of the other than SLACK operations: so they overlap, however fast either is.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest

from kvmmm.errors import GuestAlignmentError, GuestFaultError
from kvmmm.hostarch.access import READ, READ_WRITE
from kvmmm.safemem.ffi import IOOpts
from kvmmm.vmm import bundled
from kvmmm.vmm.user_vm import UserVM
from tests.vmm.guest_run import TIMEOUT, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmmm.mm import MemoryManager
    from kvmmm.vmm.result import RunResult

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(200)]

N = 1_000_000
SLACK = 256
MASK = (1 << 32) - 1
AT = 0x2000_0000
PAGE = 4096
# struct shared of the guest
COUNTER, TOKEN, HOST_IS_DONE, GUEST_IS_DONE = AT, AT + 64, AT + 128, AT + 192
MECHANISMS = [
    pytest.param("internal", marks=pytest.mark.npt),
    pytest.param("walk", marks=pytest.mark.npt),
    "mirror",
]


@pytest.fixture(params=MECHANISMS)
def opts(request: pytest.FixtureRequest) -> IOOpts:
    """One for each mechanism."""
    return IOOpts(mechanism=request.param)


class Duel:
    """The guest's run, on a thread, and the host's half of it."""

    def __init__(self, vm: UserVM, opts: IOOpts, n: int) -> None:
        self.mm = vm.mm
        self.opts = opts
        self.n = n
        self.result: RunResult | None = None
        self._vm = vm
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.result = self._vm.run(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            self._vm.stop()
        self._thread.join(2 * TIMEOUT)
        assert not self._thread.is_alive()

    def wait_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            assert self._thread.is_alive() or not condition(), self.result and describe(self.result)
            time.sleep(0)

    def count(self) -> tuple[int, int]:
        """Add 1 `n` times; how often the guest had added, and was first."""
        cas, opts, n = self.mm.compare_and_swap_uint32, self.opts, self.n
        seen = self.mm.load_uint32(COUNTER, opts=opts)
        theirs = n_seen = n_races = 0
        for own in range(n):
            if own > theirs + SLACK:
                least = own - SLACK
                self.wait_while(lambda: self._theirs(own) < least)  # noqa: B023 - called here
            while (found := cas(COUNTER, seen, (seen + 1) & MASK, opts=opts)) != seen:
                seen = found
                n_races += 1
            now = (seen - own + n) & MASK
            assert now >= theirs
            n_seen += now != theirs
            theirs = now
            seen = (seen + 1) & MASK
        return n_seen, n_races

    def _theirs(self, own: int) -> int:
        return (self.mm.load_uint32(COUNTER, opts=self.opts) - own + self.n) & MASK

    def exchange(self) -> tuple[list[int], list[int]]:
        """Swap `n` tokens in; what was given, what was taken."""
        swap, opts = self.mm.swap_uint32, self.opts
        given = [2 * i + 2 for i in range(self.n)]
        taken = []
        n_alone = 0
        for token in given:
            if n_alone >= SLACK:
                self.wait_while(self._is_alone)
            found = swap(TOKEN, token, opts=opts)
            taken.append(found)
            n_alone = 0 if found & 1 else n_alone + 1
        self.mm.swap_uint32(HOST_IS_DONE, 1, opts=opts)
        return given, taken

    def _is_alone(self) -> bool:
        load, opts = self.mm.load_uint32, self.opts
        return not load(TOKEN, opts=opts) & 1 and not load(GUEST_IS_DONE, opts=opts)


def numbers_after(name: str, result: RunResult) -> dict[str, list[int]]:
    """The guest's line `atomic: name ...`: numbers by the word before them."""
    line = re.search(rf"^atomic: ({name}.*)$", result.console.decode(), re.MULTILINE)
    assert line, describe(result)
    words = re.findall(r"([a-z]+)((?: \d+)+)", line[1])
    return {word: [int(number) for number in numbers.split()] for word, numbers in words}


def test_no_update_is_lost(opts: IOOpts, scaled: Callable[[int], int]):
    n = scaled(N)
    with UserVM() as vm:
        argv = ["atomic", f"n={n}", f"at={AT}", f"slack={SLACK}"]
        vm.load(bundled.find("user_atomic").path, argv=argv)
        vm.mm.mmap(PAGE, addr=AT, fixed=True, private=False)
        vm.mm.swap_uint32(COUNTER, -n & MASK, opts=opts)
        with Duel(vm, opts, n) as duel:
            n_seen, n_races = duel.count()
            given, taken = duel.exchange()
        counter, last = (vm.mm.load_uint32(addr, opts=opts) for addr in (COUNTER, TOKEN))
    result = duel.result
    assert result is not None
    assert (result.outcome, result.status) == ("exited", 0), describe(result)
    assert "FAIL" not in result.console.decode(), describe(result)
    # Sums are exact.
    assert counter == n
    theirs = numbers_after("exchanged", result)
    for power, n_given, n_taken in zip((1, 2), theirs["given"], theirs["taken"], strict=True):
        before = sum(token**power for token in given) + n_given
        after = sum(token**power for token in taken) + n_taken + last**power
        assert (before - after) % (1 << 64) == 0
    # Each took the other's tokens, none twice and none that was not given.
    from_guest = [token for token in taken if token & 1]
    assert from_guest == sorted(set(from_guest))
    assert all(token <= 2 * n for token in from_guest)
    # They were at it together: one does 2 * SLACK operations at most between two of the other's;
    # before the first and after the last there may be none of them.
    least = max(n // SLACK // 2 - 2, 1)
    assert n_races >= n_seen >= least
    assert numbers_after("counted", result)["seen"][0] >= least
    assert len(from_guest) >= least
    assert theirs["seen"][0] >= least


@pytest.fixture
def vm() -> Iterator[UserVM]:
    """A VM with a page at AT, which is read and write."""
    with UserVM() as vm:
        vm.load(bundled.find("user_atomic").path)
        vm.mm.mmap(PAGE, addr=AT, fixed=True)
        yield vm


def word(mm: MemoryManager, addr: int = AT) -> int:
    return int(struct.unpack("<I", mm.read(addr, 4))[0])


def frame(mm: MemoryManager, addr: int = AT) -> int | None:
    """Offset in the arena of what backs an address."""
    found = mm.pmas.find(addr)
    return None if found is None else addr + found[2].delta


class TestAnswers:
    def test_all_three(self, vm: UserVM, opts: IOOpts):
        mm = vm.mm
        assert mm.load_uint32(AT + 8, opts=opts) == 0
        assert mm.swap_uint32(AT + 8, 0xFFFF_FFFE, opts=opts) == 0
        assert mm.load_uint32(AT + 8, opts=opts) == 0xFFFF_FFFE
        assert mm.compare_and_swap_uint32(AT + 8, 0xFFFF_FFFE, 5, opts=opts) == 0xFFFF_FFFE
        assert mm.compare_and_swap_uint32(AT + 8, 0xFFFF_FFFE, 6, opts=opts) == 5
        assert mm.load_uint32(AT + 8, opts=opts) == 5
        assert mm.read(AT, 16) == struct.pack("<4I", 0, 0, 5, 0)

    @pytest.mark.parametrize("value", [-1, 1 << 32])
    def test_a_word_has_32_bits(self, vm: UserVM, opts: IOOpts, value: int):
        with pytest.raises(OverflowError):
            vm.mm.swap_uint32(AT, value, opts=opts)
        assert frame(vm.mm) is None


class TestCopyOnWrite:
    def _fork(self, vm: UserVM) -> Any:
        return vm.mm.fork(vm._new_space())

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("operation", ["fails", "succeeds", "swaps"])
    def test_a_write_has_its_own_frame(self, vm: UserVM, opts: IOOpts, which: int, operation: str):
        vm.mm.swap_uint32(AT, 7, opts=opts)
        child = self._fork(vm)
        try:
            mms = [vm.mm, child]
            mine, other = mms[which], mms[1 - which]
            shared = frame(other)
            assert frame(mine) == shared
            if operation == "fails":
                assert mine.compare_and_swap_uint32(AT, 8, 9, opts=opts) == 7
                expected = 7
            elif operation == "succeeds":
                assert mine.compare_and_swap_uint32(AT, 7, 9, opts=opts) == 7
                expected = 9
            else:
                assert mine.swap_uint32(AT, 9, opts=opts) == 7
                expected = 9
            assert frame(mine) != shared
            assert frame(other) == shared
            assert (word(mine), word(other)) == (expected, 7)
            # From now on it is nobody else's.
            assert mine.swap_uint32(AT, 1, opts=opts) == expected
            assert (word(mine), word(other)) == (1, 7)
        finally:
            child.close()
            child.address_space.release()

    def test_a_load_breaks_nothing(self, vm: UserVM, opts: IOOpts):
        vm.mm.swap_uint32(AT, 7, opts=opts)
        child = self._fork(vm)
        try:
            for mm in (vm.mm, child):
                assert mm.load_uint32(AT, opts=opts) == 7
            assert frame(child) == frame(vm.mm)
        finally:
            child.close()
            child.address_space.release()


class TestRefused:
    @pytest.mark.parametrize("addr", [AT + 1, AT + 2, AT + 3, AT + PAGE - 2, AT + PAGE - 1])
    def test_misaligned(self, vm: UserVM, opts: IOOpts, addr: int):
        mm = vm.mm
        mm.mmap(PAGE, addr=AT + PAGE, fixed=True)
        mm.copy_out(AT + PAGE - 8, b"\x55" * 16)
        before = mm.read(AT, 2 * PAGE)
        for operation in (
            lambda: mm.swap_uint32(addr, 1, opts=opts),
            lambda: mm.compare_and_swap_uint32(addr, 0, 1, opts=opts),
            lambda: mm.load_uint32(addr, opts=opts),
        ):
            with pytest.raises(GuestAlignmentError) as e:
                operation()
            assert (e.value.addr, e.value.done) == (addr, 0)
        assert mm.read(AT, 2 * PAGE) == before

    @pytest.mark.parametrize("is_backed", [False, True])
    def test_a_page_that_may_only_be_read(self, vm: UserVM, opts: IOOpts, is_backed: bool):
        mm = vm.mm
        if is_backed:
            mm.swap_uint32(AT, 7, opts=opts)
        mm.mprotect(AT, PAGE, READ)
        for operation in (
            lambda: mm.swap_uint32(AT, 1, opts=opts),
            lambda: mm.compare_and_swap_uint32(AT, 7, 1, opts=opts),
            lambda: mm.compare_and_swap_uint32(AT, 6, 1, opts=opts),
        ):
            with pytest.raises(GuestFaultError) as e:
                operation()
            assert (e.value.addr, e.value.done, e.value.mapped) == (AT, 0, True)
        assert mm.load_uint32(AT, opts=opts) == (7 if is_backed else 0)
        mm.mprotect(AT, PAGE, READ_WRITE)
        assert mm.swap_uint32(AT, 1, opts=opts) == (7 if is_backed else 0)

    def test_a_page_that_nobody_may_touch(self, vm: UserVM, opts: IOOpts):
        vm.mm.swap_uint32(AT, 7, opts=opts)
        vm.mm.mprotect(AT, PAGE, 0)
        with pytest.raises(GuestFaultError):
            vm.mm.load_uint32(AT, opts=opts)

    @pytest.mark.parametrize("addr", [AT + PAGE, 0])
    def test_nothing_is_there(self, vm: UserVM, opts: IOOpts, addr: int):
        with pytest.raises(GuestFaultError) as e:
            vm.mm.load_uint32(addr, opts=opts)
        assert (e.value.addr, e.value.mapped) == (addr, False)

    def test_beyond_the_end(self, vm: UserVM, opts: IOOpts):
        end = vm.mm.max_addr
        for addr in (end - 2, end, end + 4, (1 << 64) - 4):
            with pytest.raises(GuestFaultError) as e:
                vm.mm.swap_uint32(addr, 1, opts=opts)
            assert e.value.addr == max(addr, end)
