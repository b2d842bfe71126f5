"""Whole sets of tables as a value: the boot tables of one VM are those of the next.

Building boot tables takes a walk for every piece of the memory map. An image replays the outcome:
one slice assignment a table and one store a link, whatever is mapped, wherever the new tables lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.pagetables.pte import PTE_ADDRESS_MASK, PTE_P, PTE_PS, ROOT_LEVEL, TABLE_FLAGS

if TYPE_CHECKING:
    from kvmmm.pagetables.allocator import TableAllocator


class TableImage:
    """What some tables held, free of where they lay. Immutable.

    Attributes:
        contents: By table, the root first: its 512 entries, links left out.
        links: (table, index of the entry in it, table that it links to), by number.
    """

    __slots__ = ("contents", "links")

    def __init__(
        self, contents: tuple[memoryview, ...], links: tuple[tuple[int, int, int], ...]
    ) -> None:
        self.contents = contents
        self.links = links


def take_image(allocator: TableAllocator, root: memoryview) -> TableImage:
    """Return a copy of all tables below the root table `root`, itself included."""
    contents: list[memoryview] = []
    links: list[tuple[int, int, int]] = []

    def take(entries: memoryview, level: int) -> int:
        number = len(contents)
        copy = memoryview(bytearray(entries)).cast("Q")
        contents.append(copy)
        if level > 1:
            for index, entry in enumerate(entries.tolist()):
                if entry & (PTE_P | PTE_PS) == PTE_P:
                    below = take(allocator.entries(entry & PTE_ADDRESS_MASK), level - 1)
                    links.append((number, index, below))
                    copy[index] = 0
        return number

    take(root, ROOT_LEVEL)
    return TableImage(tuple(contents), tuple(links))


def fill_from_image(
    image: TableImage, allocator: TableAllocator, root_gpa: int, root: memoryview
) -> None:
    """Build the image's tables below the empty table `root`, which no CPU uses yet.

    Raises:
        ArenaExhaustedError: There are not enough pages; none but the root is kept.
    """
    tables = [(root_gpa, root)]
    try:
        for _ in image.contents[1:]:
            tables.append(allocator.allocate())  # noqa: PERF401, what is there must be freed
    except BaseException:
        for gpa, _ in tables[1:]:
            allocator.free(gpa)
        raise
    for (_, entries), content in zip(tables, image.contents, strict=True):
        entries[:] = content
    for number, index, below in image.links:
        tables[number][1][index] = tables[below][0] | TABLE_FLAGS
