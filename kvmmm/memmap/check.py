"""What `translate` promises, checked: for tests and debugging."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.hostarch.access import allows
from kvmmm.hostarch.addr import PAGE_MASK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.hostarch.ranges import FileRange
    from kvmmm.memmap.file import Translation


def check_translations(
    required: FileRange,
    optional: FileRange,
    access: int,
    translations: Sequence[Translation],
    error: OSError | None,
) -> None:
    """Check what a `Mappable` answered to `translate(required, optional, access)`.

    Raises:
        AssertionError: It broke a promise.

    Source:
        gVisor memmap.CheckTranslateResult.
    """
    at = None
    for t in translations:
        offsets = t.start | t.end | t.offset
        _require(not offsets & PAGE_MASK and t.start < t.end, f"{t!r} is not whole pages")
        _require(at is None or t.start == at, f"{t!r} does not begin where the last one ended")
        _require(optional.start <= t.start and t.end <= optional.end, f"{t!r} is not optional")
        _require(t.start < required.end and required.start < t.end, f"{t!r} is not required")
        _require(allows(t.perms, access), f"{t!r} forbids {access}")
        _require(t.offset + t.end - t.start <= t.file.capacity_bytes, f"{t!r} leaves its file")
        at = t.end
    if translations:
        _require(translations[0].start <= required.start, f"{required.start:#x} comes first")
    done = at is not None and at >= required.end
    _require(done or error is not None, f"neither all of {required!r} nor an error")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)
