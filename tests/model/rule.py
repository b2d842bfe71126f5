"""`Rule`, the list of all of them, and what their arguments are drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import READ, READ_WRITE, WRITE
from tests.model.domains import Between, Domain, Either, OneOf
from tests.model.memory import PAGE
from tests.model.world import MAX_MEMBERS, World

if TYPE_CHECKING:
    from collections.abc import Callable

BIG = 1 << 52
"""Pages: an address space, and it wraps."""
WHO = Between(0, MAX_MEMBERS - 1)
AT = Either(Between(0, 95), Between(96, 250), Between(96, 250), Between(96, 150))
COUNT = Either(
    Between(1, 4), Between(1, 4), Between(1, 24), Between(1, 24), Between(1, 1100),
    OneOf(*[1] * 15, 0, BIG),
)  # fmt: skip
FEW = Either(Between(1, 4), Between(0, 24))
SKEW = OneOf(*[0] * 60, 1, 2048)
PERMS = OneOf(*[READ_WRITE] * 4, 7, 5, *range(8))
MAX_PERMS = OneOf(*[7] * 20, READ, READ_WRITE, WRITE, 0)
OFFSET = Either(Between(0, 16), Between(PAGE - 16, PAGE - 1), Between(0, PAGE - 1))
LENGTH = Either(OneOf(1, 2, 4, 8), OneOf(1, 2, 4, 8), Between(1, 40), OneOf(4096, 5000, 9000))
SEED = Between(1, 255)
FLAG = OneOf(False, True)
SELDOM = OneOf(*[False] * 9, True)
LOCK = OneOf(*[None] * 8, 0, 1, 2)
PATTERN = bytes(range(256)) * 40


class Rule:
    """A rule: its name, function, domains, weight, and when it makes sense."""

    def __init__(
        self, act: Callable[..., None], weight: int, when: Callable[[World], bool],
        domains: dict[str, Domain],
    ) -> None:  # fmt: skip
        self.name = act.__name__
        self.act = act
        self.weight = weight
        self.when = when
        self.domains = domains


RULES: list[Rule] = []


def rule(
    weight: int = 1, when: Callable[[World], bool] = lambda world: bool(world.members),
    **domains: Domain,
) -> Callable[[Callable[..., None]], Callable[..., None]]:  # fmt: skip
    def register(act: Callable[..., None]) -> Callable[..., None]:
        RULES.append(Rule(act, weight, when, domains))
        return act

    return register
