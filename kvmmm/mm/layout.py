"""Where mappings go by themselves, and how much there may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.errors import RangeError
from kvmmm.hostarch.addr import PAGE_MASK

if TYPE_CHECKING:
    from kvmmm.hostarch.ranges import AddrRange

UNLIMITED = 1 << 64
"""A limit that is none (RLIM_INFINITY)."""

LOWEST_PLACED = 64 << 10
"""Nothing is placed below by itself, so that a null pointer's neighbourhood faults."""

DEFAULT_STACK_BYTES = 8 << 20
"""The stack's size where RLIMIT_STACK is none."""

MAX_STACK_BYTES = 128 << 20
"""The most that a stack gets: it does not grow, all of it is mapped at once."""


class Layout:
    """The shape of an address space. Immutable.

    Source: gVisor arch.MmapLayout.

    Attributes:
        min_addr: Nothing is mapped below.
        max_addr: Exclusive end of application space.
        bottom_up_base: Where searching upwards starts; by default `min_addr`, but not below
            `LOWEST_PLACED`.
        top_down_base: Where searching downwards starts (exclusive); by default `max_addr`.
        top_down: Which of the two is tried first.
        hole: A range in between that can never be memory; None for none.
    """

    __slots__ = ("bottom_up_base", "hole", "max_addr", "min_addr", "top_down", "top_down_base")

    def __init__(
        self, min_addr: int, max_addr: int, *, bottom_up_base: int | None = None,
        top_down_base: int | None = None, top_down: bool = False, hole: AddrRange | None = None,
    ) -> None:  # fmt: skip
        self.min_addr = min_addr
        self.max_addr = max_addr
        if bottom_up_base is None:
            bottom_up_base = max(min_addr, min(LOWEST_PLACED, max_addr))
        self.bottom_up_base = bottom_up_base
        self.top_down_base = max_addr if top_down_base is None else top_down_base
        self.top_down = top_down
        self.hole = hole
        for addr in (min_addr, max_addr, self.bottom_up_base, self.top_down_base):
            if addr & PAGE_MASK or not min_addr <= addr <= max_addr:
                raise RangeError(min_addr, max_addr, f"{addr:#x} does not belong into a layout")

    def hole_in(self, start: int, end: int) -> AddrRange | None:
        """Return the hole, if [start, end) reaches into it."""
        hole = self.hole
        return hole if hole is not None and start < hole.end and hole.start < end else None


class Limits:
    """Resource limits, as setrlimit(2) has them; may be changed at any time.

    Attributes:
        address_space_bytes: RLIMIT_AS, for mmap, mremap and brk.
        data_bytes: RLIMIT_DATA, for the heap only.
        locked_bytes: RLIMIT_MEMLOCK.
        stack_bytes: RLIMIT_STACK, the size that `map_stack` gives (8 MiB for none, at most 128).
        may_lock_all: CAP_IPC_LOCK: no limit to locking.
    """

    __slots__ = (
        "address_space_bytes", "data_bytes", "locked_bytes", "may_lock_all", "stack_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.address_space_bytes = UNLIMITED
        self.data_bytes = UNLIMITED
        self.locked_bytes = UNLIMITED
        self.stack_bytes = DEFAULT_STACK_BYTES
        self.may_lock_all = False
