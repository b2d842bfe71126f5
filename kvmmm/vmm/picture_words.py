"""What pictures and tables of address spaces say in words, and what their colours stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmmm.hostarch.access import EXECUTE, WRITE, access_str
from kvmmm.hostarch.units import format_bytes
from kvmmm.mm.sight import KIND_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmmm.mm.sight import Sight
    from kvmmm.mm.vma import Vma

KIND_CLASSES = ("k-own", "k-relative stripes", "k-file stripes", "k-shared")
PERMS_CLASSES = ("p-none", "p-r", "p-rx", "p-rw", "p-rwx")
PERMS_NAMES = ("no access", "read", "read, execute", "read, write", "all")
FAULT_CLASSES = ("f-read", "f-write", "f-execute")
FAULT_NAMES = ("read", "write", "execute")


class Caption(NamedTuple):
    """What stands over a picture.

    Attributes:
        title: What it is a picture of.
        subtitle: More about it; empty for nothing.
        outcome: How the run ended; empty for nothing.
        is_good: Whether that is well.
    """

    title: str
    subtitle: str = ""
    outcome: str = ""
    is_good: bool = True


class Drawn(NamedTuple):
    """An address space to be drawn.

    Attributes:
        label: What it is: `process 3`.
        sight: What was seen of it.
        fault: Address and description of the access that ended the run; None for none.
    """

    label: str
    sight: Sight
    fault: tuple[int, str] | None = None


def perms_class(perms: int) -> int:
    """Return the index into PERMS_CLASSES."""
    if perms & WRITE:
        return 4 if perms & EXECUTE else 3
    return 2 if perms & EXECUTE else int(perms != 0)


def plural(n: int, what: str) -> str:
    """Return `1 fault`, `2 faults`; in groups of three digits."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def faults_text(counts: Iterable[int]) -> str:
    """Return `3 reads, 1 write`."""
    shown = [plural(n, name) for n, name in zip(counts, FAULT_NAMES, strict=True) if n]
    return ", ".join(shown) or "no faults"


def kinds_text(by_kind: Iterable[int]) -> str:
    """Return `8 KiB own, 4 KiB shared`."""
    shown = [f"{format_bytes(n)} {name}" for n, name in zip(by_kind, KIND_NAMES, strict=True) if n]
    return ", ".join(shown) or "nothing resident"


def perms_text(vma: Vma) -> str:
    """Return `rw-p`, as maps does."""
    return access_str(vma.perms) + ("p" if vma.private else "s")


def clipped(name: str, most: int) -> str:
    """Return a name in at most so many characters; of a path the end says more."""
    if len(name) <= most:
        return name
    return "…" + name[1 - most :] if "/" in name else name[: most - 1] + "…"


def sums_of(sight: Sight) -> list[str]:
    """Return what an address space comes to, in a few phrases."""
    counters = sight.counters
    parts = [
        f"{plural(len(sight.mappings), 'mapping')}, {format_bytes(sight.usage_bytes)}",
        f"resident {format_bytes(sight.rss_bytes)}, at most {format_bytes(sight.max_rss_bytes)}",
        plural(counters.faults, "fault"),
    ]
    if counters.cow_breaks:
        times = plural(counters.cow_breaks, "time")
        parts.append(f"copied on write {times}, {format_bytes(counters.copied_bytes)}")
    if sight.locked_bytes:
        parts.append(f"{format_bytes(sight.locked_bytes)} locked")
    return parts
