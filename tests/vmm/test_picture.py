"""Pictures of address spaces: well-formed whatever the names, true to the figures, of bounded size.

How they look no test can say.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.arena import Arena
from kvmmm.errors import GuestFaultError
from kvmmm.hostarch.access import ANY_ACCESS, NO_ACCESS, READ, READ_EXECUTE, READ_WRITE, WRITE
from kvmmm.mm import MemoryManager
from kvmmm.mm.fault import handle_user_fault
from kvmmm.mm.fault_log import FaultLog
from kvmmm.mm.sight import SeenMapping, look
from kvmmm.mm.vma import Vma, insert_locked
from kvmmm.vmm import picture, picture_table
from kvmmm.vmm.picture_canvas import escaped
from kvmmm.vmm.picture_rows import MOST_ROWS, Row, marks_of, rows_of, width_of
from kvmmm.vmm.picture_words import Caption, Drawn
from tests.fakes import FakeAddressSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
HUGE = 2 << 20
SVG = "{http://www.w3.org/2000/svg}"
NAMES = st.text(max_size=40)


@pytest.fixture
def mm() -> Iterator[MemoryManager]:
    with Arena(256 << 20) as arena:
        made = MemoryManager(arena, FakeAddressSpace(1 << 47))
        made.fault_log = FaultLog()
        yield made
        made.close()


def put(mm: MemoryManager, start: int, length: int, perms: int = READ_WRITE, **more: Any) -> None:
    mm.mmap(length, perms, addr=start, fixed=True, **more)


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def titles(root: ET.Element, classes: str) -> list[str]:
    """Titles of the groups of a class."""
    return [
        element.findtext(f"{SVG}title", "")
        for element in root.iter(f"{SVG}g")
        if element.get("class") == classes
    ]


def faults_in(title: str) -> int:
    return sum(
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:read|write|execute)s?\b", title)
    )


class TestSvg:
    def test_of_nothing(self, mm: MemoryManager):
        root = parse(picture.draw(mm))
        assert root.tag == f"{SVG}svg"
        assert "128 TiB unmapped" in texts(root)

    def test_it_refers_to_nothing_outside(self, mm: MemoryManager):
        put(mm, 0, PAGE)
        svg = picture.draw(mm)
        assert svg.count("http") == svg.count("http://www.w3.org/2000/svg") == 1
        assert "href" not in svg
        assert "script" not in svg

    def test_it_has_colours_for_dark_viewers_and_a_background(self, mm: MemoryManager):
        svg = picture.draw(mm)
        assert "prefers-color-scheme:dark" in svg
        assert '<rect width="100%" height="100%" class="bg"/>' in svg

    @given(st.text())
    def test_any_text_can_be_escaped(self, text: str):
        element = parse(f'<a b="{escaped(text)}">{escaped(text)}</a>')
        shown = re.sub("[\r\n\t]", " ", element.get("b") or "")
        assert len(shown) == len(text)
        if text.isprintable():
            assert element.text or text == ""

    @given(NAMES, NAMES, NAMES)
    def test_any_name_is_shown(self, name: str, title: str, outcome: str):
        with Arena(HUGE) as arena:
            mm = MemoryManager(arena, FakeAddressSpace(1 << 30))
            put(mm, 0x10000, PAGE, name=name)
            put(mm, 0x20000, PAGE, name="<&\"'>]]>")
            drawn = Drawn(name, look(mm), (0x10000, name))
            root = parse(picture.draw_all([drawn], Caption(title, name, outcome)))
            parse(picture_table.page([drawn], Caption(title, name, outcome)).split("\n", 1)[1])
            picture_table.text([drawn], Caption(title, name, outcome)).encode()
            mm.close()
        assert any("<&\"'>]]>" in shown for shown in titles(root, "mapping"))

    def test_long_names_are_clipped_and_whole_in_the_title(self, mm: MemoryManager):
        path = "/very/long/" + "directory/" * 20 + "file.so"
        put(mm, 0, PAGE, name=path)
        put(mm, PAGE, PAGE, name="[anon:" + "x" * 70 + "]")
        root = parse(picture.draw(mm))
        shown = texts(root)
        assert max(map(len, shown)) < 100
        assert any(text.startswith("…") and text.endswith("/file.so") for text in shown)
        assert path in titles(root, "mapping")[0]


class TestFigures:
    def test_rows_holes_and_sums(self, mm: MemoryManager):
        put(mm, 0x400000, 4 * PAGE, READ_EXECUTE, name="code")
        put(mm, 0x404000, 4 * PAGE, name="data")
        put(mm, 1 << 40, 4 * HUGE, name="heap")
        mm.handle_user_fault(0x404000, WRITE)
        mm.handle_user_fault((1 << 40) + HUGE, READ)
        mm.handle_user_fault((1 << 40) + HUGE, READ)
        mm.munmap((1 << 40) + 3 * HUGE, HUGE)
        root = parse(picture.draw(mm, "mine"))
        shown = texts(root)
        for text in ("mine", "code", "r-xp", "heap", "0x10000000000", "6 MiB"):
            assert text in shown, text
        assert "1 TiB unmapped" in shown
        assert f"own {mm.rss_bytes >> 10} KiB" in shown or f"own {mm.rss_bytes >> 20} MiB" in shown
        assert {"2 reads", "1 write", "0 executes"} <= set(shown)
        rows = titles(root, "mapping")
        assert [faults_in(title) for title in rows] == [0, 1, 2]
        assert "0x404000-0x408000 rw-p data\n16 KiB mapped; 16 KiB own; 1 write" in rows

    def test_faults_where_nothing_is_mapped_any_more(self, mm: MemoryManager):
        put(mm, HUGE, HUGE)
        put(mm, 4 * HUGE, HUGE)
        for addr in (HUGE, HUGE + 5 * PAGE, 4 * HUGE):
            mm.handle_user_fault(addr, WRITE)
        mm.munmap(HUGE, HUGE)
        root = parse(picture.draw(mm))
        assert [faults_in(title) for title in titles(root, "gap")] == [2, 0]
        assert [faults_in(title) for title in titles(root, "mapping")] == [1]

    @pytest.mark.parametrize("addr", [0x5000, 0x10000, 0x10FFF, 0x20000, 1 << 46, 1 << 50])
    def test_the_fault_that_ended_it_is_marked(self, mm: MemoryManager, addr: int):
        put(mm, 0x10000, PAGE)
        root = parse(picture.draw_all([Drawn("", look(mm), (addr, "it was here"))], Caption("x")))
        assert "it was here" in texts(root)
        assert len(list(root.iter(f"{SVG}polygon"))) == 1

    def test_faults_outside_the_address_space(self, mm: MemoryManager):
        put(mm, (1 << 47) - PAGE, PAGE)
        with pytest.raises(GuestFaultError):
            mm.handle_user_fault(0xFFFF_FF80_0000_0000, READ)
        root = parse(picture.draw(mm))
        assert [faults_in(title) for title in titles(root, "gap")] == [0, 1]

    @pytest.mark.parametrize("seed", range(6))
    def test_nothing_is_lost(self, mm: MemoryManager, seed: int):
        rng = random.Random(seed)
        addr = 0
        for _ in range(rng.choice((3, 20, 60, 200))):
            addr += rng.choice((0, 0, PAGE, HUGE, 1 << 38))
            length = rng.choice((PAGE, PAGE, 8 * PAGE, HUGE))
            put(mm, addr, length, rng.choice((READ, READ_WRITE)), name=rng.choice(("", "a")))
            addr += length
        for start, end, _ in list(mm.vmas):
            for _ in range(rng.randrange(4)):
                mm.handle_user_fault(rng.randrange(start, end), READ)
        for start, end, _ in list(mm.vmas)[:: rng.randrange(2, 9)]:
            mm.munmap(start, end - start)
        sight = look(mm)
        drawn = [Drawn("", sight)]
        root = parse(picture.draw_all(drawn, Caption("x")))
        said = [*titles(root, "mapping"), *titles(root, "gap")]
        assert sum(map(faults_in, said)) == mm.counters.faults
        ticks = [faults_in(title) for title in titles(root, "ticks")]
        assert sum(ticks) == sum(map(faults_in, titles(root, "mapping")))
        lines = picture_table.lines_of(sight)
        assert len(lines) == len(mm.vmas)
        in_lines = sum(int(line[8].replace(",", "")) for line in lines if line[8] != "-")
        rows = rows_of(sight.mappings)
        assert sum(row.size_bytes for row in rows) == mm.usage_bytes
        assert sum(sum(row.by_kind) for row in rows) == mm.rss_bytes
        # In rows of several mappings there are holes, with faults.
        assert in_lines <= sum(ticks)


class TestManyMappings:
    def test_thousands_stay_small(self, mm: MemoryManager):
        rng, addr = random.Random(3), HUGE
        for i in range(3000):
            length = PAGE * rng.choice((1, 1, 1, 2, 16))
            # Not by mmap, after which KVMMM_DEBUG checks everything.
            with mm.mapping_lock:
                vma = Vma(rng.choice((READ, READ_WRITE, ANY_ACCESS)), f"name {i}")
                insert_locked(mm, addr, addr + length, vma)
            handle_user_fault(mm, addr, READ)
            addr += length + PAGE * rng.choice((0, 1, 3))
            if i == 2000:
                addr = 0x7F00_0000_0000
        drawn = [Drawn("", look(mm))]
        svg = picture.draw_all(drawn, Caption("x"))
        assert len(svg) < 1 << 20
        root = parse(svg)
        assert len(titles(root, "mapping")) <= MOST_ROWS
        assert sum(map(faults_in, titles(root, "mapping"))) == 3000
        page = picture_table.page(drawn, Caption("x"))
        assert len(page) < 2 << 20
        assert page.count("<tr>") == 3001

    def test_few_have_a_row_each(self):
        mappings = [_seen(i << 30, PAGE) for i in range(MOST_ROWS)]
        assert [row.mappings for row in rows_of(mappings)] == [[m] for m in mappings]

    def test_what_is_large_or_apart_stands_alone(self):
        small = [_seen(PAGE * 2 * i, PAGE) for i in range(100)]
        big = _seen(HUGE, 64 * HUGE)
        far = [_seen((1 << 46) + PAGE * 2 * i, PAGE) for i in range(100)]
        rows = rows_of([*small, big, *far])
        assert [big] in [row.mappings for row in rows]
        assert not any(row.start < HUGE and row.end > 1 << 46 for row in rows)
        assert 3 <= len(rows) <= MOST_ROWS

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 40).map(lambda n: (1 << n) - 1), st.integers(0, 20), NAMES
            ), min_size=1, max_size=120,
        ),
        st.integers(2, 30),
    )  # fmt: skip
    def test_each_has_its_row_in_order(self, wanted: list[tuple[int, int, str]], most: int):
        mappings, addr = [], 0
        for gap, size, name in wanted:
            addr += gap * PAGE
            mappings.append(_seen(addr, PAGE << size, name))
            addr += PAGE << size
        rows = rows_of(mappings, most)
        assert [m for row in rows for m in row.mappings] == mappings
        assert len(rows) <= most
        longest = max(row.span_bytes for row in rows)
        for row in rows:
            assert 10 <= width_of(row.span_bytes, longest, 10, 100) <= 100


def _seen(start: int, length: int, name: str = "") -> SeenMapping:
    return SeenMapping(start, start + length, Vma(NO_ACCESS, name), [])


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=80),
    st.sampled_from((1.5, 6, 50)),
    st.integers(1, 4000),
)
def test_marks(pieces: list[tuple[int, int]], quantum: float, n_pages: int):
    row = Row([_seen(64 * PAGE, n_pages * PAGE)])
    placed, addr = [], 0
    for gap, length in pieces:
        addr += gap * PAGE
        placed.append((addr, addr + length * PAGE, (length, 1)))
        addr += length * PAGE
    marks = marks_of(row, placed, 540, quantum)
    inside = [piece for piece in placed if piece[1] > row.start and piece[0] < row.end]
    assert sum(mark.count for mark in marks) == len(inside)
    assert [sum(mark.weights[i] for mark in marks) for i in (0, 1)] == [
        sum(piece[2][i] for piece in inside) for i in (0, 1)
    ]
    assert len(marks) <= 2 * 540 / quantum + 2
    for mark in marks:
        assert mark.x >= 0
        assert mark.width >= 1.5
        assert mark.x + mark.width <= 540.001
    assert [mark.x for mark in marks] == sorted(mark.x for mark in marks)
