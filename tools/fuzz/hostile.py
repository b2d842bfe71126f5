"""Objects that are not what they should be, and how things are shown in a log."""

from __future__ import annotations

import array
import random
import re
from typing import TYPE_CHECKING, Any

from kvmmm.safemem import ffi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SHOWN = 60
_AT = re.compile(r" object at 0x[0-9a-f]+|kvmmm\.[a-z_.]+\.")


class HostileError(Exception):
    """What hostile objects raise: it must come out as it is."""


class Index:
    """An integer by `__index__`, which does something first.

    Args:
        value: What `__index__` returns: any object.
        act: Called before; it may raise.
        label: How it is shown.
    """

    def __init__(self, value: Any, act: Callable[[], object], label: str) -> None:  # noqa: ANN401
        self._value = value
        self._act = act
        self._label = label

    def __index__(self) -> int:
        self._act()
        return self._value  # type: ignore[no-any-return]  # that is the point

    def __repr__(self) -> str:
        return f"Index({show(self._value)}, {self._label})"


class Exporter:
    """A buffer by PEP 688 (Python 3.12) that raises, or answers with something else."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __buffer__(self, _flags: int) -> memoryview:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer  # type: ignore[return-value]  # that is the point

    def __repr__(self) -> str:
        return f"Exporter({show(self._answer)})"


class LyingList(list[Any]):
    """A list whose length and items are others each time."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        self.append((0, 8))
        return super().__iter__()

    def __getitem__(self, _index: Any) -> Any:  # noqa: ANN401 - any index
        raise HostileError("an item")

    def __repr__(self) -> str:
        return "LyingList()"


class Truth:
    """Neither true nor false."""

    def __bool__(self) -> bool:
        raise HostileError("a truth value")

    def __repr__(self) -> str:
        return "Truth()"


def show(value: object) -> str:
    """Return a short text for any argument, hostile or not."""
    if type(value) is int:
        return str(value) if -10 < value < 10 else hex(value)
    if isinstance(value, tuple | list) and type(value) in {tuple, list}:
        inner = ", ".join(map(show, value[:6])) + (", ..." if len(value) > 6 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    shown = _SHOW.get(type(value), repr)
    try:
        text = _AT.sub("", shown(value))
    except Exception as e:  # noqa: BLE001 - whatever it is
        text = f"{type(value).__name__} ({type(e).__name__})"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _size(value: Any) -> str:  # noqa: ANN401 - any buffer
    return f"{type(value).__name__}[{memoryview(value).nbytes}]"


def _view(value: memoryview) -> str:
    try:
        flags = ("ro " if value.readonly else "") + ("" if value.c_contiguous else "strided ")
    except ValueError:
        return "memoryview(released)"
    return f"memoryview({flags}{value.format!r}{value.shape})"


def _options(value: ffi.IOOpts) -> str:
    # As short as can be: lines are.
    bits = f"{value.ignore_permissions:d}, {value.address_space_active:d}"
    return f"IOOpts({bits}, {value.mechanism!r})"


_SHOW: dict[type, Callable[[Any], str]] = {
    bytes: _size,
    bytearray: _size,
    array.array: _size,
    memoryview: _view,
    random.Random: lambda _: "rng",
    ffi.IOOpts: _options,
}
