"""Costs added on purpose, for a sweep that is to find what is known beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


class Planted(NamedTuple):
    """What is added. Operations called from C only.

    Attributes:
        costs: By variant: (ns an operation, ns a byte), spent looking at the clock. Every variant
            of the sweep looks at it, planted or not.
        identical: Every variant is internal mappings in truth.
    """

    costs: Mapping[str, tuple[float, float]]
    identical: bool = True

    def ns_of(self, variant: str, n_bytes: int) -> int:
        """Return the ns that an operation takes longer."""
        per_operation, per_byte = self.costs.get(variant, (0.0, 0.0))
        return round(per_operation + per_byte * n_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return it for a worker."""
        return {"costs": dict(self.costs), "identical": self.identical}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Take it from the parent."""
        costs = {name: (float(a), float(b)) for name, (a, b) in fields["costs"].items()}
        return cls(costs, bool(fields["identical"]))
