"""Tables to try, and an oracle: a walk as the manual has it, sharing nothing with the code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvmmm.pagetables import MemoryTableAllocator, PageTables, TableAllocator

_ADDRESS = 0xFFFFFFFFFF000


class Leaf(NamedTuple):
    gva: int
    length_bytes: int
    gpa: int
    flags: int


class Tables(NamedTuple):
    leaves: list[Leaf]
    gpas: list[int]


WalkRaw = Callable[[TableAllocator, int], Tables]


class TablesAtHand:
    """Tables over an allocator, and what they hold as plain tuples."""

    def __init__(self, capacity_tables: int = 64, **options: Any) -> None:
        self.allocator = MemoryTableAllocator(capacity_tables)
        self.pt = PageTables(self.allocator, **options)

    @property
    def n_used(self) -> int:
        """Pages that are tables, or wait to be free again."""
        return self.pt.n_tables + self.pt.n_quarantined

    def runs(self) -> list[tuple[int, int, int, int, int]]:
        return [(r.gva, r.length_bytes, r.gpa, r.leaf_bytes, r.flags) for r in self.pt.mappings()]


MakeTables = Callable[..., TablesAtHand]


def _walk(allocator: TableAllocator, root_gpa: int) -> Tables:
    leaves: list[Leaf] = []
    gpas: list[int] = []

    def visit(gpa: int, level: int, gva: int, rights: int, *, no_execute: bool) -> None:
        gpas.append(gpa)
        entries = allocator.entries(gpa)
        assert len(entries) == 512
        span = 4096 * 512 ** (level - 1)
        n_present = 0
        for i in range(512):
            entry = entries[i]
            if not entry & 1:
                assert entry == 0, "absent entries hold nothing"
                continue
            n_present += 1
            at = gva + i * span
            if level == 4 and i >= 256:
                at += 0xFFFF_0000_0000_0000
            allowed = rights & entry & 0b110
            nx = no_execute or bool(entry >> 63)
            if level == 1 or entry & 0x80:
                assert level <= 3, "no leaves in a PML4"
                assert level > 1 or not entry & 0x80, "PS in a PTE would be PAT"
                assert (entry & _ADDRESS) % span == 0, "reserved address bits of a superpage"
                flags = entry & ~_ADDRESS & ~0x80 & ~0b110 & ~(1 << 63)
                leaves.append(Leaf(at, span, entry & _ADDRESS, flags | allowed | nx << 63))
            else:
                visit(entry & _ADDRESS, level - 1, at, allowed, no_execute=nx)
        assert n_present or level == 4, "an empty table was kept"

    visit(root_gpa, 4, 0, 0b110, no_execute=False)
    assert len(set(gpas)) == len(gpas), "a table is linked twice"
    return Tables(leaves, gpas)


def _n_needed(leaves: list[Leaf]) -> int:
    parents = set()
    for leaf in leaves:
        span = leaf.length_bytes * 512
        while span <= 1 << 39:
            parents.add((span, leaf.gva // span))
            span *= 512
    return 1 + len(parents)


@pytest.fixture(scope="session")
def walk_raw() -> WalkRaw:
    """All leaves and tables below a root; asserts that the tables are well formed."""
    return _walk


@pytest.fixture(scope="session")
def n_tables_needed() -> Callable[[list[Leaf]], int]:
    """How many tables these leaves need, by counting."""
    return _n_needed


@pytest.fixture(scope="session")
def make_tables() -> MakeTables:
    """Make empty tables: capacity_tables, and options of `PageTables`."""
    return TablesAtHand


@pytest.fixture(params=[False, True], ids=["idle", "live"])
def live(request: pytest.FixtureRequest) -> bool:
    """Whether CPUs may walk the tables: other ways, the same results."""
    return bool(request.param)


@pytest.fixture
def f(live: bool) -> TablesAtHand:
    """Tables without giant pages."""
    return TablesAtHand(live=live)


@pytest.fixture
def giant(live: bool) -> TablesAtHand:
    """Tables with giant pages."""
    return TablesAtHand(giant_pages=True, live=live)
