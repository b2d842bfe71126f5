"""The results of one sweep: what is written while it runs, and read by everything after it.

DIR/results.jsonl holds one JSON object a line, of a `kind` each: one `header`, then `cell`s, and
`sample`s of them (one a round: ns an operation of every variant), `canary`s (how fast the CPU was),
and a `footer` where the sweep came to its end. Other kinds are kept as they are.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from kvmmm.errors import KvmmmError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

SCHEMA = 1
FILE_NAME = "results.jsonl"

INTERNAL, INTERNAL_AGAIN = "internal", "internal2"
"""The side that everything is compared with, and the same measured once more (A/A)."""


class ResultsError(KvmmmError, ValueError):
    """A results file is malformed, or of another schema.

    Attributes:
        path: Which file.
        line: Its line, from 1; 0 for the file as a whole.
        why: What is wrong.
    """

    def __init__(self, path: str, line: int, why: str) -> None:
        self.path = path
        self.line = line
        self.why = why
        super().__init__(f"{path}{f':{line}' if line else ''}: {why}")


class Header(NamedTuple):
    """What was measured, with what, where. `host` holds facts about the machine by name."""

    kvmmm: str
    commit: str | None
    started: str
    mode: str
    seed: int
    host: Mapping[str, Any]
    schema: int = SCHEMA


class Cell(NamedTuple):
    """One combination of all dimensions. Sizes in bytes."""

    id: str
    operation: str
    bytes: int
    layout: str
    order: str
    locality: str
    residency: str
    page_bytes: int
    caller: str

    @property
    def dims(self) -> tuple[str | int, ...]:
        """All dimensions but the size, in the order of DIMS: what makes a curve."""
        return tuple(getattr(self, name) for name in DIMS)


DIMS = ("operation", "layout", "order", "locality", "residency", "page_bytes", "caller")
"""Names of a curve's dimensions."""


class Sample(NamedTuple):
    """One round of one cell in one process: ns an operation, by variant."""

    cell: str
    process: int
    round: int
    ns: Mapping[str, float]


class Canary(NamedTuple):
    """How fast the CPU was in one round, and what the host took from it."""

    process: int
    round: int
    ghz: float
    steal_ticks: int


class Footer(NamedTuple):
    """How the sweep ended."""

    complete: bool
    seconds: float


class Results(NamedTuple):
    """All of a file.

    Attributes:
        header: See there.
        cells: By id.
        samples: In the order of the file.
        canaries: The same.
        footer: None where the sweep was cut off.
        others: Lines of other kinds.
        torn_bytes: Length of a last line that was cut off in the middle; it is not part of this.
    """

    header: Header
    cells: dict[str, Cell]
    samples: list[Sample]
    canaries: list[Canary]
    footer: Footer | None
    others: list[dict[str, Any]]
    torn_bytes: int = 0


class Writer:
    """Writes results line by line; each is in the file when the call returns. A context manager.

    Args:
        path: The file.
        append: Go on with one that there is; a last line that was cut off is removed first.

    Raises:
        ResultsError: There is one, and it cannot be gone on with.
        OSError: It cannot be written.
    """

    __slots__ = ("_file",)

    def __init__(self, path: Path, *, append: bool = False) -> None:
        if append and path.exists():
            torn_bytes = read_results(path).torn_bytes
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - torn_bytes)
        else:
            path.write_bytes(b"")
        # Each line is one write: whoever is killed, or interrupted, leaves whole lines.
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, record: Header | Cell | Sample | Canary | Footer) -> None:
        """Write one record."""
        fields = record._asdict()
        if isinstance(record, Sample):
            fields["ns"] = {name: float(f"{ns:.6g}") for name, ns in record.ns.items()}
        self.write_other(_KINDS[type(record)], **fields)

    def write_other(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - any JSON values
        """Write a line of some other kind."""
        line = json.dumps({"kind": kind, **fields}, ensure_ascii=False).encode() + b"\n"
        n_written = 0
        try:
            while n_written < len(line):
                n_written += self._file.write(line[n_written:])
        except OSError:
            # The disk is full, maybe not for ever: half a line must not be what comes before more.
            with suppress(OSError):
                end = os.fstat(self._file.fileno()).st_size
                os.ftruncate(self._file.fileno(), end - n_written)
            raise


_KINDS: dict[type, str] = {
    Header: "header", Cell: "cell", Sample: "sample", Canary: "canary", Footer: "footer",
}  # fmt: skip
_TYPES = {kind: type_ for type_, kind in _KINDS.items()}
_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "header": {"kvmmm": str, "commit": (str, type(None)), "started": str, "mode": str,
               "seed": int, "host": dict, "schema": int},
    "cell": {"id": str, "operation": str, "bytes": int, "layout": str, "order": str,
             "locality": str, "residency": str, "page_bytes": int, "caller": str},
    "sample": {"cell": str, "process": int, "round": int, "ns": dict},
    "canary": {"process": int, "round": int, "ghz": _NUMBER, "steal_ticks": int},
    "footer": {"complete": bool, "seconds": _NUMBER},
}  # fmt: skip


class Conditions(NamedTuple):
    """What the CPU did while all was measured.

    Attributes:
        ghz_low: So fast or slower it was in one round of 20.
        ghz: And in the median.
        ghz_high: And so fast or faster in one of 20.
        stolen: Share of the time in which the hypervisor gave the CPU to others; nan: not known.
    """

    ghz_low: float
    ghz: float
    ghz_high: float
    stolen: float

    def __str__(self) -> str:
        return (
            f"CPU at {self.ghz:.2f} GHz ({self.ghz_low:.2f} to {self.ghz_high:.2f} in 9 rounds of "
            f"10), {self.stolen:.1%} of its time taken by others".replace("%", " %")
        )


def conditions_of(results: Results) -> Conditions | None:
    """Return what the canaries say; None where there are none."""
    if not results.canaries:
        return None
    ghz = sorted(canary.ghz for canary in results.canaries)
    last = len(ghz) - 1
    seconds = results.footer.seconds if results.footer else math.nan
    ticks = sum(canary.steal_ticks for canary in results.canaries)
    return Conditions(
        ghz[round(last * 0.05)], ghz[last // 2], ghz[round(last * 0.95)],
        ticks / os.sysconf("SC_CLK_TCK") / seconds,
    )  # fmt: skip


def checked_fields(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a line of some kind, those that it must have.

    Raises:
        ValueError: One is missing, or is not what it should be.
    """
    checked: dict[str, Any] = {}
    for name, type_ in _FIELDS[kind].items():
        if name not in fields:
            raise ValueError(f"a {kind} without {name}")
        value = fields[name]
        if not isinstance(value, type_) or (type_ is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} of a {kind} is {value!r}")
        checked[name] = value
    if kind == "sample":
        for name, ns in checked["ns"].items():
            if not isinstance(ns, _NUMBER) or not math.isfinite(ns):
                raise ValueError(f"{name} took {ns!r} ns")
    return checked


def read_results(path: Path) -> Results:
    """Return what a results file, or the folder of one, holds.

    A last line without its end is what a crash leaves; it is passed over. Everything else that is
    not as it should be is refused: a wrong figure is worse than none.

    Raises:
        ResultsError: It is malformed, of another schema, or contradicts itself.
        OSError: It cannot be read.
    """
    path = path / FILE_NAME if path.is_dir() else path
    content = path.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    reading = _Reading(str(path))
    for number, line in enumerate((whole + newline).splitlines(), 1):
        reading.take(number, line)
    if reading.header is None:
        raise ResultsError(str(path), 0, "no header: this is no results file")
    return Results(
        reading.header, reading.cells, reading.samples, reading.canaries, reading.footer,
        reading.others, len(torn),
    )  # fmt: skip


class _Reading:
    # A file half read.

    def __init__(self, path: str) -> None:
        self.path = path
        self.number = 0
        self.header: Header | None = None
        self.cells: dict[str, Cell] = {}
        self.samples: list[Sample] = []
        self.canaries: list[Canary] = []
        self.footer: Footer | None = None
        self.others: list[dict[str, Any]] = []
        self._seen: set[tuple[str, int, int]] = set()

    def take(self, number: int, line: bytes) -> None:
        self.number = number
        try:
            fields = json.loads(line)
            kind = fields.pop("kind")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise self._error("no JSON object with a kind") from e
        if kind == "header":
            self._take_header(fields)
        elif self.header is None:
            raise self._error(f"begins with a {kind}, not with a header")
        elif kind == "cell":
            self._take_cell(Cell(**self._checked(kind, fields)))
        elif kind == "sample":
            self._take_sample(Sample(**self._checked(kind, fields)))
        elif kind == "canary":
            self.canaries.append(Canary(**self._checked(kind, fields)))
        elif kind == "footer":
            self.footer = Footer(**self._checked(kind, fields))
        else:
            self.others.append({"kind": kind, **fields})

    def _error(self, why: str) -> ResultsError:
        return ResultsError(self.path, self.number, why)

    def _checked(self, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return checked_fields(kind, fields)
        except ValueError as e:
            raise self._error(str(e)) from e

    def _take_header(self, fields: Mapping[str, Any]) -> None:
        if (schema := fields.get("schema")) != SCHEMA:
            raise self._error(f"written in schema {schema}; this kvmmm reads {SCHEMA}")
        if self.header is not None:
            raise self._error("a second header")
        self.header = Header(**self._checked("header", fields))

    def _take_cell(self, cell: Cell) -> None:
        if self.cells.setdefault(cell.id, cell) != cell:
            raise self._error(f"cell {cell.id} was another one above")
        if cell.bytes <= 0:
            raise self._error(f"a cell of {cell.bytes} bytes")

    def _take_sample(self, sample: Sample) -> None:
        if sample.cell not in self.cells:
            raise self._error(f"a sample of cell {sample.cell!r}, which is not described above")
        key = (sample.cell, sample.process, sample.round)
        if key in self._seen:
            raise self._error(f"round {key[2]} of cell {key[0]} in process {key[1]} a second time")
        self._seen.add(key)
        self.samples.append(sample)
