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
entries are permissive (P|W|U|A), so the leaf alone decides; but a link without W leads to a table
that is shared (below). A and D are set in advance, which spares the CPU a locked write to the
table.

    pte        bits, spans, flags from access bits, text
    allocator  where table pages come from
    ranges     which addresses there are, and what is wrong with others
    share      what the spaces on one allocator have in common: links to shared tables
    tree       tables: new ones, copies, their ends
    scan       all leaves of a range
    tables     `PageTables`, what everybody else uses
    walk       `PageWalk`, host addresses by the tables, for copies
    dump       one line a run

The walks are C (`_native/pagetable.c`): they read and write entries, and stop where a table is
needed. Then `tree` prepares one, links it, and has the walk go on. A map below existing tables, of
one page or a table's 512, is one call.

Invariants, between calls:
    - Every table but the root holds at least one entry.
    - An entry is 0, a leaf, or a link to a table; absent entries hold no notes of ours.
    - Every path to a table that two links lead to has a link without W. What lies below a link
      without W is never written.
    - `n_tables` counts the tables that can be reached from the root, the root included.

**Forks.** Parent and child get new roots over the same lower tables, W cleared in the roots. Who
wants to change something below takes copies of his own, down to the table in question; a copy has
no W in any entry, so what *it* links to is shared in turn. The same at the last holder: a table is
not written again once it was shared. An unmap that takes all of a shared table just drops the link.

**What may be edited where it stands.** CPUs walk the tables meanwhile, and remember (SDM Vol. 3A
4.10); and a KVM that shadows page tables remembers more. It keeps a shadow page for each table, by
the table's frame number, and shadow links between them; it never looks at a host's edits, and a
shootdown of data frames empties shadow leaves, not shadow links. So an old shadow link leads on to
the shadow of a table that *others* fill again: another space that shares the table, or the table
that the frame became later. Then an address that was unmapped translates again, to somebody else's
page. (All of it was seen to happen: after a split, an unmap or a downgrade of a superpage that
another space maps as well; after a link to a shared table was changed or dropped in place; after a
table emptied by an ordinary unmap became a table elsewhere.) Hence, while tables are `live`:

    - Edited in place: 4 KiB leaves of a table that is this space's alone; absent entries, filled;
      a link to a table of its own that an unmap emptied, cleared.
    - All else (superpages, links) is edited in copies of every table on the path, under a new root.
      `root_gpa` changes, and the caller has the CPUs load it: a root that KVM has never seen.
    - A frame that was a table keeps its place until KVM was made to drop all shadow pages (a *zap*:
      a memslot deleted). An emptied table is parked, and comes back only at the same level and
      address of the same space. All others wait: `n_quarantined`, `recycle`, `release`.

Hence the order of stores, too:
    - Every store is one aligned 8-byte store: the CPU's table walk never sees half an entry.
    - Tables are complete before they are linked, by one store. So a split superpage goes from old
      to new at once, and what stays in it keeps its translation throughout.

After removal or downgrade the *caller* must shoot translations down; whether he must is what `map`,
`unmap` and `protect` return. A CPU caches no absent entries: what only adds needs nothing. Nobody
else may write the tables: C follows links without asking the allocator.

Source: SDM Vol. 3A chapter 4; Linux arch/x86/kvm/mmu (kvm_mmu_get_child_sp); gVisor
pkg/ring0/pagetables (decomposition, and what `map` answers).
"""

from __future__ import annotations

from kvmmm.pagetables.allocator import MemoryTableAllocator, TableAllocator
from kvmmm.pagetables.scan import MappedRun, Translation
from kvmmm.pagetables.share import TableShares
from kvmmm.pagetables.tables import PageTables

__all__ = [
    "MappedRun",
    "MemoryTableAllocator",
    "PageTables",
    "TableAllocator",
    "TableShares",
    "Translation",
]
