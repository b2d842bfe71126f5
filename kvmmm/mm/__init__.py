"""The memory manager: what memory a guest has, where it lies, and how host and guest reach it.

Terms, as in gVisor's pkg/sentry/mm:

    vma   a range that may be accessed, and how: what mmap made
    pma   a range that is backed: these addresses are those frames of that file
    AS    the AddressSpace, a pure cache of pmas that a CPU uses; emptied at will, filled by faults

    fault ──► vma: may this access happen? ──► pma: which frames? (allocate) ──► AS: map_file

Invariants (`check_invariants`): vmas and pmas are page aligned, not empty, disjoint; an address
with a pma has a vma; a pma holds one reference on each of its frames; the AS never grants more
than the vma.

Lock order: `mapping_lock` (vmas) before `active_lock` (pmas, AS). Both are plain locks, taken by
faults and mm operations only. `_locked` functions list what they expect.

This package knows no KVM: the AS and the arena are given to it.
"""

from kvmmm.mm.manager import MemoryManager

__all__ = ["MemoryManager"]
