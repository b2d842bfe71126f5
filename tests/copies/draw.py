"""What steps are drawn from: sizes and addresses where something may go wrong."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.model.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.copies.world import World

LIMIT = 1 << 64
MAX_BYTES = 256 << 10
SMALL = (
    0, 1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 64, 65, 127, 128, 129, 255,
    256, 300, 500, 511, 511, 512, 512, 513, 1000, 2048, 4000, 4095, 4095, 4096, 4096, 4097, 4097,
    8191, 8192, 8193,
)  # fmt: skip
LARGE = (12288, 20000, 32767, 32768, 32769, 65535, 65536, 65537, 100_000, 131_072, 262_143, 262_144)
LARGE_SHARE = 0.05
_STREAM = random.Random(1).randbytes(MAX_BYTES + (64 << 10))


def pattern(seed: int, n_bytes: int) -> bytes:
    """Bytes that look like nothing else; one in 256 is zero."""
    return _STREAM[seed : seed + n_bytes]


class Draw:
    """A generator of random numbers that knows what the memory looks like."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng = rng
        self.world = world
        self._recent: list[int] = [0]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.random() * len(values))]

    def sample(self, values: Sequence[Any], n: int) -> list[Any]:
        return self.rng.sample(values, n)

    def weighted(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def upto(self, n: int) -> int:
        """A number from 0 to n."""
        return self.rng.randint(0, n)

    def seed(self) -> int:
        return self.upto(60_000)

    def who(self) -> int:
        return self.upto(1) if self.chance(0.5) else 0

    def size(self) -> int:
        if self.chance(LARGE_SHARE):
            return int(self.pick((*LARGE, self.upto(MAX_BYTES))))
        if self.chance(0.1):
            return self.upto(9000)
        return int(self.pick(SMALL))

    def pages(self, who: int) -> tuple[int, int]:
        """(first page, how many) of a part of a mapping, or of what lies around it."""
        vmas = self.world.model(who).vmas()
        if not vmas or self.chance(0.05):
            return self.pick(self.world.backend.hoods), self.pick((1, 2, 8))
        start, end, _ = self.pick(vmas)
        page = self.pick((start, end - 1, self.rng.randrange(start, end)))
        if self.chance(0.1):
            page = min(end, self.world.models[0].n_pages - 1)
        return page, self.pick((1, 1, 2, 3, 8, 20, 66, end - start))

    def address(self, who: int, n_bytes: int) -> int:
        """Where `n_bytes` begin: mostly so that something changes on the way."""
        return max(min(self._address(who, n_bytes), LIMIT - 1), 0)

    def _address(self, who: int, n_bytes: int) -> int:
        choice = self.rng.random()
        vmas = self.world.model(who).vmas()
        if choice < 0.02 or not vmas:
            return self._wild(n_bytes)
        if choice < 0.25:
            return int(self.pick(self._recent)) + int(self.pick((0, 0, 0, 1, -1, 4, 64, -n_bytes)))
        start, end, _ = self.pick(vmas)
        if choice < 0.35:
            pmas = list(self.world.subjects[0].mm(who).pmas.segments(start * PAGE, end * PAGE))
            edge = self.pick(pmas)[self.upto(1)] if pmas else start * PAGE
        elif choice < 0.6:
            edge = self.pick((start, end)) * PAGE
        else:
            edge = self.rng.randrange(start, end) * PAGE
        shift = self.pick(
            (0, 0, 0, 1, -1, 4, -4, 8, -8, -64, -n_bytes, 1 - n_bytes, -1 - n_bytes,
             -(n_bytes // 2), self.upto(PAGE - 1), self.upto(PAGE - 1))
        )  # fmt: skip
        addr = int(edge) + int(shift)
        self._recent.append(addr)
        del self._recent[:-12]
        return addr

    def _wild(self, n_bytes: int) -> int:
        limit = self.world.backend.max_addr
        edge = self.pick((0, PAGE, limit, limit, LIMIT, LIMIT, 1 << 63, 1 << 32, 1 << 47))
        shift = (0, -1, 1, -n_bytes, 1 - n_bytes, -1 - n_bytes, -4, -PAGE)
        return int(edge) + int(self.pick(shift))
