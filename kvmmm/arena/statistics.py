"""`ArenaStatistics`: what an arena holds, and what has happened to it."""

from __future__ import annotations


class ArenaStatistics:
    """Figures of one arena at one moment. capacity = used + reserved + free.

    Attributes:
        capacity_bytes: Its size.
        used_bytes: Pages with a reference.
        reserved_bytes: Pages promised by a reservation and not used.
        free_bytes: The rest.
        peak_used_bytes: The highest `used_bytes` so far.
        largest_free_bytes: Length of the largest contiguous free range.
        allocation_count: Successful calls of `allocate`.
        free_count: Contiguous ranges whose last reference went.
        punched_bytes: What was given back to the host, summed up.
    """

    __slots__ = (
        "allocation_count",
        "capacity_bytes",
        "free_bytes",
        "free_count",
        "largest_free_bytes",
        "peak_used_bytes",
        "punched_bytes",
        "reserved_bytes",
        "used_bytes",
    )

    def __init__(
        self,
        *,
        capacity_bytes: int,
        used_bytes: int,
        reserved_bytes: int,
        peak_used_bytes: int,
        largest_free_bytes: int,
        allocation_count: int,
        free_count: int,
        punched_bytes: int,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = used_bytes
        self.reserved_bytes = reserved_bytes
        self.free_bytes = capacity_bytes - used_bytes - reserved_bytes
        self.peak_used_bytes = peak_used_bytes
        self.largest_free_bytes = largest_free_bytes
        self.allocation_count = allocation_count
        self.free_count = free_count
        self.punched_bytes = punched_bytes

    def __repr__(self) -> str:
        return f"ArenaStatistics({', '.join(f'{n}={getattr(self, n)}' for n in self.__slots__)})"
