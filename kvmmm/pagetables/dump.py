"""Page tables as text, one line a run, for debugging and for `kvmmm doctor`.

    0x0000000000200000-0x0000000000201000 -> 0x200000  4K r-x U
    0x0000000000400000-0x0000000004000000 -> 0x400000  2M rw- U
    0x0000000004000000-0x0000000004001000 -> 0x4000000  4K rw- S

Guest-virtual range, guest-physical start, size of the leaves, effective permissions, and U where
ring 3 may go (S where it may not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.addr import ADDRESS_LIMIT
from kvmmm.pagetables.pte import LEVEL_SHIFTS, PTE_ADDRESS_MASK, PTE_P, PTE_PS, decode_entry

if TYPE_CHECKING:
    from kvmmm.pagetables.allocator import TableAllocator
    from kvmmm.pagetables.tables import PageTables


def render_mappings(tables: PageTables, start: int = 0, end: int = ADDRESS_LIMIT) -> str:
    """Return what `tables` map in [start, end), guest-virtual; empty text where nothing is."""
    return "\n".join(repr(run) for run in tables.mappings(start, end))


def render_walk(allocator: TableAllocator, root_gpa: int, gva: int) -> str:
    """Return every entry that the CPU reads on its way to `gva`, top down, one a line.

    Raw: what the tables hold, with no opinion on it. For the question why an access faulted.

    Args:
        allocator: Whose tables they are.
        root_gpa: Guest-physical address of the PML4.
        gva: Guest-virtual, any byte.
    """
    lines = []
    table_gpa = root_gpa
    for level in (4, 3, 2, 1):
        index = (gva >> LEVEL_SHIFTS[level]) & 511
        entry = allocator.entries(table_gpa)[index]
        lines.append(f"{table_gpa:#x}[{index:3}] = {entry:#018x}  {decode_entry(entry, level)}")
        if not entry & PTE_P or entry & PTE_PS:
            break
        table_gpa = entry & PTE_ADDRESS_MASK
    return "\n".join(lines)
