"""Every errno that an operation of the memory manager can say, provoked; and which comes first.

The files of the single operations say more of each: what has changed by then, and where exactly.
Here stand all of them side by side, in the order in which they are checked.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import MmError
from kvmmm.hostarch.access import NO_ACCESS, READ, READ_WRITE
from kvmmm.mm import advice
from kvmmm.mm.layout import Layout
from kvmmm.mm.vma import LOCK_EAGER
from tests.fakes import FakeFile, FakeMappable
from tests.mm.conftest import Recorder
from tests.mm.hoard import Hoard

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]
    Call = Callable[[Setup], object]

PAGE = 4096
TOP = 1 << 64
MAX = 64 << 20
AT = 0x10000  # 8 pages of memory, named "a"
READABLE = 0x20000  # 4 pages of a mappable that may only be read, shared
STACK = 0x80_0000  # 4 pages that grow down
HEAP = 0x100_0000
FREE = 0x200_0000
INVALID, NO_MEMORY, FAULT = errno.EINVAL, errno.ENOMEM, errno.EFAULT


@pytest.fixture
def setup(make: Make) -> Setup:
    setup = make(max_addr=MAX, layout=Layout(AT, MAX))
    setup.map(AT, AT + 8 * PAGE, name="a")
    setup.space.store(AT, b"kept")
    file = Recorder(setup.arena, 64 * PAGE)
    file.max_shared_perms = READ
    setup.map(READABLE, READABLE + 4 * PAGE, READ, mappable=file, private=False)
    setup.mm.mmap(4 * PAGE, addr=STACK, fixed=True, grows_down=True)
    setup.mm.set_brk(HEAP)
    return setup


def file_of(setup: Setup) -> Recorder:
    found = setup.mm.vmas.find(READABLE)
    assert found is not None
    assert isinstance(found[2].mappable, Recorder)
    return found[2].mappable


def limit(setup: Setup, **limits: int) -> None:
    for name, value in limits.items():
        setattr(setup.mm.limits, f"{name}_bytes", value)


def with_limit(call: Call, **limits: int) -> Call:
    def limited(setup: Setup) -> object:
        limit(setup, **limits)
        return call(setup)

    return limited


def mmap(**wanted: Any) -> Call:
    # `file` stands for the mappable.
    def call(setup: Setup) -> object:
        more = {"length_bytes": PAGE, **wanted}
        if more.pop("file", False):
            more["mappable"] = file_of(setup)
        return setup.mm.mmap(**more)

    return call


def map_stack(setup: Setup) -> object:
    return setup.mm.map_stack()


def refused_by_the_mappable(setup: Setup) -> object:
    file_of(setup).refuse = MmError(errno.ENODEV, "file", 0, "it says no")
    return setup.mm.mmap(PAGE, READ, mappable=file_of(setup))


def munmap(addr: int, length: int) -> Call:
    return lambda setup: setup.mm.munmap(addr, length)


def mprotect(addr: int, length: int, perms: int, **how: bool) -> Call:
    return lambda setup: setup.mm.mprotect(addr, length, perms, **how)


def mremap(addr: int, old: int, new: int, **how: Any) -> Call:
    return lambda setup: setup.mm.mremap(addr, old, new, **how)


def after_mlock(call: Call, addr: int = AT, length: int = 8 * PAGE, **limits: int) -> Call:
    def locked(setup: Setup) -> object:
        setup.mm.mlock(addr, length)
        limit(setup, **limits)
        return call(setup)

    return locked


def brk(addr: int, **limits: int) -> Call:
    def call(setup: Setup) -> object:
        from kvmmm.mm.heap import move_brk

        limit(setup, **limits)
        return move_brk(setup.mm, addr)

    return call


def brk_locked(setup: Setup) -> object:
    setup.mm.mlockall(future=True)
    limit(setup, locked=0)
    return brk(HEAP + 1)(setup)


def mlock(addr: int, length: int, **limits: int) -> Call:
    return with_limit(lambda setup: setup.mm.mlock(addr, length), **limits)


def mlock_of_nobodys(setup: Setup) -> object:
    setup.mm.mprotect(AT + PAGE, PAGE, NO_ACCESS)
    return setup.mm.mlock(AT, 2 * PAGE)


def mlock_behind_the_end(setup: Setup) -> object:
    file = Recorder(setup.arena, PAGE)
    setup.map(FREE, FREE + 2 * PAGE, mappable=file, private=False)
    return setup.mm.mlock(FREE, 2 * PAGE)


def mlock_without_memory(setup: Setup) -> object:
    with Hoard(setup.arena) as hoard:
        hoard.take_all()
        return setup.mm.mlock(STACK, PAGE)


def madvise(addr: int, length: int, what: int) -> Call:
    return lambda setup: setup.mm.madvise(addr, length, what)


def mincore(addr: int, length: int) -> Call:
    return lambda setup: setup.mm.mincore(addr, length)


def msync(addr: int, length: int, **how: bool) -> Call:
    return lambda setup: setup.mm.msync(addr, length, **how)


def named(addr: int, length: int, name: str) -> Call:
    return lambda setup: setup.mm.set_anon_name(addr, length, name)


def named_file(setup: Setup) -> object:
    setup.map(FREE, FREE + PAGE, READ, mappable=FakeMappable(FakeFile(PAGE)))
    return setup.mm.set_anon_name(FREE, PAGE, "fine")


# (operation, what is wrong, what is said, how).
CASES: list[tuple[str, str, int, Call]] = [
    ("mmap", "length 0", INVALID, mmap(length_bytes=0)),
    ("mmap", "length that wraps when rounded", NO_MEMORY, mmap(length_bytes=TOP - 1)),
    ("mmap", "offset unaligned", INVALID, mmap(file=True, offset=1)),
    ("mmap", "offset and length wrap", errno.EOVERFLOW, mmap(file=True, offset=TOP - PAGE)),
    ("mmap", "fixed address unaligned", INVALID, mmap(addr=FREE + 1, fixed=True)),
    ("mmap", "more than the maximum", errno.EACCES, mmap(max_perms=READ)),
    ("mmap", "more than the file gives", errno.EACCES, mmap(file=True, private=False)),
    ("mmap", "replace, not fixed", INVALID, mmap(replace=True)),
    ("mmap", "no_replace, not fixed", INVALID, mmap(addr=FREE, no_replace=True)),
    ("mmap", "no_replace and replace", INVALID,
     mmap(addr=FREE, fixed=True, replace=True, no_replace=True)),
    ("mmap", "a file that grows down", INVALID, mmap(file=True, perms=READ, grows_down=True)),
    ("mmap", "something there", errno.EEXIST, mmap(addr=AT, fixed=True, no_replace=True)),
    ("mmap", "fixed, something there", NO_MEMORY, mmap(addr=AT, fixed=True)),
    ("mmap", "fixed, in a guard", NO_MEMORY, mmap(addr=STACK - PAGE, fixed=True)),
    ("mmap", "fixed, below the space", NO_MEMORY, mmap(addr=AT - PAGE, fixed=True, replace=True)),
    ("mmap", "fixed, above the space", NO_MEMORY, mmap(addr=MAX, fixed=True, no_replace=True)),
    ("mmap", "no room", NO_MEMORY, mmap(length_bytes=MAX)),
    ("mmap", "no room below 2 GiB", NO_MEMORY, mmap(low_32bit=True)),
    ("mmap", "RLIMIT_AS", NO_MEMORY, with_limit(mmap(), address_space=PAGE)),
    ("mmap", "nothing may be locked", errno.EPERM, with_limit(mmap(lock_mode=1), locked=0)),
    ("mmap", "RLIMIT_MEMLOCK", errno.EAGAIN, with_limit(mmap(lock_mode=1), locked=PAGE - 1)),
    ("mmap", "the mappable's own", errno.ENODEV, refused_by_the_mappable),
    ("stack", "RLIMIT_STACK 0", NO_MEMORY, with_limit(map_stack, stack=0)),
    ("munmap", "address unaligned", INVALID, munmap(AT + 1, PAGE)),
    ("munmap", "length 0", INVALID, munmap(AT, 0)),
    ("munmap", "it wraps", INVALID, munmap(AT, TOP - PAGE)),
    ("mprotect", "address unaligned", INVALID, mprotect(AT + 1, PAGE, READ)),
    ("mprotect", "it wraps", NO_MEMORY, mprotect(AT, TOP - PAGE, READ)),
    ("mprotect", "begins with a hole", NO_MEMORY, mprotect(AT - PAGE, 2 * PAGE, READ)),
    ("mprotect", "more than the maximum", errno.EACCES, mprotect(READABLE, PAGE, READ_WRITE)),
    ("mprotect", "nothing grows down", INVALID, mprotect(AT, PAGE, READ, grows_down=True)),
    ("mprotect", "below what grows down", NO_MEMORY,
     mprotect(STACK - 2 * PAGE, PAGE, READ, grows_down=True)),
    ("mremap", "address unaligned", INVALID, mremap(AT + 1, PAGE, PAGE)),
    ("mremap", "to nothing", INVALID, mremap(AT, PAGE, 0)),
    ("mremap", "new length wraps", INVALID, mremap(AT, PAGE, TOP - 1)),
    ("mremap", "old length wraps", INVALID, mremap(AT, TOP - AT, PAGE)),
    ("mremap", "old length below 0", INVALID, mremap(AT, -1, PAGE, may_move=True)),
    ("mremap", "nothing there", FAULT, mremap(FREE, PAGE, PAGE)),
    ("mremap", "RLIMIT_MEMLOCK", errno.EAGAIN,
     after_mlock(mremap(AT, 8 * PAGE, 9 * PAGE), locked=8 * PAGE)),
    ("mremap", "growing beyond one vma", FAULT, mremap(AT, 9 * PAGE, 10 * PAGE)),
    ("mremap", "no room in place", NO_MEMORY, mremap(AT, PAGE, 2 * PAGE)),
    ("mremap", "no room anywhere", NO_MEMORY, mremap(AT, PAGE, MAX, may_move=True)),
    ("mremap", "new address unaligned", INVALID, mremap(AT, PAGE, PAGE, new_addr=FREE + 1)),
    ("mremap", "new range wraps", INVALID, mremap(AT, PAGE, PAGE, new_addr=TOP - PAGE)),
    ("mremap", "overlap", INVALID, mremap(AT, 2 * PAGE, 2 * PAGE, new_addr=AT + PAGE)),
    ("mremap", "outside", NO_MEMORY, mremap(AT, PAGE, PAGE, new_addr=MAX)),
    ("mremap", "moving beyond one vma", FAULT,
     mremap(AT, 9 * PAGE, 9 * PAGE, new_addr=FREE)),
    ("mremap", "RLIMIT_AS, moved", NO_MEMORY,
     with_limit(mremap(AT, PAGE, 2 * PAGE, new_addr=FREE), address_space=16 * PAGE)),
    ("brk", "below its start", INVALID, brk(HEAP - 1)),
    ("brk", "RLIMIT_DATA", NO_MEMORY, brk(HEAP + PAGE, data=PAGE - 1)),
    ("brk", "it wraps", FAULT, brk(TOP - 1)),
    ("brk", "no room", NO_MEMORY, brk(MAX + 1)),
    ("brk", "RLIMIT_AS", NO_MEMORY, brk(HEAP + 1, address_space=PAGE)),
    ("brk", "nothing may be locked", errno.EPERM, brk_locked),
    ("mlock", "it wraps", INVALID, mlock(AT, TOP - PAGE)),
    ("mlock", "nothing may be locked", errno.EPERM, mlock(AT, PAGE, locked=0)),
    ("mlock", "RLIMIT_MEMLOCK", NO_MEMORY, mlock(AT, 2 * PAGE, locked=PAGE)),
    ("mlock", "a hole", NO_MEMORY, mlock(AT, 9 * PAGE)),
    ("mlock", "nobody may touch it", NO_MEMORY, mlock_of_nobodys),
    ("mlock", "its file ends", NO_MEMORY, mlock_behind_the_end),
    ("mlock", "no memory left", errno.EAGAIN, mlock_without_memory),
    ("mlockall", "neither now nor later", INVALID, lambda s: s.mm.mlockall()),
    ("mlockall", "nothing may be locked", errno.EPERM,
     with_limit(lambda s: s.mm.mlockall(current=True), locked=0)),
    ("mlockall", "RLIMIT_MEMLOCK", NO_MEMORY,
     with_limit(lambda s: s.mm.mlockall(current=True), locked=PAGE)),
    ("madvise", "address unaligned", INVALID, madvise(AT + 1, PAGE, advice.MADV_DONTNEED)),
    ("madvise", "it wraps", INVALID, madvise(AT, TOP - PAGE, advice.MADV_DONTNEED)),
    ("madvise", "DONTNEED of locked memory", INVALID,
     after_mlock(madvise(AT, PAGE, advice.MADV_DONTNEED))),
    ("madvise", "DONTNEED over a hole", NO_MEMORY, madvise(AT, 9 * PAGE, advice.MADV_DONTNEED)),
    ("madvise", "DONTFORK over a hole", NO_MEMORY, madvise(AT, 9 * PAGE, advice.MADV_DONTFORK)),
    ("madvise", "REMOVE", errno.ENOSYS, madvise(AT, PAGE, advice.MADV_REMOVE)),
    ("madvise", "HWPOISON", errno.EPERM, madvise(AT, PAGE, advice.MADV_HWPOISON)),
    *[("madvise", f"advice {what}", INVALID, madvise(AT, PAGE, what))
      for what in (
          advice.MADV_FREE, advice.MADV_WIPEONFORK, advice.MADV_COLD, advice.MADV_PAGEOUT,
          advice.MADV_POPULATE_READ, advice.MADV_POPULATE_WRITE, 77,
      )],
    ("mincore", "address unaligned", INVALID, mincore(AT + 1, PAGE)),
    ("mincore", "it wraps", NO_MEMORY, mincore(AT, TOP)),
    ("mincore", "length below 0", NO_MEMORY, mincore(AT, -1)),
    ("mincore", "a hole", NO_MEMORY, mincore(AT, 9 * PAGE)),
    ("msync", "SYNC and ASYNC", INVALID, msync(AT, PAGE, sync=True, async_=True)),
    ("msync", "address unaligned", INVALID, msync(AT + 1, PAGE, sync=True)),
    ("msync", "it wraps", NO_MEMORY, msync(AT, TOP, sync=True)),
    ("msync", "a hole", NO_MEMORY, msync(AT, 9 * PAGE, sync=True)),
    ("msync", "INVALIDATE of locked memory", errno.EBUSY,
     after_mlock(msync(AT, PAGE, invalidate=True))),
    ("prctl", "no name", INVALID, named(AT, PAGE, "[")),
    ("prctl", "address unaligned", INVALID, named(AT + 1, PAGE, "fine")),
    ("prctl", "a file's mapping", errno.EBADF, named_file),
    ("prctl", "a hole", NO_MEMORY, named(AT, 9 * PAGE, "fine")),
]  # fmt: skip

SAID = {
    "mmap": {"EINVAL", "ENOMEM", "EOVERFLOW", "EACCES", "EEXIST", "EPERM", "EAGAIN", "ENODEV"},
    "stack": {"ENOMEM"},
    "munmap": {"EINVAL"},
    "mprotect": {"EINVAL", "ENOMEM", "EACCES"},
    "mremap": {"EINVAL", "EFAULT", "EAGAIN", "ENOMEM"},
    "brk": {"EINVAL", "ENOMEM", "EFAULT", "EPERM"},
    "mlock": {"EINVAL", "EPERM", "ENOMEM", "EAGAIN"},
    "mlockall": {"EINVAL", "EPERM", "ENOMEM"},
    "madvise": {"EINVAL", "ENOMEM", "ENOSYS", "EPERM"},
    "mincore": {"EINVAL", "ENOMEM"},
    "msync": {"EINVAL", "ENOMEM", "EBUSY"},
    "prctl": {"EINVAL", "EBADF", "ENOMEM"},
}
"""What the behaviour specification has each operation say."""


@pytest.mark.parametrize(
    ("operation", "err", "call"),
    [(operation, err, call) for operation, _, err, call in CASES],
    ids=[f"{operation}, {what}" for operation, what, _, _ in CASES],
)
def test_every_errno(setup: Setup, operation: str, err: int, call: Call):
    with pytest.raises(MmError) as caught:
        call(setup)
    assert caught.value.errno == err, caught.value
    assert operation in {caught.value.operation, "stack", "mlockall"} or err == errno.ENODEV
    assert errno.errorcode[err] in str(caught.value)
    setup.check()
    # The memory that is still mapped there is as it was, but for what DONTNEED has forgotten.
    if setup.mm.vmas.find(AT) is not None and operation != "madvise":
        assert setup.mm.read(AT, 4) == b"kept"


def test_none_is_missing():
    found: dict[str, set[str]] = {}
    for operation, _, err, _ in CASES:
        found.setdefault(operation, set()).add(errno.errorcode[err])
    assert found == SAID


# Mistakes of mmap in the order in which they are looked for, and what sets each up.
MISTAKES: list[tuple[str, int, dict[str, Any]]] = [
    ("length", NO_MEMORY, {"length_bytes": TOP - 1}),
    ("offset", INVALID, {"file": True, "offset": 1, "perms": READ}),
    ("offset and length", errno.EOVERFLOW, {"file": True, "offset": TOP - PAGE, "perms": READ}),
    ("address", INVALID, {"addr": AT + 1, "fixed": True}),
    ("permissions", errno.EACCES, {"max_perms": READ, "perms": READ_WRITE}),
    ("no_replace", INVALID, {"no_replace": True}),
    ("growing down", INVALID, {"grows_down": True, "private": False}),
    ("place", NO_MEMORY, {"addr": AT, "fixed": True}),
    ("address space", NO_MEMORY, {"address_space": PAGE}),
    ("locking", errno.EPERM, {"locked": 0, "lock_mode": LOCK_EAGER}),
    ("the mappable", errno.ENODEV, {"refuse": True, "file": True, "perms": READ}),
]
_PAIRS = [
    (first, second)
    for first, second in itertools.combinations(MISTAKES, 2)
    # Those that can be made at once, and whose errnos tell which it was.
    if first[1] != second[1]
    and all(second[2].get(key, value) == value for key, value in first[2].items())
    and not (first[0] == "no_replace" and "fixed" in second[2])
]


@pytest.mark.parametrize(
    ("first", "second"), _PAIRS, ids=[f"{one[0]} before {two[0]}" for one, two in _PAIRS]
)
def test_the_first_mistake_counts(
    setup: Setup, first: tuple[str, int, dict[str, Any]], second: tuple[str, int, dict[str, Any]]
):
    wanted = {**second[2], **first[2]}
    for name in ("address_space", "locked"):
        if name in wanted:
            limit(setup, **{name: wanted.pop(name)})
    if wanted.pop("refuse", False):
        file_of(setup).refuse = MmError(errno.ENODEV, "file", 0, "it says no")
    setup.refuses(lambda: mmap(**wanted)(setup), first[1])


@pytest.mark.parametrize(
    ("err", "call"),
    [
        (FAULT, mremap(FREE, PAGE, 2 * PAGE, new_addr=FREE + 1)),
        (
            errno.EAGAIN,
            after_mlock(mremap(AT, 8 * PAGE, 9 * PAGE, new_addr=FREE + 1), locked=8 * PAGE),
        ),
        (FAULT, with_limit(mremap(AT, 9 * PAGE, 10 * PAGE, new_addr=FREE), address_space=PAGE)),
        (NO_MEMORY, brk(TOP - 1, data=PAGE)),
        (errno.EPERM, mlock(FREE, PAGE, locked=0)),
        (INVALID, mlock(AT, TOP - PAGE, locked=0)),
        (INVALID, madvise(AT + 1, PAGE, advice.MADV_REMOVE)),
    ],
)
def test_the_first_mistake_counts_elsewhere(setup: Setup, err: int, call: Call):
    with pytest.raises(MmError) as caught:
        call(setup)
    assert caught.value.errno == err, caught.value
