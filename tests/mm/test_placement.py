"""Where mappings go: hints, windows, guards, alignment; and all of it against a naive search."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import MmError, RangeError
from kvmmm.hostarch.ranges import AddrRange
from kvmmm.mm.layout import LOWEST_PLACED, Layout
from kvmmm.mm.manager import MemoryManager
from kvmmm.mm.placement import GUARD_BYTES, alignment_of, find_available_locked
from kvmmm.mm.vma import Vma
from tests.fakes import FakeAddressSpace
from tests.mm.conftest import HUGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mm.conftest import Setup

    Make = Callable[..., Setup]

PAGE = 4096
GIB = 1 << 30
MAX = 256 << 20


class TestHint:
    def test_taken_if_it_is_free(self, make: Make):
        assert make().mm.mmap(PAGE, addr=0x77000).start == 0x77000

    def test_none_is_no_hint(self, make: Make):
        setup = make()
        assert setup.mm.mmap(PAGE).start == LOWEST_PLACED
        assert setup.mm.mmap(PAGE, addr=0).start == LOWEST_PLACED + PAGE

    @pytest.mark.parametrize("addr", [0x7F000, 0x80000, 0x81000, MAX - PAGE, MAX, 1 << 63, -PAGE])
    def test_elsewhere_if_it_is_not(self, make: Make, addr: int):
        setup = make()
        setup.map(0x80000, 0x82000)
        assert setup.mm.mmap(2 * PAGE, addr=addr).start == LOWEST_PLACED

    def test_nothing_is_placed_at_null(self, make: Make):
        setup = make(max_addr=128 << 10, layout=Layout(0, 128 << 10, top_down=True))
        for _ in range(16):
            assert setup.mm.mmap(PAGE).start >= LOWEST_PLACED
        setup.refuses(lambda: setup.mm.mmap(PAGE), errno.ENOMEM)
        setup.map(0, PAGE)  # whoever insists may


class TestGuard:
    @pytest.fixture
    def setup(self, make: Make) -> Setup:
        """A stack at 16 MiB."""
        setup = make()
        setup.mm.mmap(PAGE, addr=16 << 20, grows_down=True)
        return setup

    def test_a_hint_below_a_stack(self, setup: Setup):
        edge = (16 << 20) - GUARD_BYTES
        assert setup.mm.mmap(PAGE, addr=edge).start == LOWEST_PLACED
        assert setup.mm.mmap(PAGE, addr=edge - PAGE).start == edge - PAGE

    def test_fixed_below_a_stack(self, setup: Setup):
        edge = (16 << 20) - GUARD_BYTES
        setup.refuses(lambda: setup.mm.mmap(PAGE, addr=edge, fixed=True), errno.ENOMEM)
        setup.mm.mmap(PAGE, addr=edge, fixed=True, no_replace=True)
        setup.mm.mmap(PAGE, addr=edge + PAGE, fixed=True, replace=True)

    def test_searching_from_below(self, setup: Setup):
        setup.map(LOWEST_PLACED, (16 << 20) - GUARD_BYTES - PAGE)
        assert setup.mm.mmap(2 * PAGE).start == (16 << 20) + PAGE
        assert setup.mm.mmap(PAGE).start == (16 << 20) - GUARD_BYTES - PAGE

    def test_searching_from_above(self, make: Make):
        setup = make(layout=Layout(0, MAX, top_down=True))
        setup.mm.mmap(PAGE, addr=MAX - PAGE, fixed=True, grows_down=True)
        assert setup.mm.mmap(PAGE).end == MAX - PAGE - GUARD_BYTES

    def test_a_gap_of_less_than_a_guard(self, make: Make):
        setup = make(layout=Layout(0, MAX, top_down=True))
        setup.map(8 << 20, MAX - 2 * PAGE)
        setup.mm.mmap(PAGE, addr=MAX - PAGE, fixed=True, grows_down=True)
        assert setup.mm.mmap(PAGE).end == 8 << 20

    def test_no_guard_beyond_what_is_mapped_below_a_stack(self, make: Make):
        setup = make(layout=Layout(0, MAX, top_down=True))
        setup.map(MAX - 3 * PAGE, MAX - 2 * PAGE)
        setup.mm.mmap(PAGE, addr=MAX - PAGE, fixed=True, grows_down=True)
        assert setup.mm.mmap(PAGE).end == MAX - 3 * PAGE


class TestDirections:
    def test_top_down(self, make: Make):
        setup = make(layout=Layout(0, MAX, top_down=True, top_down_base=MAX - HUGE))
        assert setup.mm.mmap(PAGE).end == MAX - HUGE
        assert setup.mm.mmap(PAGE).end == MAX - HUGE - PAGE

    def test_top_down_falls_back_to_bottom_up(self, make: Make):
        setup = make(
            layout=Layout(0, MAX, top_down=True, top_down_base=HUGE, bottom_up_base=4 * HUGE)
        )
        assert setup.mm.mmap(4 * HUGE + PAGE).start == 4 * HUGE

    def test_bottom_up_falls_back_to_top_down(self, make: Make):
        setup = make(layout=Layout(0, MAX, bottom_up_base=MAX - PAGE))
        assert setup.mm.mmap(2 * PAGE).end == MAX

    def test_a_layout_lies_in_itself(self):
        for wrong in (
            {"bottom_up_base": MAX + PAGE},
            {"top_down_base": 0},
            {"bottom_up_base": 2 * PAGE + 1},
        ):
            with pytest.raises(RangeError):
                Layout(PAGE, MAX, **wrong)


class Test32Bit:
    @pytest.fixture
    def setup(self, make: Make) -> Setup:
        return make(max_addr=4 * GIB)

    def test_from_1_gib_up(self, setup: Setup):
        assert setup.mm.mmap(PAGE, low_32bit=True).start == GIB
        assert setup.mm.mmap(PAGE, low_32bit=True).start == GIB + PAGE

    def test_it_restricts_hints(self, setup: Setup):
        assert setup.mm.mmap(PAGE, addr=GIB // 2, low_32bit=True).start == GIB
        assert setup.mm.mmap(PAGE, addr=GIB + HUGE, low_32bit=True).start == GIB + HUGE
        assert setup.mm.mmap(2 * PAGE, addr=2 * GIB - PAGE, low_32bit=True).start == GIB + PAGE

    def test_not_what_is_fixed(self, setup: Setup):
        assert setup.mm.mmap(PAGE, addr=HUGE, fixed=True, low_32bit=True).start == HUGE

    def test_full(self, setup: Setup):
        setup.map(GIB, 2 * GIB)
        setup.refuses(lambda: setup.mm.mmap(PAGE, low_32bit=True), errno.ENOMEM)


@pytest.mark.parametrize(
    ("length", "private", "stack_like", "align"),
    [
        (HUGE, True, False, HUGE),
        (3 * HUGE, True, False, HUGE),
        (HUGE + PAGE, True, False, PAGE),
        (HUGE, False, False, PAGE),
        (HUGE, True, True, PAGE),
        (PAGE, True, False, PAGE),
    ],
)
def test_alignment(make: Make, length: int, private: bool, stack_like: bool, align: int):
    assert alignment_of(length, private=private, stack_like=stack_like) == align
    setup = make()
    ar = setup.mm.mmap(length, private=private, stack=stack_like)
    assert ar.start == max(LOWEST_PLACED, align)


# A few hundred pages, in which guards of 16 and alignments of 8 are as large as the real ones are.
END = 1 << 30
LENGTHS = st.sampled_from([PAGE, 3 * PAGE, 256 * PAGE, 300 * PAGE, HUGE, 2 * HUGE, 64 * HUGE])
VMAS = st.lists(
    st.tuples(
        st.integers(0, END // PAGE - 1),
        st.sampled_from([1, 2, 5, 256, 512, 4096, 50_000]),
        st.booleans(),
    ),
    max_size=12,
)


def naive(
    vmas: list[tuple[int, int, bool]], low: int, high: int, length: int, align: int, *, last: bool
) -> int | None:
    """Search by trying: gap for gap, with the guard taken off."""
    edges = [*vmas, (END, END, False)]
    at, found = 0, []
    for start, end, grows_down in edges:
        gap = max(at, low), min(start - (GUARD_BYTES if grows_down else 0), high)
        first = -(-gap[0] // align) * align
        if first + length <= gap[1]:
            found.append(((gap[1] - length) // align * align) if last else first)
        at = end
    return (found[-1] if last else found[0]) if found else None


@given(
    vmas=VMAS, length=LENGTHS, huge=st.booleans(), top_down=st.booleans(),
    bases=st.tuples(st.integers(16, END // PAGE), st.integers(16, END // PAGE)),
)  # fmt: skip
def test_against_a_naive_search(
    vmas: list[tuple[int, int, bool]], length: int, huge: bool, top_down: bool,
    bases: tuple[int, int],
):  # fmt: skip
    low, high = bases[0] * PAGE, bases[1] * PAGE
    layout = Layout(0, END, bottom_up_base=low, top_down_base=high, top_down=top_down)
    arena = SimpleNamespace(hva=0, capacity_bytes=0)
    mm = MemoryManager(arena, FakeAddressSpace(END), layout=layout)  # type: ignore[arg-type]
    placed = []
    for page, n_pages, grows_down in sorted(vmas):
        start, end = page * PAGE, min((page + n_pages) * PAGE, END)
        if next(mm.vmas.segments(start, end), None) is None:
            # A name each, so that nothing merges.
            mm.vmas.insert(start, end, Vma(3, f"{start}", grows_down=grows_down))
            placed.append((start, end, grows_down))
    align = HUGE if huge else PAGE
    up = naive(placed, low, END, length, align, last=False)
    down = naive(placed, LOWEST_PLACED, high, length, align, last=True)
    order = (down, up) if top_down else (up, down)
    wanted = order[0] if order[0] is not None else order[1]
    if wanted is not None:
        assert find_available_locked(mm, "mmap", length, align_bytes=align) == wanted
        return
    with pytest.raises(MmError) as caught:
        find_available_locked(mm, "mmap", length, align_bytes=align)
    assert caught.value.errno == errno.ENOMEM


class TestHole:
    """What can never be memory is never given, nor taken."""

    HOLE = AddrRange(0x40_0000, 0x80_0000)

    def build(self, make: Make, *, top_down: bool = False) -> MemoryManager:
        layout = Layout(0, 0x100_0000, top_down=top_down, hole=self.HOLE)
        return make(max_addr=0x100_0000, layout=layout).mm

    @pytest.mark.parametrize("top_down", [False, True])
    def test_a_search_goes_around_it(self, make: Make, top_down: bool) -> None:
        mm = self.build(make, top_down=top_down)
        placed = [mm.mmap(0x5_0000) for _ in range(30)]
        assert not any(ar.overlaps(self.HOLE) for ar in placed)
        with pytest.raises(MmError, match="no room") as caught:
            mm.mmap(0x30_0000)
        assert caught.value.errno == errno.ENOMEM

    def test_nobody_can_insist_on_it(self, make: Make) -> None:
        mm = self.build(make)
        with pytest.raises(MmError, match="can never be memory") as caught:
            mm.mmap(0x2000, addr=0x3F_F000, fixed=True, replace=True)
        assert caught.value.errno == errno.ENOMEM
        assert mm.usage_bytes == 0

    def test_a_hint_into_it_is_no_order(self, make: Make) -> None:
        mm = self.build(make)
        assert not mm.mmap(0x2000, addr=0x50_0000).overlaps(self.HOLE)
