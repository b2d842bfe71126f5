"""The calibration file: what `kvmmm calibrate` found out about this host, for the copies' policy.

It is refused, with the reason, where its numbers may not hold: on a host with another fingerprint
(a home directory was copied, a kernel updated), with another build of kvmmm's C core, or when it is
old. There is one file a user: hosts that share a home directory need a KVMMM_CALIBRATION each.

    {"schema": 2, "host": {"kernel": "...", ...}, "build": "...", "kvmmm": "...",
     "made": "2026-01-31T12:00:00Z", "policy": {"mirror": 0, ...}, "reasons": {"mirror": "..."},
     "costs": {...}}
"""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmmm.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 2
MOST_DAYS = 180
"""Older than that it is refused: firmware, neighbours and settings change without a trace."""

_DAY_S = 86400
_MOST_BYTES = 1 << 20
_CORE = "kvmmm._core"
_MITIGATION = re.compile(
    "no(mitigations|pti|spectre|spec_)|mitigations=|k?pti=|spectre_|retbleed=|spec_|mds=|l1tf="
    "|tsx|srbds=|mmio_stale_data=|gather_data_sampling=|indirect_target_selection=|tsa="
)


def host_fingerprint() -> dict[str, str]:
    """Return what a calibration is good for, by name: what the costs of copies depend on.

    The processor and its microcode, whether it is a virtual one, mitigations, kernel, the size of
    the pages that shared memory gets, and KVM's backend, which is told of every mapping. Nothing
    that names a machine: on one that is alike in all of it the numbers hold as well.
    """
    cpu = dict.fromkeys(("model name", "cpu family", "model", "stepping", "microcode", "flags"), "")
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in cpu:
                cpu[key.strip()] = value.strip()
            elif not key.strip():
                break  # the second processor
    host = os.uname()
    number = ".".join(cpu[key] for key in ("cpu family", "model", "stepping"))
    return {
        "processor": f"{cpu['model name']} ({host.machine} {number})",
        "microcode": cpu["microcode"],
        "hypervisor": "yes" if "hypervisor" in cpu["flags"].split() else "no",
        "mitigations": _mitigations(),
        "kernel": f"{host.release} {host.version}",
        "shared huge pages": _shared_huge_pages(),
        "kvm": _kvm_backend(),
    }


def _mitigations() -> str:
    # What was asked for at boot; with processor, microcode and kernel the rest follows from it.
    asked = (word for word in _text("/proc/cmdline").split() if _MITIGATION.match(word))
    return " ".join(asked)


def _shared_huge_pages() -> str:
    text = _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return text.partition("[")[2].partition("]")[0]


def _kvm_backend() -> str:
    # kvm_amd npt=1; kvm_pvm
    for name, paging in (("kvm_intel", "ept"), ("kvm_amd", "npt"), ("kvm_pvm", "")):
        if os.path.exists(f"/sys/module/{name}"):  # noqa: PTH110 - for every first mm of a process
            value = _text(f"/sys/module/{name}/parameters/{paging}") if paging else ""
            return f"{name} {paging}={value}" if value else name
    return ""


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read().strip()
    return ""


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
    # HOME may be relative, too: what lies in the working directory is nobody's choice.
    return base / "kvmmm" / "calibration.json" if base.is_absolute() else None


def read(path: Path) -> dict[str, Any]:
    """Return what a calibration file says, if it is of this host and this kvmmm.

    The numbers of its policy are not looked at.

    Raises:
        PolicyError: Why it is refused.
        OSError: It cannot be read.
    """
    source = str(path)
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")  # noqa: TRY301 - as what follows
        content = json.loads(data)
        schema, host, numbers = content["schema"], content["host"], dict(content["policy"])
        build, made = content.get("build"), content.get("made")
        reasons = {str(name): str(why) for name, why in content.get("reasons", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise PolicyError(source, f"no calibration ({type(e).__name__}: {e}); delete it") from e
    if schema != SCHEMA:
        raise PolicyError(source, f"schema {schema!r}, not {SCHEMA}; calibrate again")
    if difference := _difference(host):
        raise PolicyError(source, f"made for another host: {difference}; calibrate again")
    if build != core_build():
        raise PolicyError(source, "made with another build of kvmmm; calibrate again")
    age = age_days(made)
    if age is None:
        raise PolicyError(source, f"it does not say when it was made ({made!r}); calibrate again")
    if age > MOST_DAYS:
        raise PolicyError(source, f"made {age:.0f} days ago; calibrate again")
    if age < -1:
        raise PolicyError(source, f"made in the future ({made}); calibrate again")
    return {**content, "policy": numbers, "reasons": reasons}


def _difference(host: object) -> str:
    # In words; empty where there is none.
    here = host_fingerprint()
    if not isinstance(host, dict):
        return f"it says {host!r:.80}"
    return ", ".join(
        f"its {name} was {host.get(name)!r:.80}, here it is {here.get(name)!r:.80}"
        for name in sorted(here.keys() | host.keys())
        if here.get(name) != host.get(name)
    )


def age_days(made: object) -> float | None:
    """Return the days since `made`, as a calibration says it; None for what is no such time."""
    from datetime import UTC, datetime

    try:
        at = datetime.fromisoformat(made)  # type: ignore[arg-type]
        return (datetime.now(UTC) - at).total_seconds() / _DAY_S
    except (TypeError, ValueError):  # without a time zone, too
        return None


def age_of(content: Mapping[str, Any]) -> str:
    """Return how old a calibration that was read is, in words."""
    age = max(age_days(content["made"]) or 0.0, 0.0)
    for unit, per_day in (("day", 1), ("hour", 24), ("minute", 24 * 60)):
        n = int(age * per_day)
        if n:
            return f"{n} {unit}{'s' * (n > 1)} old"
    return "new"


def reasons_for(numbers: Mapping[str, int], content: Mapping[str, Any]) -> dict[str, str]:
    """Return why numbers are what they are, by name, as far as a calibration that was read says it.

    What is not as it says was overridden; it is the reason then.
    """
    reasons: dict[str, str] = {}
    for name, number in numbers.items():
        calibrated = content.get("policy", {}).get(name, number)
        if calibrated != number:
            reasons[name] = f"overridden by KVMMM_POLICY; the calibration says {calibrated}"
        elif name in content.get("reasons", {}):
            reasons[name] = content["reasons"][name]
    return reasons


def write(
    path: Path, numbers: Mapping[str, int], costs: Mapping[str, object],
    reasons: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a calibration of this host; its directory is made. All of it is replaced, or nothing.

    Args:
        path: Where; what a symbolic link points to, not the link.
        numbers: Of the policy.
        costs: What they were derived from, for people.
        reasons: Why each number is what it is, in words.

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
        "reasons": dict(reasons or {}),
        "costs": dict(costs),
    }
    text = json.dumps(content, indent=2) + "\n"
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, for rename(2) works within one file system only; by a name that nobody has made
    # before, for two may calibrate, and the directory may be everybody's.
    new = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
