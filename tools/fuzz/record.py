"""`Record`: the last cases, in a file that both processes map; it outlives a crash."""

from __future__ import annotations

import itertools
import mmap
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_SLOT_BYTES = 256
_N_SLOTS = 4096


class Record:
    """A ring of short lines. Written by one process, by any of its threads; read by another.

    Args:
        path: The file; it is made where it does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_SLOT_BYTES * _N_SLOTS))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SLOT_BYTES * _N_SLOTS)
        self._numbers = itertools.count(self.last() + 1)

    def note(self, text: str) -> None:
        """Add a line; what is too long is cut."""
        number = next(self._numbers)
        line = f"{number} {text}".encode(errors="replace")[: _SLOT_BYTES - 1]
        at = number % _N_SLOTS * _SLOT_BYTES
        # One assignment: whoever reads meanwhile sees the old line or the new one.
        self._map[at : at + _SLOT_BYTES] = line.ljust(_SLOT_BYTES, b"\0")

    def last(self) -> int:
        """Return the number of the last line; 0 for none."""
        return max((number for number, _ in self._lines()), default=0)

    def tail(self, n_lines: int) -> list[str]:
        """Return the last lines, oldest first."""
        return [text for _, text in sorted(self._lines())[-n_lines:]]

    def _lines(self) -> list[tuple[int, str]]:
        found = []
        for at in range(0, len(self._map), _SLOT_BYTES):
            line = self._map[at : at + _SLOT_BYTES].rstrip(b"\0").decode(errors="replace")
            number, _, text = line.partition(" ")
            if number.isdigit():
                found.append((int(number), text))
        return found

    def clear(self) -> None:
        """Forget all lines."""
        self._map[:] = bytes(len(self._map))
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
