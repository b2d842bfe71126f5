"""The memory behind a VM: one sealed, sparse memfd and one linear mapping of all of it.

Guest frames, page-table pages and stub pages all come from an `Arena`. The mapping is at once the
memslots' userspace address and the host's way to the bytes: file offset fo is at `arena.hva + fo`.
Size and mapping never change while it lives, so an address computed once stays right.

A page is in one of three states:

    free ──allocate──► used: 1 or more references, zero-filled when it came
     │ ▲                 │ ▲
     │ └──last dec_ref───┘ │ the last dec_ref of a page inside a reservation gives it back to that
     └─reserve─► reserved ─┘ allocate(at=, reservation=)

Reserved pages are promised to one owner and cost nothing: a memslot window can grow over contiguous
offsets without committing them. A page that loses its last reference is punched out at once: its
memory goes back to the host, and every mapping of it (the host's, KVM's) is dropped. With
KVMMM_DEBUG=1 it is filled with 0xdb instead and punched when it is allocated again, so that a use
after free shows.

Who holds what: the arena owns fd and mapping, and may have several owners itself (`share`). Whoever
allocates a range, or calls `inc_ref`, owns a reference on each of its pages, and drops it after the
last translation to the page is gone (the arena knows no translations). Views hold the mapping:
`close` refuses while one is out. VMs with memslots over the mapping must be closed first.

Every public method may be called from any thread; one plain lock covers the bookkeeping and is held
across punching, so that nobody is given a page that is about to be punched.

    memfd.py       the sealed file
    free_space.py  free pages, and where an allocation fits
    usage.py       which pages are free, reserved or used; pure bookkeeping
    frames.py      allocation and references over a file
    statistics.py  the figures
    arena.py       `Arena`: all of it put together, and the bytes
"""

from kvmmm.arena.arena import Arena
from kvmmm.arena.statistics import ArenaStatistics
from kvmmm.arena.usage import Reservation

__all__ = ["Arena", "ArenaStatistics", "Reservation"]
