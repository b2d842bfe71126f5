"""Processes that fork, write, are written by the host, and end: against bytearrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmmm.arena import Arena
from kvmmm.errors import ArenaExhaustedError, GuestFaultError
from kvmmm.hostarch.access import READ, READ_WRITE
from tests.fakes import FakeFile, FakeMappable
from tests.mm.family import HUGE, PAGE, Family, Process

if TYPE_CHECKING:
    from kvmmm.mm.pin import Pin

START = 8 * HUGE
PRIVATE_PAGES, FILE_PAGES, SHARED_PAGES = 1030, 8, 8
FILE = START + PRIVATE_PAGES * PAGE
SHARED = FILE + FILE_PAGES * PAGE
END = SHARED + SHARED_PAGES * PAGE
# A few neighbourhoods: the first window's beginning, its end, the file, what is shared.
PAGES = st.one_of(
    st.integers(0, 6), st.integers(508, 515), st.integers(PRIVATE_PAGES - 2, END // PAGE)
).map(lambda page: min(page, (END - START) // PAGE - 1))
INDEX = st.integers(0, 3)


class Families(RuleBasedStateMachine):
    """Each process and its pages by number, a bytearray each; those that are shared, once."""

    @initialize(
        walks_frames=st.booleans(), map_unit_pages=st.sampled_from([0, 16]), code=st.booleans()
    )
    def begin(self, walks_frames: bool, map_unit_pages: int, code: bool) -> None:
        self.family = Family(Arena(128 << 20), walks_frames=walks_frames)
        one = self.family.first
        one.space.map_unit_bytes = map_unit_pages * PAGE
        one.map(START, FILE, 7 if code else READ_WRITE)
        self.file = FakeFile(FILE_PAGES * PAGE)
        self.file.bytes[:] = b"f" * len(self.file.bytes)
        mappable = FakeMappable(self.file)
        mappable.reads_around = True
        one.map(FILE, SHARED, mappable=mappable)
        one.map(SHARED, END, private=False)
        self.shared: dict[int, bytearray] = {}
        self.contents: list[tuple[Process, dict[int, bytearray]]] = [(one, {})]
        self.read_only: dict[int, set[int]] = {id(one): set()}
        self.pins: list[tuple[Pin, bytearray, Process]] = []

    def teardown(self) -> None:
        if not hasattr(self, "family"):
            return
        for pin, _, _ in self.pins:
            pin.release()
        with self.family:
            pass

    def page(self, index: int, page: int) -> tuple[Process, bytearray]:
        one, contents = self.contents[index % len(self.contents)]
        if START + page * PAGE >= SHARED:
            return one, self.shared.setdefault(page, bytearray(PAGE))
        fresh = b"f" * PAGE if START + page * PAGE >= FILE else bytes(PAGE)
        return one, contents.setdefault(page, bytearray(fresh))

    @rule(index=INDEX, page=PAGES, offset=st.integers(0, PAGE - 8), value=st.integers(0, 255))
    def cpu_writes(self, index: int, page: int, offset: int, value: int) -> None:
        one, content = self.page(index, page)
        if page in self.read_only[id(one)]:
            try:
                one.store(START + page * PAGE + offset, b"no")
            except GuestFaultError:
                return
            raise AssertionError("it may only be read")
        one.store(START + page * PAGE + offset, bytes([value]) * 8)
        content[offset : offset + 8] = bytes([value]) * 8

    @rule(index=INDEX, page=PAGES, value=st.integers(0, 255))
    def host_writes(self, index: int, page: int, value: int) -> None:
        one, content = self.page(index, page)
        one.mm.copy_out(START + page * PAGE + 3, bytes([value]) * 5, ignore_permissions=True)
        content[3:8] = bytes([value]) * 5

    @rule(index=INDEX, page=PAGES, by_cpu=st.booleans())
    def reads(self, index: int, page: int, by_cpu: bool) -> None:
        one, content = self.page(index, page)
        read = one.load if by_cpu else one.mm.read
        assert read(START + page * PAGE, PAGE) == content

    @rule(index=INDEX, page=PAGES, count=st.integers(1, 4))
    def protects(self, index: int, page: int, count: int) -> None:
        one, _ = self.page(index, page)
        count = min(count, (END - START) // PAGE - page)
        pages = set(range(page, page + count))
        read_only = self.read_only[id(one)]
        perms = READ_WRITE if pages & read_only else READ
        one.mm.mprotect(START + page * PAGE, count * PAGE, perms)
        if perms == READ:
            read_only |= pages
        else:
            read_only -= pages

    @precondition(lambda self: len(self.contents) < 4)
    @rule(index=INDEX)
    def forks(self, index: int) -> None:
        parent, contents = self.contents[index % len(self.contents)]
        child = self.family.fork(parent)
        child.space.map_unit_bytes = parent.space.map_unit_bytes
        self.contents.append((child, {p: bytearray(c) for p, c in contents.items()}))
        self.read_only[id(child)] = set(self.read_only[id(parent)])

    @precondition(lambda self: len(self.contents) > 1)
    @rule(index=INDEX)
    def ends(self, index: int) -> None:
        one, _ = self.contents.pop(index % len(self.contents))
        for pin in [p for p in self.pins if p[2] is one]:
            pin[0].release()
            self.pins.remove(pin)
        self.family.end(one)

    @precondition(lambda self: len(self.pins) < 3)
    @rule(index=INDEX, page=PAGES)
    def pins_a_page(self, index: int, page: int) -> None:
        one, content = self.page(index, page)
        self.pins.append((one.mm.pin_frames(START + page * PAGE, PAGE, READ), content, one))

    @precondition(lambda self: self.pins)
    @rule(index=INDEX)
    def lets_go(self, index: int) -> None:
        self.pins.pop(index % len(self.pins))[0].release()

    @rule(index=INDEX, page=PAGES, count=st.integers(1, 600))
    def forgets_translations(self, index: int, page: int, count: int) -> None:
        one, _ = self.page(index, page)
        for n in range(page, page + count):
            one.space.pages.pop(START + n * PAGE, None)

    @rule(index=INDEX, page=PAGES, n_pages=st.integers(0, 3))
    def writes_with_little_left(self, index: int, page: int, n_pages: int) -> None:
        one, content = self.page(index, page)
        held = []
        arena = self.family.arena
        while largest := arena.statistics().largest_free_bytes - n_pages * PAGE:
            if largest < 0:
                break
            held.append(arena.allocate(largest))
        try:
            one.mm.copy_out(START + page * PAGE, b"few", ignore_permissions=True)
            content[:3] = b"few"
        except ArenaExhaustedError:
            pass
        finally:
            for fr in held:
                arena.dec_ref(fr)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "family"):
            return
        self.family.check()
        for pin, content, _ in self.pins:
            (_, file, fr), *more = pin.ranges
            assert not more
            with file.view_of(fr) as view:
                assert view == content
        for one, contents in self.contents:
            for page, content in {**contents, **self.shared}.items():
                assert one.mm.read(START + page * PAGE, PAGE) == content


def test_no_process_sees_another_change():
    run_state_machine_as_test(
        Families,
        settings=settings(
            max_examples=settings().max_examples // 2, stateful_step_count=20, deadline=None
        ),
    )
