"""x86-64 page tables, four levels, edited by the host. No KVM in here, no guest, no locks.

How a guest-virtual address is split (SDM Vol. 3A 4.5.4). A table is one 4 KiB page of 512 entries:

     63          48 47       39 38       30 29       21 20       12 11           0
    +--------------+-----------+-----------+-----------+-----------+--------------+
    | copies of 47 |   PML4    |   PDPT    |    PD     |    PT     |    offset    |
    +--------------+-----------+-----------+-----------+-----------+--------------+
                     level 4     level 3     level 2     level 1
      one entry      512 GiB     1 GiB       2 MiB       4 KiB
      a leaf?        never       if PS=1     if PS=1     always

Bits 63:48 repeat bit 47, which leaves two halves and a hole that no instruction can name:

    [0x0000000000000000, 0x0000800000000000)   lower half
    [0x0000800000000000, 0xffff800000000000)   not canonical: refused, as is a range across it
    [0xffff800000000000, 2**64)                upper half

An entry (SDM Vol. 3A table 4-20 for a PTE; the others differ in PS and in the low address bits):

     63 62     52 51                                12 11   9 8 7  6 5 4   3   2 1 0
    +--+---------+------------------------------------+------+-+--+-+-+---+---+-+-+-+
    |NX| ignored | guest-physical address, bits 51:12 | ign. |G|PS|D|A|PCD|PWT|U|W|P|
    +--+---------+------------------------------------+------+-+--+-+-+---+---+-+-+-+

What the CPU permits is W and U of all levels together (AND), NX of any level (OR). Our upper
entries are permissive (P|W|U|A), so the leaf alone decides. A and D are set in advance, which
spares the CPU a locked write to the table.

    pte        bits, spans, flags from access bits, text
    allocator  where table pages come from
    walker     one walk of a range through the levels, and runs of leaves
    edit       the three walks that write: map, unmap, protect
    scan       the two that read: one address, all leaves of a range
    tables     `PageTables`, what everybody else uses
    dump       one line a run

Invariants, between calls:
    - Every table but the root holds at least one entry, and is pointed to by exactly one.
    - An entry is 0, a leaf, or a link to a table; absent entries hold no notes of ours.
    - `n_tables` counts the tables that can be reached from the root, the root included.

Tables may be live under a running vCPU. Hence the order of stores:
    - A single entry is one aligned 8-byte store: an item of a memoryview "Q". A run is one memcpy
      to an 8-byte aligned place, whose stores are of one or several whole entries, cut at cache
      lines only: the CPU's table walk never sees half an entry.
    - A new table is filled first, then its parent entry is stored. So a split superpage goes from
      old to new in one store, and what stays in it keeps its translation throughout. x86 keeps
      stores in order, and each is a call of its own into the interpreter: no compiler moves it.
    - An entry is cleared first, then its table is retired. A CPU may go on walking a retired table
      out of its paging-structure caches (SDM Vol. 3A 4.10.3), so it goes back to the allocator only
      when the caller says, by `PageTables.recycle`, that the shootdown is done.

After removal or downgrade the *caller* must shoot translations down; whether he must is what `map`,
`unmap` and `protect` return. A CPU caches no absent entries: what only adds needs nothing.

Source: SDM Vol. 3A chapter 4; gVisor pkg/ring0/pagetables (decomposition, and what `map` answers).
"""

from __future__ import annotations

from kvmmm.pagetables.allocator import MemoryTableAllocator, TableAllocator
from kvmmm.pagetables.scan import MappedRun, Translation
from kvmmm.pagetables.tables import PageTables

__all__ = [
    "MappedRun",
    "MemoryTableAllocator",
    "PageTables",
    "TableAllocator",
    "Translation",
]
