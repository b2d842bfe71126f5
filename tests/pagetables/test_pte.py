from __future__ import annotations

import pytest

from kvmmm.hostarch.access import (
    ANY_ACCESS,
    EXECUTE,
    NO_ACCESS,
    READ,
    READ_EXECUTE,
    READ_WRITE,
    WRITE,
    effective,
)
from kvmmm.pagetables import pte
from kvmmm.pagetables.pte import (
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_U,
    PTE_W,
    access_of,
    decode_entry,
    flags_of,
    flags_str,
)


def test_bits_are_the_manuals():
    names = ["P", "W", "U", "PWT", "PCD", "A", "D", "PS", "G"]
    assert {n: getattr(pte, f"PTE_{n}") for n in names} == {n: 1 << i for i, n in enumerate(names)}
    assert pte.PTE_NX == 1 << 63
    assert [bit for bit in range(64) if pte.PTE_ADDRESS_MASK >> bit & 1] == list(range(12, 52))


def test_spans_are_512_of_the_level_below():
    spans = [
        pte.PTE_SPAN_BYTES,
        pte.PDE_SPAN_BYTES,
        pte.PDPTE_SPAN_BYTES,
        pte.PML4E_SPAN_BYTES,
    ]
    assert spans == [4096 * 512**i for i in range(4)]
    assert spans == [1 << shift for shift in pte.LEVEL_SHIFTS[1:]]


@pytest.mark.parametrize(
    ("access", "flags"),
    [
        (READ, PTE_NX),
        (READ_WRITE, PTE_W | PTE_NX),
        (WRITE, PTE_W | PTE_NX),
        (READ_EXECUTE, 0),
        (EXECUTE, 0),
        (ANY_ACCESS, PTE_W),
    ],
)
def test_flags_of_presets_accessed_and_dirty(access: int, flags: int):
    assert flags_of(access, user=False) == flags | PTE_P | PTE_A | PTE_D
    assert flags_of(access, user=True) == flags | PTE_P | PTE_A | PTE_D | PTE_U


def test_no_access_is_an_absent_entry():
    assert flags_of(NO_ACCESS, user=True) == 0
    assert access_of(0) == NO_ACCESS


@pytest.mark.parametrize("access", range(8))
def test_access_of_inverts_flags_of(access: int):
    assert access_of(flags_of(access, user=True)) == effective(access)


def test_flags_str_names_permissions_and_ring():
    assert flags_str(flags_of(READ_EXECUTE, user=True)) == "r-x U"
    assert flags_str(flags_of(READ_WRITE, user=False)) == "rw- S"


@pytest.mark.parametrize(
    ("entry", "level", "text"),
    [
        (0, 4, "PML4E absent"),
        (0x5000, 1, "PTE absent (0x5000)"),
        (0x5067, 2, "PDE 0x5000 table P W U A D"),
        (0x8000_0000_0020_00E1, 2, "PDE 0x200000 2M P A D NX"),
        (0x4000_0181, 3, "PDPTE 0x40000000 1G P G"),
        (0x1000_0081, 4, "PML4E 0x10000000 reserved P"),
        (0x7019, 1, "PTE 0x7000 4K P PWT PCD"),
        (0x7081, 1, "PTE 0x7000 4K PAT P"),
    ],
)
def test_decode_entry_names_every_bit(entry: int, level: int, text: str):
    assert decode_entry(entry, level) == text
