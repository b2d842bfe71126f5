"""mmap and map_stack: every reason to refuse, in its order, and what a mapping brings about."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.access import ANY_ACCESS, NO_ACCESS, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.memmap.shared_memory import SharedMemory
from kvmmm.mm.layout import UNLIMITED, Layout
from kvmmm.mm.vma import LOCK_EAGER, LOCK_LAZY
from tests.mm.conftest import HUGE, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
MAX = 256 << 20
TOP = 1 << 64
MAPPABLE: Any = object()  # stands for a recorder


# (what is asked for, errno). What else is wrong with it comes later in the order of checks.
REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"length_bytes": 0, "addr": 1, "fixed": True, "max_perms": 0}, errno.EINVAL),
    ({"length_bytes": -1}, errno.EINVAL),
    ({"length_bytes": PAGE, "perms": 8}, errno.EINVAL),
    ({"length_bytes": TOP - 4095, "mappable": MAPPABLE, "offset": 1}, errno.ENOMEM),
    ({"length_bytes": TOP - 4096}, errno.ENOMEM),  # fits into 64 bits, not into the space
    ({"length_bytes": PAGE, "mappable": MAPPABLE, "offset": 1, "max_perms": 0}, errno.EINVAL),
    ({"length_bytes": PAGE, "mappable": MAPPABLE, "offset": -PAGE}, errno.EINVAL),
    (
        {"length_bytes": PAGE, "mappable": MAPPABLE, "offset": TOP - PAGE, "max_perms": 0},
        errno.EOVERFLOW,
    ),
    ({"length_bytes": PAGE, "addr": 0x1001, "fixed": True, "max_perms": 0}, errno.EINVAL),
    ({"length_bytes": PAGE, "max_perms": READ, "replace": True}, errno.EACCES),
    ({"length_bytes": PAGE, "replace": True, "no_replace": True}, errno.EINVAL),
    ({"length_bytes": PAGE, "no_replace": True}, errno.EINVAL),
    (
        {"length_bytes": PAGE, "fixed": True, "replace": True, "no_replace": True},
        errno.EINVAL,
    ),
    ({"length_bytes": PAGE, "grows_down": True, "mappable": MAPPABLE}, errno.EINVAL),
    ({"length_bytes": PAGE, "grows_down": True, "private": False}, errno.EINVAL),
    # Placement.
    ({"length_bytes": PAGE, "addr": 0x3000, "fixed": True}, errno.ENOMEM),
    ({"length_bytes": PAGE, "addr": 0x3000, "fixed": True, "no_replace": True}, errno.EEXIST),
    ({"length_bytes": PAGE, "addr": MAX, "fixed": True, "no_replace": True}, errno.ENOMEM),
    ({"length_bytes": PAGE, "addr": MAX, "fixed": True, "replace": True}, errno.ENOMEM),
    ({"length_bytes": PAGE, "addr": TOP - PAGE, "fixed": True, "replace": True}, errno.ENOMEM),
    ({"length_bytes": MAX}, errno.ENOMEM),
    ({"length_bytes": PAGE, "low_32bit": True}, errno.ENOMEM),  # no such addresses here
]


@pytest.mark.parametrize(("wanted", "err"), REFUSED)
def test_refused(make: Make, wanted: dict[str, Any], err: int):
    setup = make()
    setup.map(0x3000, 0x5000)
    setup.space.store(0x3000, b"kept")
    wanted = dict(wanted)
    recorder = Recorder(setup.arena, 4 * PAGE)
    if wanted.get("mappable") is MAPPABLE:
        wanted["mappable"] = recorder
    setup.refuses(lambda: setup.mm.mmap(**wanted), err, "mmap")
    assert not recorder.calls


class TestWhere:
    def test_an_unaligned_hint_is_rounded_down(self, make: Make):
        setup = make()
        assert setup.mm.mmap(PAGE, addr=0x12345).start == 0x12000

    def test_length_is_rounded_up(self, make: Make):
        ar = make().mm.mmap(PAGE + 1)
        assert ar.length_bytes == 2 * PAGE

    def test_fixed_replaces(self, make: Make):
        setup = make()
        setup.map(0, 4 * PAGE, READ_WRITE, "old")
        setup.space.store(PAGE, b"old bytes")
        setup.map(PAGE, 2 * PAGE, READ, "new")
        assert setup.space.load(PAGE, 9) == bytes(9)
        assert [(s, e, v.name) for s, e, v in setup.mm.vmas] == [
            (0, PAGE, "old"), (PAGE, 2 * PAGE, "new"), (2 * PAGE, 4 * PAGE, "old"),
        ]  # fmt: skip

    def test_adjacent_mappings_that_are_alike_are_one(self, make: Make):
        setup = make()
        setup.map(0, PAGE, READ, "a")
        setup.map(2 * PAGE, 3 * PAGE, READ, "a")
        setup.map(PAGE, 2 * PAGE, READ, "a")
        setup.map(3 * PAGE, 4 * PAGE, READ, "b")
        assert setup.vmas() == [(0, 3 * PAGE), (3 * PAGE, 4 * PAGE)]

    def test_generation_grows(self, make: Make):
        setup = make()
        seen = [setup.mm.generation]
        for call in (
            lambda: setup.map(0, HUGE),
            lambda: setup.mm.mprotect(0, PAGE, READ),
            lambda: setup.mm.munmap(0, PAGE),
            lambda: setup.mm.mremap(PAGE, PAGE, PAGE, new_addr=4 * HUGE),
        ):
            call()
            seen.append(setup.mm.generation)
        assert sorted(set(seen)) == seen


class TestMappable:
    def test_offsets_writability_and_names(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        setup.map(0x10000, 0x14000, READ, mappable=memory, offset=8 * PAGE, private=False)
        setup.map(0x20000, 0x21000, READ, mappable=memory, private=False, max_perms=READ_EXECUTE)
        setup.map(0x30000, 0x31000, READ_WRITE, "mine", mappable=memory)
        assert memory.calls == [
            ("add", 0x10000, 0x14000, 8 * PAGE, True),
            ("add", 0x20000, 0x21000, 0, False),
            ("add", 0x30000, 0x31000, 0, False),
        ]
        assert [v.name for _, _, v in setup.mm.vmas] == ["recorder", "recorder", "mine"]

    def test_neighbours_merge_where_offsets_do(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        setup.map(0x10000, 0x12000, mappable=memory, offset=4 * PAGE)
        setup.map(0x12000, 0x13000, mappable=memory, offset=6 * PAGE)
        setup.map(0x13000, 0x14000, mappable=memory, offset=8 * PAGE)
        setup.map(0xF000, 0x10000, mappable=memory, offset=3 * PAGE)
        assert setup.vmas() == [(0xF000, 0x13000), (0x13000, 0x14000)]
        setup.mm.munmap(0x11000, PAGE)
        assert memory.calls[-1] == ("remove", 0x11000, 0x12000, 5 * PAGE, False)

    def test_removed_after_its_pmas_are_gone(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, 64 * PAGE)
        setup.map(0, 4 * PAGE, mappable=memory, private=False)
        setup.space.store(0, b"x")
        backed = []
        memory.before = lambda _what: backed.append(setup.mm.pmas.find(PAGE))
        setup.mm.munmap(PAGE, 2 * PAGE)
        assert backed == [None]
        assert memory.calls[1:] == [("remove", PAGE, 3 * PAGE, PAGE, True)]

    def test_its_refusal_comes_out_and_what_was_there_is_gone(self, make: Make):
        setup = make()
        setup.map(0, 4 * PAGE)
        memory = Recorder(setup.arena, PAGE)
        memory.refuse = PermissionError(errno.EACCES, "no")
        with pytest.raises(PermissionError, match="no"):
            setup.map(0, PAGE, mappable=memory)
        assert setup.vmas() == [(PAGE, 4 * PAGE)]
        setup.check()

    def test_a_read_only_one(self, make: Make):
        setup = make()
        memory = Recorder(setup.arena, PAGE)
        memory.max_shared_perms = READ_EXECUTE
        setup.refuses(
            lambda: setup.mm.mmap(PAGE, READ_WRITE, mappable=memory, private=False), errno.EACCES
        )
        ar = setup.mm.mmap(PAGE, READ, mappable=memory, private=False)
        setup.refuses(lambda: setup.mm.mprotect(ar.start, PAGE, WRITE), errno.EACCES)
        setup.mm.mmap(PAGE, READ_WRITE, mappable=memory)
        assert [c[-1] for c in memory.calls] == [False, False]


class TestSharedAnonymous:
    def test_it_is_shared_memory_and_zero(self, make: Make):
        setup = make()
        ar = setup.mm.mmap(2 * PAGE, private=False)
        vma = setup.mm.vmas.find_value(ar.start)
        assert isinstance(vma.mappable, SharedMemory)
        assert not vma.private
        assert setup.space.load(ar.start, 8) == bytes(8)
        setup.space.store(ar.start + PAGE, b"shared")
        assert setup.mm.read(ar.start + PAGE, 6) == b"shared"

    def test_two_are_two(self, make: Make):
        setup = make()
        a = setup.mm.mmap(PAGE, private=False)
        b = setup.mm.mmap(PAGE, addr=a.end, private=False)
        assert b.start == a.end
        assert len(setup.mm.vmas) == 2
        setup.space.store(a.start, b"a")
        assert setup.space.load(b.start, 1) == b"\0"


class TestAtOnce:
    """What is mapped before anybody touches it."""

    @pytest.mark.parametrize("how", [{}, {"lock_mode": LOCK_LAZY}])
    def test_nothing_by_default(self, make: Make, how: dict[str, Any]):
        setup = make()
        setup.mm.mmap(PAGE, **how)
        assert not setup.mm.pmas

    @pytest.mark.parametrize(
        "how", [{"populate": True}, {"require_populate": True}, {"lock_mode": LOCK_EAGER}]
    )
    def test_populate(self, make: Make, how: dict[str, Any]):
        setup = make()
        ar = setup.mm.mmap(3 * PAGE, **how)
        assert sorted(setup.space.pages) == [ar.start, ar.start + PAGE, ar.start + 2 * PAGE]

    @pytest.mark.parametrize("length", [HUGE, HUGE + PAGE])
    def test_small_anonymous_mappings_if_wanted(self, make: Make, length: int):
        setup = make(eager_bytes=HUGE)
        setup.mm.mmap(length)
        assert bool(setup.mm.pmas) == (length == HUGE)
        setup.mm.mmap(PAGE, mappable=Recorder(setup.arena, PAGE))
        assert setup.mm.rss_bytes == (HUGE if length == HUGE else 0)

    def test_no_permissions_no_population(self, make: Make):
        setup = make()
        setup.mm.mmap(PAGE, NO_ACCESS, populate=True)
        assert not setup.mm.pmas

    def test_what_cannot_be_had_comes_by_faults(self, make: Make):
        setup = make(HUGE)
        ar = setup.mm.mmap(2 * HUGE, populate=True)
        assert setup.vmas() == [(ar.start, ar.end)]

    def test_unless_it_is_required(self, make: Make):
        setup = make(HUGE)
        with pytest.raises(ArenaExhaustedError):
            setup.mm.mmap(2 * HUGE, require_populate=True)
        assert not setup.vmas()
        assert not setup.space.pages
        setup.check()


class TestStack:
    def test_at_the_top_of_the_layout(self, make: Make):
        setup = make()
        ar = setup.mm.map_stack()
        assert (ar.start, ar.end) == (MAX - (8 << 20), MAX)
        vma = setup.mm.vmas.find_value(ar.start)
        assert (vma.name, vma.perms, vma.max_perms) == ("[stack]", READ_WRITE, ANY_ACCESS)
        assert vma.grows_down
        assert vma.is_stack
        assert not setup.mm.data_bytes

    @pytest.mark.parametrize(
        ("limit", "length"),
        [(1, PAGE), (64 << 10, 64 << 10), (UNLIMITED, 8 << 20), (200 << 20, 128 << 20)],
    )
    def test_its_size(self, make: Make, limit: int, length: int):
        setup = make()
        setup.mm.limits.stack_bytes = limit
        assert setup.mm.map_stack().length_bytes == length

    def test_without_any(self, make: Make):
        setup = make()
        setup.mm.limits.stack_bytes = 0
        setup.refuses(setup.mm.map_stack, errno.ENOMEM)

    def test_more_than_there_is(self, make: Make):
        setup = make(layout=Layout(0, 4 << 20))
        setup.refuses(setup.mm.map_stack, errno.ENOMEM)

    def test_elsewhere_if_something_is_there(self, make: Make):
        setup = make()
        setup.map(MAX - PAGE, MAX)
        ar = setup.mm.map_stack()
        assert ar.end <= MAX - PAGE
        assert ar.length_bytes == 8 << 20
