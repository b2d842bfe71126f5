"""Page-table entries: their bits, the spans they cover, and the way from access bits to flags.

Source: SDM Vol. 3A 4.5.4, tables 4-15 to 4-20.
"""

from __future__ import annotations

from kvmmm.hostarch.access import ANY_ACCESS, EXECUTE, READ, WRITE, access_str

PTE_P = 1 << 0
"""Present. While it is 0 the CPU ignores all other bits."""
PTE_W = 1 << 1
"""Writes allowed, if every level says so."""
PTE_U = 1 << 2
"""User-mode accesses allowed, if every level says so."""
PTE_PWT = 1 << 3
PTE_PCD = 1 << 4
PTE_A = 1 << 5
"""Accessed. Set by the CPU when it uses the entry, by us in advance."""
PTE_D = 1 << 6
"""Dirty, leaves only. With W=0 and CR4.CET=1 it would mean a shadow stack: we never set CR4.CET."""
PTE_PS = 1 << 7
"""In a PDE or PDPTE: this entry is a leaf. (In a PTE the same bit is PAT, which we do not use.)"""
PTE_G = 1 << 8
PTE_NX = 1 << 63
"""Fetches forbidden, if any level says so. Needs EFER.NXE; reserved without it."""
PTE_ADDRESS_MASK = 0x000F_FFFF_FFFF_F000
"""Bits 51:12. A CPU with a smaller MAXPHYADDR faults on address bits beyond it (RSVD)."""

LEAF_FLAGS = PTE_P | PTE_W | PTE_U | PTE_PWT | PTE_PCD | PTE_A | PTE_D | PTE_G | PTE_NX
"""What a caller may ask for. PS is not among them: the size of a leaf is ours to choose."""
TABLE_FLAGS = PTE_P | PTE_W | PTE_U | PTE_A
"""The permissive flags of an entry that links to a table."""
HARDWARE_FLAGS = PTE_A | PTE_D
"""What the CPU sets by itself: no difference between two leaves."""

ENTRIES_PER_TABLE = 512
TABLE_BYTES = 4096
GPA_LIMIT = 1 << 52

PTE_SPAN_BYTES = 1 << 12
PDE_SPAN_BYTES = 1 << 21
PDPTE_SPAN_BYTES = 1 << 30
PML4E_SPAN_BYTES = 1 << 39

ROOT_LEVEL = 4
LEVEL_SHIFTS = (0, 12, 21, 30, 39)
"""By level: PT is 1, PD 2, PDPT 3, PML4 4. An entry of a level covers `1 << shift` bytes."""
LEVEL_NAMES = ("", "PTE", "PDE", "PDPTE", "PML4E")
SPAN_NAMES = {PTE_SPAN_BYTES: "4K", PDE_SPAN_BYTES: "2M", PDPTE_SPAN_BYTES: "1G"}

_FLAG_NAMES = (
    (PTE_P, "P"),
    (PTE_W, "W"),
    (PTE_U, "U"),
    (PTE_PWT, "PWT"),
    (PTE_PCD, "PCD"),
    (PTE_A, "A"),
    (PTE_D, "D"),
    (PTE_G, "G"),
    (PTE_NX, "NX"),
)


def flags_of(access: int, *, user: bool) -> int:
    """Return the leaf flags that permit `access`.

    x86 cannot withhold reading from what is present, so any access permits it.

    Args:
        access: `kvmmm.hostarch.access` bits.
        user: Whether ring 3 may use the page.

    Returns:
        P|A|D and W, U, NX as needed; 0, an absent entry, for no access at all.
    """
    if not access & ANY_ACCESS:
        return 0
    flags = PTE_P | PTE_A | PTE_D
    if access & WRITE:
        flags |= PTE_W
    if not access & EXECUTE:
        flags |= PTE_NX
    if user:
        flags |= PTE_U
    return flags


def access_of(flags: int) -> int:
    """Return the access that `flags` permit, from a ring that may use the page at all."""
    if not flags & PTE_P:
        return 0
    return READ | (WRITE if flags & PTE_W else 0) | (0 if flags & PTE_NX else EXECUTE)


def flags_str(flags: int) -> str:
    """Return `flags` for people: `r-x U`; `S` instead of `U` where only ring 0 to 2 may go."""
    return f"{access_str(access_of(flags))} {'U' if flags & PTE_U else 'S'}"


def decode_entry(entry: int, level: int) -> str:
    """Return one entry as text, every bit named: `PDE 0x400000 2M P W U A D NX`.

    Args:
        entry: The entry's 64 bits.
        level: Of the table that holds it, 1 (PT) to 4 (PML4).
    """
    name = LEVEL_NAMES[level]
    if not entry & PTE_P:
        return f"{name} absent" if not entry else f"{name} absent ({entry:#x})"
    if level == 1:
        # Here the bit of PS is PAT.
        kind = "4K PAT" if entry & PTE_PS else "4K"
    elif entry & PTE_PS:
        kind = SPAN_NAMES.get(1 << LEVEL_SHIFTS[level], "reserved")
    else:
        kind = "table"
    flags = " ".join(text for bit, text in _FLAG_NAMES if entry & bit)
    return f"{name} {entry & PTE_ADDRESS_MASK:#x} {kind} {flags}"
