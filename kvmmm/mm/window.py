"""Where private memory is allocated: how much around a fault, and at which offsets of the arena.

A fault does not allocate a page but a window around it: 2 MiB at first, doubling while faults go
upwards through a vma, so that touching 64 MiB in order takes a handful of faults. Frames are
reserved file range, not memory: nothing is committed until the guest touches it.

Address and file offset agree modulo 2 MiB, so that the host may back the guest with huge pages,
and page tables may use superpages. Where the arena has room, an mm's frames lie at one fixed
distance from their addresses (its *home*), so that neighbouring windows are one pma and could be
one memslot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import ArenaExhaustedError
from kvmmm.hostarch.addr import HUGE_PAGE_BYTES, align_down

if TYPE_CHECKING:
    from kvmmm.arena import Arena, Reservation
    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.mm.pma import Pma

MAX_WINDOW_BYTES = 16 << 20
"""Where doubling ends, in a vma below 1 GiB; 1/64 of a larger one."""


class Home:
    """Arena offsets reserved for one mm: address + delta, as long as nobody sits there.

    Nothing is committed by it. It makes windows that touch in the guest touch in the arena.
    """

    __slots__ = ("arena", "delta", "reservation")

    def __init__(self, arena: Arena, reservation: Reservation, start: int) -> None:
        self.arena = arena
        self.reservation = reservation
        self.delta = reservation.start - start

    def allocate(self, start: int, length_bytes: int) -> FileRange | None:
        """Return the frames at home for such a range of addresses, or None if they are taken."""
        try:
            return self.arena.allocate(
                length_bytes, at=start + self.delta, reservation=self.reservation
            )
        except ArenaExhaustedError:
            return None


class Window:
    """How much the next fault should allocate; remembers where the last one ended.

    Guarded by active_lock.

    Attributes:
        fresh: The pma that was allocated last. It has no addresses: what lies at the same distance
            from its frames, under the same rules, has this one too.
    """

    __slots__ = ("fresh", "length_bytes", "next_start")

    def __init__(self) -> None:
        self.fresh: Pma | None = None
        self.length_bytes = 0
        self.next_start = -1

    def place(
        self, addr: int, gap: tuple[int, int], vma_bytes: int, least_bytes: int
    ) -> tuple[int, int]:
        """Return the window for a fault at `addr`, inside the unbacked range `gap` of one vma.

        Args:
            addr: Faulting address.
            gap: [start, end) around it, page aligned, without pmas, within the vma.
            vma_bytes: Length of the vma.
            least_bytes: The least that a fault should map, a power of two of at least 2 MiB.
        """
        start = addr & -HUGE_PAGE_BYTES
        length = least_bytes
        if start == self.next_start:
            length = min(self.length_bytes * 2, max(MAX_WINDOW_BYTES, vma_bytes >> 6))
            length = max(align_down(length, HUGE_PAGE_BYTES), least_bytes)
        elif least_bytes > HUGE_PAGE_BYTES:
            start = align_down(addr, least_bytes)
        end = start + length
        self.next_start = end
        self.length_bytes = length
        return max(start, gap[0]), min(end, gap[1])
