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
import json
import os
import platform
from pathlib import Path

from kvmmm.errors import KvmmmError

CALIBRATION_SCHEMA = 1

DEFAULTS: dict[str, int] = {
    "release_bytes": 128 << 10,
    "bounce_max_bytes": 512,
    "mirror": 0,
    "mirror_reuses": 128,
    "mirror_min_run_pages": 16,
    "mirror_vmas": 0,
}


class PolicyError(KvmmmError, ValueError):
    """A policy's number is unknown or malformed, or a calibration is not for this host.

    Attributes:
        source: Where it came from: a path, a variable, an argument.
    """

    exit_code = 64

    def __init__(self, source: str, why: str) -> None:
        self.source = source
        super().__init__(f"{source}: {why}")


class Policy:
    """The numbers. Immutable.

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
    """

    __slots__ = (
        "bounce_max_bytes", "mirror", "mirror_min_run_pages", "mirror_reuses", "mirror_vmas",
        "release_bytes", "source",
    )  # fmt: skip

    def __init__(self, *, source: str = "argument", **numbers: int) -> None:
        merged = {**DEFAULTS, **_checked(source, numbers)}
        self.release_bytes = merged["release_bytes"]
        self.bounce_max_bytes = merged["bounce_max_bytes"]
        self.mirror = bool(merged["mirror"])
        self.mirror_reuses = max(merged["mirror_reuses"], 1)
        self.mirror_min_run_pages = merged["mirror_min_run_pages"]
        self.mirror_vmas = merged["mirror_vmas"] or None
        self.source = source

    def __repr__(self) -> str:
        numbers = " ".join(f"{name}={getattr(self, name)}" for name in sorted(DEFAULTS))
        return f"<Policy {numbers} ({self.source})>"


def _checked(source: str, numbers: dict[str, int]) -> dict[str, int]:
    for name, value in numbers.items():
        if name not in DEFAULTS:
            raise PolicyError(source, f"there is no {name!r}, only {', '.join(sorted(DEFAULTS))}")
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise PolicyError(source, f"{name} is a number below 2**32, not {value!r}")
    return numbers


def host_fingerprint() -> str:
    """Return what a calibration is good for: this processor, under this kernel."""
    model = ""
    with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{platform.machine()}; {model}; {platform.release()}"


def calibration_path(environ: dict[str, str] | None = None) -> Path | None:
    """Return where a calibration is kept: KVMMM_CALIBRATION, or below the user's cache directory.

    None where that variable is "off".
    """
    environ = dict(os.environ) if environ is None else environ
    named = environ.get("KVMMM_CALIBRATION")
    if named == "off":
        return None
    if named:
        return Path(named)
    cache = environ.get("XDG_CACHE_HOME")
    return Path(cache or Path.home() / ".cache") / "kvmmm" / "calibration.json"


def read_calibration(path: Path) -> dict[str, int]:
    """Return the numbers of a calibration file.

    Raises:
        PolicyError: It is malformed, of another schema, or of another host.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, host, numbers = content["schema"], content["host"], dict(content["policy"])
    except (ValueError, TypeError, KeyError) as e:
        raise PolicyError(str(path), f"no calibration: {e}; delete it") from e
    if schema != CALIBRATION_SCHEMA:
        raise PolicyError(str(path), f"schema {schema}, not {CALIBRATION_SCHEMA}; calibrate again")
    if host != host_fingerprint():
        raise PolicyError(str(path), f"made for another host ({host}); calibrate again")
    return _checked(str(path), numbers)


def from_environment(environ: dict[str, str] | None = None) -> Policy:
    """Return the policy that calibration and KVMMM_POLICY ("mirror=1,mirror_reuses=32") give.

    A calibration that cannot be used is no reason to fail: `.source` says why it was refused. A
    variable that somebody has set is.

    Raises:
        PolicyError: KVMMM_POLICY is malformed.
    """
    environ = dict(os.environ) if environ is None else environ
    numbers: dict[str, int] = {}
    source = "defaults"
    path = calibration_path(environ)
    if path is not None:
        try:
            numbers = read_calibration(path)
            source = str(path)
        except FileNotFoundError:
            pass
        except (OSError, PolicyError) as e:
            source = f"defaults; calibration refused: {e}"
    text = environ.get("KVMMM_POLICY", "")
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            numbers |= _checked("KVMMM_POLICY", {name.strip(): int(value, 0)})
        except ValueError as e:
            if isinstance(e, PolicyError):
                raise
            raise PolicyError("KVMMM_POLICY", f"{item!r} is not name=number") from e
        source = "KVMMM_POLICY"
    return Policy(source=source, **numbers)


@functools.cache
def default_policy() -> Policy:
    """Return `from_environment`, read once."""
    return from_environment()
