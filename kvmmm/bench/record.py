"""A case's result, and the one form in which all benchmarks write theirs: JSON Lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvmmm.bench.case import Case, Sample

_DIGITS = 4


class Record:
    """What came of one case.

    Attributes:
        case: Its description.
        value: The median over rounds, in `case.unit`.
        aa: Distance of the values from label A and label B, as a fraction of the value (of the
            goal, where a difference is smaller than that).
        n: Samples of the product behind it.
        over_limit: Counts above their limit: (name, most seen, limit).
        extra: Medians and counts that help to read the value.
        samples: What it was made from, by (probe, label), one a round; not written.
    """

    __slots__ = ("aa", "case", "extra", "n", "over_limit", "samples", "value")

    def __init__(
        self, case: Case, value: float, aa: float, n: int, *,
        over_limit: Sequence[tuple[str, int, int]] = (), extra: Mapping[str, Any] | None = None,
        samples: Mapping[tuple[str, str], Sequence[Sample]] | None = None,
    ) -> None:  # fmt: skip
        self.samples = dict(samples or {})
        self.case = case
        self.value = value
        self.aa = aa
        self.n = n
        self.over_limit = list(over_limit)
        self.extra = dict(extra or {})

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached and no limit exceeded; None without a goal."""
        if self.over_limit:
            return False
        goal = self.case.goal
        if goal is None:
            return None
        return self.value <= goal if self.case.better == "lower" else self.value >= goal

    def as_dict(self) -> dict[str, Any]:
        """Return the record as it is written."""
        case = self.case
        record: dict[str, Any] = {
            "case": case.name,
            "value": _rounded(self.value),
            "unit": case.unit,
            "goal": case.goal,
            "better": case.better,
            "aa": _rounded(self.aa),
            "n": self.n,
            "met": self.met,
        }
        if case.note:
            record["note"] = case.note
        if case.limits:
            record["limits"] = case.limits
        return record | {key: _rounded(value) for key, value in self.extra.items()}


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if not isinstance(value, float):
        return value
    return round(value) if abs(value) >= 10**_DIGITS else float(f"{value:.{_DIGITS}g}")


def write_json_lines(path: Path, host: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write one record a line: the host's first, then one a case.

    Raises:
        OSError: `path` cannot be written.
    """
    lines = [{"host": dict(host)}, *(record.as_dict() for record in records)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
