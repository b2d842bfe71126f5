"""Which numbers copies between host and guest go by, and where these come from."""

from __future__ import annotations

from kvmmm.doctor.finding import Check, Finding, differs, ok


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
    return ok(fact, value=policy.source)


CHECKS = (Check("policy", "policy of copies", _policy),)
