"""The C walks against walks in Python: lookups in tables of any content, whole tables, stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmm.pagetables import MemoryTableAllocator, PageTables
from kvmmm.pagetables.pte import PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W
from kvmmm.safemem.ffi import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 1 << 12
_ADDRESS = 0xFFFFFFFFFF000
_BITS = st.sampled_from([0, PTE_W, PTE_U, PTE_W | PTE_U, PTE_NX, PTE_NX | PTE_W | PTE_U])
_KINDS = st.sampled_from(["link", "link", "link", "leaf", "absent"])


def _oracle(allocator: MemoryTableAllocator, root_gpa: int, gva: int) -> tuple[int, ...] | None:
    """The manual's words, one after the other: frame, leaf size, W, U, NX."""
    gpa, w, u, nx = root_gpa, True, True, False
    for level in (4, 3, 2, 1):
        span = 512 ** (level - 1) * 4096
        entry = allocator.entries(gpa)[gva // span % 512]
        if not entry & 1:
            return None
        w, u, nx = w and bool(entry & 2), u and bool(entry & 4), nx or bool(entry >> 63)
        if level == 1 or entry & 0x80:
            return (entry & _ADDRESS) // span * span, span, w, u, nx
        gpa = entry & _ADDRESS
    raise AssertionError


class TestLookup:
    @given(
        st.lists(st.tuples(_KINDS, _BITS), min_size=4, max_size=4), st.integers(0, (1 << 47) - 1)
    )
    def test_is_what_the_manual_says(self, path: list[tuple[str, int]], gva: int):
        allocator = MemoryTableAllocator(8)
        pt = PageTables(allocator)
        entries = allocator.entries(pt.root_gpa)
        for level, (kind, bits) in zip((4, 3, 2, 1), path, strict=True):
            index = gva >> (3 + 9 * level) & 511
            if kind == "absent":
                break
            if level == 1 or (kind == "leaf" and level < 4):
                ps = PTE_PS if level > 1 else 0
                entries[index] = 5 << 30 | bits | PTE_P | ps
                break
            below, child = allocator.allocate()
            entries[index] = below | bits | PTE_P
            entries = child
        found = pt.lookup(gva)
        expected = _oracle(allocator, pt.root_gpa, gva)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            flags = found.flags
            assert expected == (
                found.gpa, found.leaf_bytes, bool(flags & PTE_W), bool(flags & PTE_U),
                bool(flags & PTE_NX),
            )  # fmt: skip
            assert found.gva == gva // found.leaf_bytes * found.leaf_bytes


@pytest.fixture
def walk() -> Iterator[tuple[MemoryTableAllocator, Any]]:
    """An allocator, and a struct kvmmm_pt without a root."""
    allocator = MemoryTableAllocator(8)
    t = ffi.new("struct kvmmm_pt *")
    t.hva_delta = allocator.table_hva_delta
    yield allocator, t
    ffi.release(t)


class TestWholeTables:
    @pytest.mark.parametrize(("level", "span"), [(2, PAGE), (3, 1 << 21)])
    def test_split_says_what_the_superpage_said(
        self, walk: tuple[MemoryTableAllocator, Any], level: int, span: int
    ):
        allocator, t = walk
        gpa, entries = allocator.allocate()
        lib.kvmmm_pt_split(t, gpa, 7 << 30 | 0xE7 | PTE_NX, level)
        flags = (0xE7 if level == 3 else 0x67) | PTE_NX
        assert entries.tolist() == [(7 << 30) + i * span | flags for i in range(512)]

    @pytest.mark.parametrize("share", [False, True])
    def test_copy_takes_w_from_what_is_shared(
        self, walk: tuple[MemoryTableAllocator, Any], share: bool
    ):
        allocator, t = walk
        (src, entries), (dst, copy) = allocator.allocate(), allocator.allocate()
        for i in range(0, 512, 3):
            entries[i] = i << 12 | 0x67 | i % 2 << 63
        before = entries.tolist()
        lib.kvmmm_pt_copy(t, dst, src, share)
        assert entries.tolist() == before
        assert copy.tolist() == [e & ~PTE_W if share else e for e in before]

    def test_count_is_the_number_of_tables_below(self, walk: tuple[MemoryTableAllocator, Any]):
        allocator, t = walk
        tables = [allocator.allocate() for _ in range(6)]
        gpas = [gpa for gpa, _ in tables]
        top, left, right = tables[0][1], tables[1][1], tables[2][1]
        top[0], top[511], top[7] = gpas[1] | 1, gpas[2] | 7, 1 << 30 | 0x81
        left[1], left[2], left[3] = gpas[3] | 7, gpas[4] | 7, 1 << 21 | 0x81
        right[5] = gpas[5] | 5
        tables[5][1][0] = 0x1007
        assert [lib.kvmmm_pt_count(t, gpas[n], level) for n, level in ((0, 3), (1, 2), (5, 1))] == [
            6, 3, 1,
        ]  # fmt: skip


class TestWalks:
    def test_many_tables_emptied_by_one_call(self):
        # More than one answer of C has room for.
        n_tables = 300
        pt = PageTables(MemoryTableAllocator(512), max_leaf_bytes=PAGE)
        for i in range(n_tables):
            pt.map(i << 21, PAGE, i << 12, PTE_P)
        assert pt.n_tables == n_tables + 3
        assert pt.unmap(0, 1 << 30)
        assert (pt.n_tables, pt.n_quarantined) == (1, n_tables + 2)

    def test_a_map_below_existing_tables_needs_no_more_than_c(self, monkeypatch: Any):
        pt = PageTables(MemoryTableAllocator(8))
        pt.map(0, PAGE, 0, PTE_P)
        monkeypatch.setattr(PageTables, "_finish", None)
        assert not pt.map(PAGE, PAGE, 0x5000, PTE_P)
        assert not pt.map(2 * PAGE, 510 * PAGE, 0x7000, PTE_P)
        assert pt.protect(PAGE, PAGE, PTE_P | PTE_W)
        assert pt.unmap(PAGE, PAGE)
