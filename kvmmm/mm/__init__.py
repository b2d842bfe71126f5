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
    before a pma goes, moves, loses a permission or changes its frames, the AS is unmapped there
    (`Removal`), and only then are references dropped
    a pma holds one reference on each of its frames; private frames that need no copy on write are
    one mm's alone, or pinned

Lock order, plain locks all of them, taken by faults and mm operations only:

    mapping_lock (vmas)
        a mappable's locks, other than those its translate takes
            active_lock (pmas, AS); two only in fork, the parent's first, then the new child's
                what translate takes; a file's and the arena's locks; the AS's

`_locked` functions list what they expect.

This package knows no KVM: the AS and the arena are given to it.
"""

from kvmmm.mm.manager import MemoryManager
from kvmmm.mm.policy import Policy
from kvmmm.safemem.ffi import IOOpts

__all__ = ["IOOpts", "MemoryManager", "Policy"]
