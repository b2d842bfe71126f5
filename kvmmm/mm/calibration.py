"""The calibration file: what `kvmmm calibrate` found out about this host, for the copies' policy.

It is refused, with the reason, where its numbers may not hold: on another processor, with other
microcode, under another kernel, with another build of kvmmm's C core, or when it is old.

    {"schema": 1, "host": "...", "build": "...", "kvmmm": "...", "made": "2026-01-31T12:00:00Z",
     "policy": {"mirror": 0, ...}, "costs": {...}}
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmmm.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 1
MOST_DAYS = 180
"""Older than that it is refused: firmware, neighbours and settings change without a trace."""

_DAY_S = 86400
_CORE = "kvmmm._core"


def host_fingerprint() -> str:
    """Return what a calibration is good for: this processor, its microcode, this kernel."""
    found = {"model name": "", "microcode": ""}
    with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in found:
                found[key.strip()] = value.strip()
            elif not key.strip():
                break  # the second processor
    model, microcode = found.values()
    return f"{platform.machine()}; {model}; microcode {microcode}; {platform.release()}"


def core_build() -> str:
    """Return what distinguishes this build of the C core from others: a checksum of its file.

    Not the version: to ask for that takes longer than to make a VM.
    """
    import zlib

    import kvmmm.safemem.ffi  # noqa: F401 - it loads the core

    return f"{zlib.crc32(Path(str(sys.modules[_CORE].__file__)).read_bytes()):08x}"


def calibration_path(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return where a calibration is kept: KVMMM_CALIBRATION, or below the user's cache directory.

    None where that variable is "off", or where the user has no home.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("KVMMM_CALIBRATION")
    if named == "off":
        return None
    if named:
        return Path(named)
    cache = environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "kvmmm" / "calibration.json"


def read(path: Path) -> dict[str, Any]:
    """Return what a calibration file says, if it is of this host and this kvmmm.

    The numbers of its policy are not looked at.

    Raises:
        PolicyError: Why it is refused.
        OSError: It cannot be read.
    """
    source = str(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, host, numbers = content["schema"], content["host"], dict(content["policy"])
        build, made = content.get("build"), content.get("made")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise PolicyError(source, f"no calibration ({type(e).__name__}: {e}); delete it") from e
    if schema != SCHEMA:
        raise PolicyError(source, f"schema {schema!r}, not {SCHEMA}; calibrate again")
    if host != host_fingerprint():
        raise PolicyError(source, f"made for another host ({host}); calibrate again")
    if build != core_build():
        raise PolicyError(source, "made with another build of kvmmm; calibrate again")
    age_days = _age_days(made)
    if age_days is None:
        raise PolicyError(source, f"it does not say when it was made ({made!r}); calibrate again")
    if age_days > MOST_DAYS:
        raise PolicyError(source, f"made {age_days:.0f} days ago; calibrate again")
    if age_days < -1:
        raise PolicyError(source, f"made in the future ({made}); calibrate again")
    return {**content, "policy": numbers}


def _age_days(made: object) -> float | None:
    from datetime import UTC, datetime

    try:
        at = datetime.fromisoformat(made)  # type: ignore[arg-type]
        return (datetime.now(UTC) - at).total_seconds() / _DAY_S
    except (TypeError, ValueError):  # without a time zone, too
        return None


def write(path: Path, numbers: Mapping[str, int], costs: Mapping[str, object]) -> None:
    """Write a calibration of this host; its directory is made. All of it is replaced, or nothing.

    Args:
        path: Where.
        numbers: Of the policy.
        costs: What they were derived from, for people.

    Raises:
        OSError: It cannot be written.
    """
    from datetime import UTC, datetime
    from importlib import metadata

    try:
        version = metadata.version("kvmmm")
    except metadata.PackageNotFoundError:
        version = "unknown"
    content = {
        "schema": SCHEMA,
        "host": host_fingerprint(),
        "build": core_build(),
        "kvmmm": version,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": dict(numbers),
        "costs": dict(costs),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, for rename(2) works within one file system only; by process, for two may calibrate.
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
