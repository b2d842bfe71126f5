"""The frame table: a map of guest pages to frames of the arena, and to what copies may do there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmm.hostarch.access import READ
from kvmmm.safemem.ffi import CopyCore

PAGE = 4096
GIB = 1 << 30
RWRW = 15  # read and write, for everybody and for a debugger

Run = tuple[int, int, int, int]


class Runs:
    """The oracle: disjoint runs (start, end, file offset, bits), in order."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def clear(self, start: int, end: int) -> None:
        kept: list[Run] = []
        for s, e, fo, bits in self.runs:
            if s < min(start, e):
                kept.append((s, min(start, e), fo, bits))
            if max(s, end) < e:
                kept.append((max(s, end), e, fo + max(s, end) - s, bits))
        self.runs = sorted(kept) if start < end else self.runs

    def fill(self, start: int, end: int, fo: int, bits: int) -> None:
        self.clear(start, end)
        if not (fo or bits):
            # Frame 0 that nobody may use is as good as none.
            start, fo = start + PAGE, PAGE
        if start < end:
            self.runs = sorted([*self.runs, (start, end, fo, bits)])

    def within(self, start: int, end: int) -> list[Run]:
        """What is in [start, end); neighbours that say the same are one."""
        found: list[Run] = []
        for s, e, fo, bits in self.runs:
            at, to = max(s, start), min(e, end)
            if at >= to:
                continue
            run = at, to, fo + at - s, bits
            if found and found[-1][1] == at:
                last = found[-1]
                if last[2] + at - last[0] == run[2] and last[3] == bits:
                    found[-1] = last[0], to, last[2], bits
                    continue
            found.append(run)
        return found


MAX = 200 * GIB
ARENA_BYTES = 1 << 40  # never touched here


def table(max_addr: int = MAX, hva: int = PAGE, length_bytes: int = ARENA_BYTES) -> CopyCore:
    return CopyCore(max_addr, hva, length_bytes)


EDGES = [0, GIB, 2 * GIB, 66 * GIB, 67 * GIB, MAX]
NEAR = [-(64 << 20) - PAGE, -(64 << 20), -5 * PAGE, -PAGE, 0, PAGE, 4 << 20, 64 << 20]
ADDRESSES = st.builds(
    lambda edge, by: min(max(edge + by, 0), MAX), st.sampled_from(EDGES), st.sampled_from(NEAR)
)
LENGTHS = st.sampled_from([0, PAGE, 7 * PAGE, 4 << 20, 63 << 20, 64 << 20, 65 << 20, GIB + PAGE])
OFFSETS = st.sampled_from([0, PAGE, 7 * PAGE, GIB])


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("fill"), ADDRESSES, LENGTHS, OFFSETS, st.integers(0, 15)),
            st.tuples(st.just("forget"), ADDRESSES, LENGTHS),
            st.tuples(st.just("forget to"), ADDRESSES, ADDRESSES),
        ),
        max_size=7,
    ),
    ADDRESSES,
    ADDRESSES,
)
def test_it_is_a_map(steps: list[tuple[Any, ...]], low: int, high: int):
    """Of pages to frames and permissions, whatever chunks and lengths are."""
    core, runs = table(), Runs()
    for kind, addr, *rest in steps:
        if kind == "fill":
            length, fo, bits = rest
            end = min(addr + length, MAX)
            core.fill_frames(addr, end, fo, bits)
            runs.fill(addr, end, fo, bits)
        elif kind == "forget":
            end = min(addr + rest[0], MAX)
            core.forget(addr, end)
            runs.clear(addr, end)
        else:
            start, end = sorted((addr, rest[0]))
            core.forget(start, end)
            runs.clear(start, end)
    assert core.frames(0, MAX) == runs.within(0, MAX)
    low, high = sorted((low, high))
    assert core.frames(low, high) == runs.within(low, high)


class TestEdges:
    def test_of_a_chunk(self):
        core = table()
        core.fill_frames(GIB - 2 * PAGE, GIB + 2 * PAGE, 0, RWRW)
        assert core.frames(0, MAX) == [(GIB - 2 * PAGE, GIB + 2 * PAGE, 0, RWRW)]
        core.forget(GIB - PAGE, GIB)
        assert core.frames(0, MAX) == [
            (GIB - 2 * PAGE, GIB - PAGE, 0, RWRW),
            (GIB, GIB + 2 * PAGE, 2 * PAGE, RWRW),
        ]
        core.forget(GIB, GIB + PAGE)
        assert core.frames(GIB, 2 * GIB) == [(GIB + PAGE, GIB + 2 * PAGE, 3 * PAGE, RWRW)]

    def test_of_the_last_address(self):
        for max_addr in (MAX, GIB + 3 * PAGE, PAGE, 1 << 47, (1 << 57)):
            core = table(max_addr)
            core.fill_frames(max_addr - PAGE, max_addr, 5 * PAGE, READ)
            assert core.frames(max_addr - PAGE, max_addr) == [
                (max_addr - PAGE, max_addr, 5 * PAGE, READ)
            ]
            core.forget(max(max_addr - GIB, 0) & -PAGE, max_addr)
            assert core.frames(max_addr - PAGE, max_addr) == []

    def test_far_more_than_64_gib_at_once(self):
        """Only the chunks that there are, the first and the last in part."""
        core = table(1 << 47)
        kept = [(5 * GIB, 5 * GIB + PAGE), ((1 << 46) + PAGE, (1 << 46) + 2 * PAGE)]
        gone = [(5 * GIB + PAGE, 5 * GIB + 9 * PAGE), (9 * GIB, 9 * GIB + PAGE)]
        gone += [(100 * GIB - PAGE, 100 * GIB + PAGE), (1 << 46, (1 << 46) + PAGE)]
        for start, end in (*gone, *kept):
            core.fill_frames(start, end, 0, RWRW)
        core.forget(5 * GIB + PAGE, (1 << 46) + PAGE)
        assert core.frames(5 * GIB, 101 * GIB) == [(*kept[0], 0, RWRW)]
        assert core.frames(1 << 46, (1 << 46) + GIB) == [(*kept[1], 0, RWRW)]

    @pytest.mark.parametrize("at", [0, PAGE, 1023 * PAGE, 1024 * PAGE, GIB - (64 << 20)])
    @pytest.mark.parametrize("more", [-PAGE, 0, PAGE, 4 << 20, 7 * PAGE])
    def test_64_mib_are_left_to_the_kernel(self, at: int, more: int):
        """Neighbours on pages of the table that are partly cleared stay."""
        core, end = table(), min(at + (64 << 20) + more, GIB)
        low, high = max(at - 3 * PAGE, 0), end + 3 * PAGE
        core.fill_frames(low, high, GIB, RWRW)
        core.forget(at, end)
        expected = [(low, at, GIB, RWRW)] if low < at else []
        assert core.frames(0, MAX) == [*expected, (end, high, GIB + end - low, RWRW)]

    def test_frame_0(self):
        """Its entry is its permissions alone; without any it is none."""
        core = table()
        for bits in range(16):
            core.fill_frames(PAGE, 3 * PAGE, 0, bits)
            runs = core.frames(0, GIB)
            if bits:
                assert runs == [(PAGE, 3 * PAGE, 0, bits)]
            else:
                assert runs == [(2 * PAGE, 3 * PAGE, PAGE, 0)]  # and nobody may use that
                with pytest.raises(AttributeError):
                    core.read(2 * PAGE, 1)  # so Python is asked, which this class has not
        core.forget(0, GIB)
        assert core.frames(0, GIB) == []

    def test_frames_that_an_entry_cannot_name(self):
        """1 TiB of an arena is 2**28 frames; what lies behind is out of reach, not another's."""
        core = table(length_bytes=ARENA_BYTES + GIB)
        core.fill_frames(0, 2 * PAGE, ARENA_BYTES - 2 * PAGE, RWRW)
        assert core.frames(0, GIB) == [(0, 2 * PAGE, ARENA_BYTES - 2 * PAGE, RWRW)]
        for fo in (ARENA_BYTES - PAGE, ARENA_BYTES, ARENA_BYTES + PAGE, 1 << 60):
            with pytest.raises(ValueError, match="frames"):
                core.fill_frames(0, 2 * PAGE, fo, RWRW)
        assert core.frames(0, GIB) == [(0, 2 * PAGE, ARENA_BYTES - 2 * PAGE, RWRW)]

    @pytest.mark.parametrize(
        "arguments",
        [
            (1, PAGE, 0, 1), (0, PAGE + 1, 0, 1), (PAGE, 0, 0, 1), (0, MAX + PAGE, 0, 1),
            (0, PAGE, 1, 1), (0, PAGE, 0, 16), (-PAGE, 0, 0, 1), (0, PAGE, -PAGE, 1),
            (0, PAGE, 0, -1), (1 << 64, 1 << 65, 0, 1), (0, PAGE, ARENA_BYTES, 1),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, arguments: tuple[int, int, int, int]):
        core = table()
        with pytest.raises(ValueError, match=r"frames|pages"):
            core.fill_frames(*arguments)
        start, end, *_ = arguments
        if arguments[2:] == (0, 1):
            with pytest.raises(ValueError, match="pages"):
                core.forget(start, end)
        assert core.frames(0, MAX) == []

    def test_calls_that_are_none(self):
        core = table()
        for call in (
            lambda: core.fill_frames(0, PAGE, 0),  # type: ignore[call-arg]
            lambda: core.fill_frames(0, PAGE, 0, 1, 2),  # type: ignore[call-arg]
            lambda: core.forget(0),  # type: ignore[call-arg]
            lambda: core.forget("0", PAGE),  # type: ignore[arg-type]
            lambda: core.frames(0),  # type: ignore[call-arg]
        ):
            with pytest.raises(TypeError):
                call()
        for arguments in ((1 << 58, 0, 0), ((1 << 57) + 1, 0, 0)):
            with pytest.raises(ValueError, match="addresses"):
                CopyCore(*arguments)
        with pytest.raises(ValueError, match="twice"):
            core.__init__(MAX, 0, 0)  # type: ignore[misc]
        never_made = CopyCore.__new__(CopyCore)
        for name in ("fill_frames", "forget", "frames"):
            arguments = (0, PAGE, 0, 1)[: 4 if name == "fill_frames" else 2]
            with pytest.raises(ValueError, match="pages"):
                getattr(never_made, name)(*arguments)
