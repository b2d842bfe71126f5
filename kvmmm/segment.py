"""`SegmentSet`: an ordered map from disjoint half-open ranges to values.

vmas, pmas, reference counts and free space are all interval maps, and all are this one. It is a C
type (`_native/segment.h` has its structure, `_core.pyi` its documentation): segments lie in blocks
of at most 256, three arrays each, under one array of the blocks' first addresses. A lookup is two
bisections and creates nothing but its answer; a change moves a few hundred words, whatever the size
of the set. One flat list would move 100 000.

Source: the interface of gVisor's pkg/segment, with (start, end) in place of iterators.
"""

from __future__ import annotations

from kvmmm.safemem.ffi import SegmentSet

__all__ = ["SegmentSet"]
