"""Which mechanism a copy uses, and the numbers that decide it.

What decides is whether the memory is resident in the mirror, not how much is copied: internal
mappings are never much slower and need nothing, a warm mirror saves a table's load, a cold one
costs a system call a run. So internal mappings are the default for everything; the mirror is an
accelerator that must be asked for.

    forced by IOOpts ──► that one, where it can be
    mirror is on, and all of it resident ──► mirror
    else ──► internal mappings; a region that is copied often goes into the mirror

Numbers come from, the later the stronger: the defaults below, a calibration file, the environment
(KVMMM_POLICY), an argument (`MemoryManager(policy=...)`).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from kvmmm.errors import PolicyError
from kvmmm.mm import calibration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEFAULTS: dict[str, int] = {
    "release_bytes": 128 << 10,
    "bounce_max_bytes": 512,
    "mirror": 0,
    "mirror_reuses": 128,
    "mirror_min_run_pages": 16,
    "mirror_vmas": 0,
}


class Policy:
    """The numbers. Immutable: what a memory manager has told C of them would not follow a change.

    Raises:
        PolicyError: A name or a number is none.
        AttributeError: Somebody assigns to one.

    Attributes:
        release_bytes: Copies of so many bytes release the GIL: handing it over costs as much as
            copying a few KiB, and a thread that computes keeps it for milliseconds.
        bounce_max_bytes: Vectored copies below it may go through the address space, by way of a
            buffer.
        mirror: Whether copies use the mirror where it is resident, and fill it.
        mirror_reuses: How often 2 MiB are copied before they are worth a place in the mirror.
        mirror_min_run_pages: Shorter runs of frames are not.
        mirror_vmas: Host mappings that all mirrors may use; None leaves it to the host's limit.
        source: Where the numbers come from, for display.
        refused: Why a calibration file was not used; empty where none was refused.
    """

    __slots__ = (
        "bounce_max_bytes", "mirror", "mirror_min_run_pages", "mirror_reuses", "mirror_vmas",
        "refused", "release_bytes", "source",
    )  # fmt: skip

    release_bytes: int
    bounce_max_bytes: int
    mirror: bool
    mirror_reuses: int
    mirror_min_run_pages: int
    mirror_vmas: int | None
    source: str
    refused: str

    def __init__(self, *, source: str = "argument", **numbers: int) -> None:
        merged = {**DEFAULTS, **_checked(source, numbers)}
        fields: dict[str, object] = {
            **merged,
            "mirror": bool(merged["mirror"]),
            "mirror_reuses": max(merged["mirror_reuses"], 1),
            "mirror_vmas": merged["mirror_vmas"] or None,
            "source": source,
            "refused": "",
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, _value: object) -> None:
        raise AttributeError(f"a policy is immutable: {name} stays; make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a policy is immutable: {name} stays")

    def __reduce__(self) -> tuple[object, ...]:
        # A copy, or one in another process, is made as this was: there is nothing to assign to.
        return _made, (self.source, self.refused, self.as_dict())

    def as_dict(self) -> dict[str, int]:
        """Return the numbers by name, as a calibration file and the constructor have them."""
        return {name: int(getattr(self, name) or 0) for name in DEFAULTS}

    def __repr__(self) -> str:
        numbers = " ".join(f"{name}={getattr(self, name)}" for name in sorted(DEFAULTS))
        return f"<Policy {numbers} ({self.source})>"


def _made(source: str, refused: str, numbers: Mapping[str, int]) -> Policy:
    policy = Policy(source=source, **numbers)
    object.__setattr__(policy, "refused", refused)  # nobody has it yet
    return policy


def _checked(source: str, numbers: Mapping[str, object]) -> dict[str, int]:
    checked = {}
    for name, value in numbers.items():
        if name not in DEFAULTS:
            raise PolicyError(source, f"there is no {name!r}, only {', '.join(sorted(DEFAULTS))}")
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise PolicyError(source, f"{name} is a number below 2**32, not {value!r}")
        checked[name] = int(value)
    return checked


def read_calibration(path: Path) -> dict[str, int]:
    """Return the numbers of a calibration file.

    Raises:
        PolicyError: It is malformed, of another schema, host or build, or too old.
        OSError: It cannot be read.
    """
    return _checked(str(path), calibration.read(path)["policy"])


def from_environment(environ: Mapping[str, str] | None = None) -> Policy:
    """Return the policy that calibration and KVMMM_POLICY ("mirror=1,mirror_reuses=32") give.

    A calibration that cannot be used is no reason to fail: `.refused` says why. A variable that
    somebody has set is.

    Raises:
        PolicyError: KVMMM_POLICY is malformed.
    """
    environ = os.environ if environ is None else environ
    numbers: dict[str, int] = {}
    source, refused = "defaults", ""
    path = calibration.calibration_path(environ)
    if path is not None:
        try:
            numbers = read_calibration(path)
            source = str(path)
        except FileNotFoundError as e:
            # Who names one means it to be there; in the cache directory most people have none.
            refused = str(e) if environ.get("KVMMM_CALIBRATION") else ""
        except (OSError, PolicyError) as e:
            refused = str(e)
    given = _given(environ.get("KVMMM_POLICY", ""))
    if given:
        numbers |= given
        source = f"KVMMM_POLICY over {source}"
    return _made(source, refused, numbers)


def _given(text: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            number = int(value, 0)
        except ValueError as e:
            raise PolicyError("KVMMM_POLICY", f"{item!r} is not name=number") from e
        numbers |= _checked("KVMMM_POLICY", {name.strip(): number})
    return numbers


@functools.cache
def default_policy() -> Policy:
    """Return `from_environment`, read once."""
    return from_environment()
