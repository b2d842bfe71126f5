"""The boot tables as values: what they map, what differs from one to the next, when room ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.errors import StateError
from kvmmm.hostarch.access import ANY_ACCESS, READ, READ_WRITE
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, PAGE_BYTES
from kvmmm.pagetables.pte import flags_of
from kvmmm.safemem.ffi import address_of, ffi
from kvmmm.vmm.boot_tables import TableImage, TableRoom

FIRST_GPA = 0x1000_0000
PAGES = 2048
"""Of memory that the model knows: four tables' worth."""


def lookups(image: TableImage, content: bytes | None = None) -> list[int | None]:
    """Return the flags of every page, None where nothing is mapped."""
    buffer = bytearray(image.content if content is None else content)
    room = TableRoom(image, memoryview(buffer), address_of(ffi.from_buffer(buffer)))
    tables = room.adopt(image)
    found = [tables.lookup(page * PAGE_BYTES) for page in range(PAGES)]
    for page, one in enumerate(found):
        # The identity, whatever the leaf's size.
        assert one is None or one.gpa == one.gva <= page * PAGE_BYTES
    return [None if one is None else one.flags for one in found]


def empty(n_tables: int = 64) -> TableImage:
    end = FIRST_GPA + n_tables * PAGE_BYTES
    return TableImage(FIRST_GPA, end, giant_pages=False)


def parts_of(pages: list[int]) -> list[tuple[int, int, int]]:
    """Runs of pages with the same flags; 0 is no part."""
    parts: list[tuple[int, int, int]] = []
    for page, flags in enumerate(pages):
        start, end = page * PAGE_BYTES, (page + 1) * PAGE_BYTES
        if not flags:
            continue
        if parts and parts[-1][1:] == (start, flags):
            start = parts.pop()[0]
        parts.append((start, end, flags))
    return parts


_FLAGS = [0, *(flags_of(perms, user=True) for perms in (READ, READ_WRITE, ANY_ACCESS))]
_changes = st.lists(
    st.tuples(
        st.integers(0, PAGES - 1), st.integers(1, PAGES), st.sampled_from(_FLAGS)
    ),
    max_size=4,
)  # fmt: skip


@given(st.lists(_changes, min_size=1, max_size=5))
def test_what_is_written_is_what_the_image_says(steps: list[list[tuple[int, int, int]]]):
    image = empty()
    written = bytearray(64 * PAGE_BYTES)
    pages = [_FLAGS[2]] * PAGES
    expected: list[int | None] = [None] * PAGES
    for changes in steps:
        for first, n_pages, flags in changes:
            pages[first : first + n_pages] = [flags] * len(pages[first : first + n_pages])
        new = image.mapping(parts_of(pages))
        for offset, content in image.changes_to(new):
            written[offset : offset + len(content)] = content
        # What is no part stays as it was.
        expected = [
            flags or before for flags, before in zip(pages, expected, strict=True)
        ]  # fmt: skip
        assert lookups(new) == expected
        assert lookups(new, bytes(written)) == expected
        image = new


def test_no_difference():
    image = empty().mapping([(0, 8 * HUGE_PAGE_BYTES, _FLAGS[1])])
    same = image.mapping([(0, 8 * HUGE_PAGE_BYTES, _FLAGS[1])])
    assert list(image.changes_to(same)) == []


def test_a_table_that_is_needed_stays_where_it_is():
    """Tables of the guest's own may lead to it: only entries in it change, and new tables come."""
    whole = [(0, 512 * HUGE_PAGE_BYTES, _FLAGS[2])]
    image = empty().mapping(whole)
    low = [(0, PAGE_BYTES, _FLAGS[1]), (PAGE_BYTES, 512 * HUGE_PAGE_BYTES, _FLAGS[2])]
    new = image.mapping(low)
    changes = list(image.changes_to(new))
    assert [len(content) for _, content in changes] == [8, PAGE_BYTES]
    assert changes[1][0] == len(image.content)
    again = new.mapping(whole)
    assert all(len(content) == 8 for _, content in new.changes_to(again))


def test_when_room_ends_tables_are_laid_out_anew():
    """A guest that has protected a page here and there, and everything in the end."""
    image = empty(8)
    memory = 16 * HUGE_PAGE_BYTES
    for n in range(16):
        at = n * HUGE_PAGE_BYTES
        pieces = (0, at, _FLAGS[2]), (at, at + PAGE_BYTES, _FLAGS[1])
        rest = (at + PAGE_BYTES, memory, _FLAGS[2])
        image = image.mapping([part for part in (*pieces, rest) if part[0] < part[1]])
        found = lookups(image)
        assert found[: 4 * 512].count(_FLAGS[1]) == (n < 4)
    assert image.n_tables <= 8


def test_no_room_at_all():
    image = empty(6).mapping([(0, 4 * HUGE_PAGE_BYTES, _FLAGS[2])])
    scattered = [
        (n * HUGE_PAGE_BYTES, n * HUGE_PAGE_BYTES + PAGE_BYTES, _FLAGS[1]) for n in range(4)
    ]
    before = image.content
    with pytest.raises(StateError, match="no page left"):
        image.mapping(scattered)
    assert image.content == before
