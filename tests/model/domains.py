"""Arguments of rules: what hypothesis draws them from, and `random`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hypothesis import strategies as st

if TYPE_CHECKING:
    import random


class Domain(Protocol):
    """Where one argument comes from."""

    def strategy(self) -> st.SearchStrategy[Any]:
        """Return it as hypothesis wants it."""

    def sample(self, rng: random.Random) -> Any:
        """Return one value."""


class Between:
    """Integers, both ends included."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def strategy(self) -> st.SearchStrategy[Any]:
        return st.integers(self.low, self.high)

    def sample(self, rng: random.Random) -> Any:
        return rng.randint(self.low, self.high)


class OneOf:
    """Some values; what stands there twice comes twice as often. The first is the simplest."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def strategy(self) -> st.SearchStrategy[Any]:
        return st.sampled_from(self.values)

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.values)


class Either:
    """A value of one of several domains."""

    def __init__(self, *domains: Domain) -> None:
        self.domains = domains

    def strategy(self) -> st.SearchStrategy[Any]:
        return st.one_of([domain.strategy() for domain in self.domains])

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.domains).sample(rng)
