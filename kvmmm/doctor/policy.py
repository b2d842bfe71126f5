"""Which numbers copies between host and guest go by, and where these come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmm.doctor.finding import Check, Finding, differs, ok

if TYPE_CHECKING:
    from kvmmm.mm.policy import Policy


def _policy() -> Finding:
    from kvmmm.mm.policy import from_environment

    policy = from_environment()
    way = "the mirror where it is resident" if policy.mirror else "internal mappings"
    fact = f"{way}, the GIL released from {policy.release_bytes >> 10} KiB: {policy.source}"
    if policy.refused:
        return differs(
            f"{fact}; a calibration was refused: {policy.refused}",
            "`kvmmm calibrate` makes a new one, `kvmmm calibrate --delete` forgets it",
            value=policy.source,
        )
    return ok(fact + _why(policy), value=policy.source)


def _why(policy: Policy) -> str:
    # How old a calibration is, and what it changed for which reason.
    from kvmmm.errors import PolicyError
    from kvmmm.mm import calibration
    from kvmmm.mm.policy import DEFAULTS

    path = calibration.calibration_path()
    if path is None:
        return ""
    try:
        content = calibration.read(path)
    except FileNotFoundError:
        return " (`kvmmm calibrate` measures what this host's are)"
    except (OSError, PolicyError):
        return ""  # since it was looked at
    numbers = policy.as_dict()
    changed = [name for name, default in DEFAULTS.items() if numbers[name] != default]
    reasons = calibration.reasons_for(numbers, content)
    told = [f"{name} {numbers[name]}: {reasons[name]}" for name in changed if name in reasons]
    return f", {calibration.age_of(content)}; " + ("; ".join(told) or "the defaults fit this host")


CHECKS = (Check("policy", "policy of copies", _policy),)
