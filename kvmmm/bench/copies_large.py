"""`bench copies`: many bytes, beside the C library's memcpy between the same two buffers."""

from __future__ import annotations

import random
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING

from kvmmm.bench.case import EACH, RATIO, Case, Group
from kvmmm.bench.copies import START, GuestMemory, by_memcpy, empty_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmmm.bench.case import Probe, Sample

KIB, MIB = 1 << 10, 1 << 20
COPIES = {64 * KIB: 64, MIB: 4, 16 * MIB: 1}
"""By size: how many a time."""
REGIONS = {64 * KIB: (0, 128 * MIB), MIB: (128 * MIB, 128 * MIB), 16 * MIB: (256 * MIB, 256 * MIB)}
"""By size: where cold copies go in a cycle, and how many bytes that is: several times as much as a
last-level cache, which the largest ones sweep between any two of the others."""
ALL_BYTES = 512 * MIB

_NAMES = {64 * KIB: "64k", MIB: "1m", 16 * MIB: "16m"}
HOT, COLD, IN, OUT = "hot", "cold", "in", "out"
TIMES = tuple(
    f"{direction}_{name}_{heat}"
    for name in _NAMES.values()
    for heat in (HOT, COLD)
    for direction in (IN, OUT)
)

# Two buffers at the same offset modulo 4 KiB make loads wait for stores: so every copy has another.
_OFFSET_BYTES = 4096
_OFFSET_STEP_BYTES = 64


class Places:
    """Where one side copies: the same places as the other, the cold ones half a cycle apart.

    Args:
        is_second: Whether this side begins in the middle of the cycle.
    """

    def __init__(self, *, is_second: bool) -> None:
        self._cursors = {
            n_bytes: length_bytes // 2 * is_second for n_bytes, (_, length_bytes) in REGIONS.items()
        }
        # Both sides draw the same offsets.
        self._random = random.Random(0)

    def _offset(self) -> int:
        return self._random.randrange(0, _OFFSET_BYTES, _OFFSET_STEP_BYTES)

    def hot(self, n_bytes: int) -> list[int]:
        """Return addresses of copies, again and again almost the same."""
        start, _ = REGIONS[n_bytes]
        return [START + start + self._offset() for _ in range(COPIES[n_bytes])]

    def cold(self, n_bytes: int) -> list[int]:
        """Return addresses of copies, each where nobody was for half a cycle."""
        start, length_bytes = REGIONS[n_bytes]
        step = n_bytes + _OFFSET_BYTES
        places = []
        at = self._cursors[n_bytes]
        for _ in range(COPIES[n_bytes]):
            if at + step > length_bytes:
                at = 0
            places.append(START + start + at + self._offset())
            at += step
        self._cursors[n_bytes] = at
        return places


def _probe(
    places: Places,
    buffers: Mapping[int, bytearray],
    copy: Callable[[list[int], bytearray, bool], int],
) -> Probe:
    def probe() -> Sample:
        sample = {}
        for n_bytes, name in _NAMES.items():
            for heat, addresses in ((HOT, places.hot), (COLD, places.cold)):
                for direction in (IN, OUT):
                    buffer, wanted = buffers[n_bytes], addresses(n_bytes)
                    if heat == HOT:
                        copy(wanted, buffer, direction == OUT)
                    ns = copy(wanted, buffer, direction == OUT)
                    sample[f"{direction}_{name}_{heat}"] = ns / len(wanted)
        return sample

    return probe


@contextmanager
def _beside_memcpy() -> Iterator[Mapping[str, Probe]]:
    with GuestMemory(ALL_BYTES) as memory:
        mm = memory.mm
        # The same for both sides, so that both have it at the same place in the caches.
        buffers = {n_bytes: bytearray(n_bytes) for n_bytes in COPIES}

        def by_mm(addresses: list[int], buffer: bytearray, is_out: bool) -> int:
            start_ns = perf_counter_ns()
            if is_out:
                for addr in addresses:
                    mm.copy_out(addr, buffer)
            else:
                for addr in addresses:
                    mm.copy_in(addr, buffer)
            return perf_counter_ns() - start_ns - empty_loop(addresses, 1)

        def in_c(addresses: list[int], buffer: bytearray, is_out: bool) -> int:
            return by_memcpy([memory.hva_of(addr) for addr in addresses], buffer, out=is_out)

        yield {
            "ours": _probe(Places(is_second=False), buffers, by_mm),
            "memcpy": _probe(Places(is_second=True), buffers, in_c),
        }


GROUPS = (
    Group(
        "copies: many bytes",
        (
            Case(
                "copies/large_memcpy", unit=RATIO, goal=0.95, better="higher", each=TIMES,
                product=("memcpy", EACH), floor=("ours", EACH),
                note="throughput of copy_in and copy_out divided by memcpy's; the worst of 64 KiB, "
                "1 and 16 MiB, hot and cold (through 128 and 256 MiB)",
            ),
        ),
        open=_beside_memcpy, rounds=100, quick_rounds=10, warm_up=2,
    ),
)  # fmt: skip
"""Three sizes, hot and cold, both ways."""
