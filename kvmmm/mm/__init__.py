"""The memory manager: what memory a guest has, where it lies, and how host and guest reach it.

Terms, as in gVisor's pkg/sentry/mm:

    vma   a range that may be accessed, and how: what mmap made
    pma   a range that is backed: these addresses are those frames of that file
    AS    the AddressSpace, a pure cache of pmas that a CPU uses; emptied at will, filled by faults

    fault ──► vma: may this access happen? ──► pma: which frames? ──► AS: map_file
                                                 allocate | translate | copy on write

Invariants (`check_invariants`; after every operation with KVMMM_DEBUG=1):

    vmas and pmas are page aligned, not empty, disjoint; an address with a pma has a vma
    a pma follows its vma's permissions, without WRITE while it needs a copy on write
    the AS never grants more than the pma, and nothing where there is none
    copies find nothing that the pma does not permit: the frame table and the mirror are caches as
    the AS is
    before a pma goes, moves, loses a permission or changes its frames, copies have left it, then
    the AS is unmapped there (`Removal`), and only then are references dropped
    a pma holds one reference on each of its frames; private frames that need no copy on write are
    one mm's alone, or pinned

Lock order, plain locks both of them, taken by faults and mm operations only:

    mapping_lock (vmas)
        a mappable's locks, other than those its translate takes
            active_lock (pmas, AS); two only in fork, the parent's first, then the new child's
                what translate takes; a file's and the arena's locks; the AS's

`_locked` functions list what they expect.

A copy of memory that was copied before takes no lock at all: it looks up and moves in C, in the
*read section* (`enter_copy`; nothing where the GIL is held throughout). Whoever takes frames away
clears what copies look up, and waits until the section is empty (`forget`), active_lock held. A
copy leaves the section before it takes a lock. A Reader or Writer runs inside it, so the locks
refuse its thread (`GuardedLock`) rather than have it wait for itself.

This package knows no KVM: the AS and the arena are given to it.
"""

from kvmmm.mm.manager import MemoryManager
from kvmmm.mm.policy import Policy
from kvmmm.safemem.ffi import IOOpts

__all__ = ["IOOpts", "MemoryManager", "Policy"]
