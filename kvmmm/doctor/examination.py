"""All checks in order. One that fails, in whatever way, does not stop the next."""

from __future__ import annotations

import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from kvmmm.doctor import (
    console,
    device,
    feature,
    paging,
    policy,
    ring,
    speed,
    stop,
    violation,
)
from kvmmm.doctor.finding import FAILED, MISSING, OK, SKIPPED, Check, Finding
from kvmmm.errors import KvmmmError, KvmUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Report = Callable[[str, Check, Finding], None]

THEMES: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("device", (device.OPEN, *device.CHECKS)),
    ("capabilities (KVM_CAP_...)", device.CAPABILITIES),
    ("rings and exceptions", ring.CHECKS),
    ("CPU features", feature.CHECKS),
    ("EPT violations", violation.CHECKS),
    ("translations", paging.CHECKS),
    ("stopping", stop.CHECKS),
    ("console", console.CHECKS),
    ("speed", speed.CHECKS),
    ("copies", policy.CHECKS),
)


class Examination:
    """What all checks came to.

    Attributes:
        findings: By the checks' keys, in their order.
        elapsed_ns: How long it took.
    """

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self.elapsed_ns = 0

    def rows(self) -> Iterator[tuple[str, Check, Finding]]:
        """Yield (theme, check, finding), in order."""
        for theme, checks in THEMES:
            for check in checks:
                if check.key in self.findings:
                    yield theme, check, self.findings[check.key]

    @property
    def is_open(self) -> bool:
        """Whether /dev/kvm could be opened at all."""
        return self.findings[device.OPEN.key].result == OK

    @property
    def failures(self) -> list[Check]:
        """What kvmmm needs, and does not work."""
        bad = {MISSING, FAILED, SKIPPED}
        return [c for _, c, finding in self.rows() if c.is_needed and finding.result in bad]

    @property
    def is_ok(self) -> bool:
        """Whether everything that kvmmm needs works."""
        return not self.failures

    @property
    def verdict(self) -> str:
        """What kind of KVM this is, by what it does, in a sentence or two."""
        if not self.is_open:
            return "There is no KVM to examine: see the first line."
        paging_kind = self.findings["paging"].value
        ratio = self.findings["ring_speed"].value
        kinds = {
            "nested": "nested paging: the CPU walks a guest's own page tables",
            "shadow": "shadow paging: KVM keeps copies of a guest's page tables",
        }
        kind = kinds.get(str(paging_kind), "paging of a kind that could not be told")
        if not isinstance(ratio, (int, float)):
            return f"A KVM with {kind}."
        if ratio < speed.EMULATED:
            return f"A KVM with {kind}; ring 0 runs as fast as ring 3."
        return f"A KVM with {kind}; ring 0 is emulated. Keep a guest's work in ring 3."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {
            "ok": self.is_ok,
            "verdict": self.verdict,
            "paging": self._value("paging"),
            "ring0": self._ring0(),
            "kernel": os.uname().release,
            "elapsed_ms": round(self.elapsed_ns / 1e6, 1),
            "checks": [
                {
                    "key": check.key,
                    "name": check.name,
                    "theme": theme,
                    "needed": check.is_needed,
                    "result": finding.result,
                    "fact": finding.fact,
                    "remedy": finding.remedy,
                    "value": finding.value,
                }
                for theme, check, finding in self.rows()
            ],
        }

    def _value(self, key: str) -> object:
        return self.findings[key].value if key in self.findings else None

    def _ring0(self) -> str | None:
        ratio = self._value("ring_speed")
        if not isinstance(ratio, (int, float)):
            return None
        return "native" if ratio < speed.EMULATED else "emulated"


def examine(report: Report | None = None) -> Examination:
    """Make all checks; takes a second, and at most some minutes on the slowest machine.

    Args:
        report: Called with (theme, check, finding) as soon as each is known.
    """
    examination = Examination()
    began_ns = perf_counter_ns()
    is_open = True
    for theme, checks in THEMES:
        for check in checks:
            finding = _probe(check) if is_open else Finding(SKIPPED, "/dev/kvm did not open")
            examination.findings[check.key] = finding
            if check is device.OPEN:
                is_open = finding.result == OK
            if report is not None:
                report(theme, check, finding)
    examination.elapsed_ns = perf_counter_ns() - began_ns
    return examination


def _probe(check: Check) -> Finding:
    try:
        return check.probe()
    except KvmUnavailableError as e:
        what = str(e).partition("\n")[0]
        return Finding(MISSING, what, remedy=e.remedy)
    except (KvmmmError, OSError) as e:
        return Finding(FAILED, str(e) or type(e).__name__)
    except Exception as e:  # noqa: BLE001 - a defect in one probe must not hide the other findings
        return Finding(FAILED, f"{type(e).__name__}: {e}")
