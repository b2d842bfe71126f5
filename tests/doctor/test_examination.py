"""One probe that fails, in whatever way, does not stop the next; verdicts follow what was seen."""

from __future__ import annotations

import errno

import pytest

from kvmmm.doctor import examination
from kvmmm.doctor.examination import Examination, examine
from kvmmm.doctor.finding import Check, Finding, differs, missing, ok
from kvmmm.errors import KvmUnavailableError, StateError


def checks_of(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    opened = Check("open", "open", lambda: ok("yes"))
    monkeypatch.setattr(examination.device, "OPEN", opened)
    monkeypatch.setattr(examination, "THEMES", (("a theme", (opened, *checks)),))


def raising(error: Exception):
    def probe() -> Finding:
        raise error

    return probe


def test_failures_of_every_kind_are_findings(monkeypatch: pytest.MonkeyPatch):
    checks_of(
        monkeypatch,
        Check("kvmmm", "kvmmm", raising(StateError("not now"))),
        Check("os", "os", raising(OSError(errno.EIO, "Input/output error"))),
        Check("defect", "defect", raising(ZeroDivisionError("oops"))),
        Check("last", "last", lambda: ok("reached")),
    )
    seen = []
    found = examine(lambda _theme, check, finding: seen.append((check.key, finding.result)))
    assert seen == [
        ("open", "ok"), ("kvmmm", "failed"), ("os", "failed"), ("defect", "failed"), ("last", "ok"),
    ]  # fmt: skip
    assert found.findings["kvmmm"].fact == "not now"
    assert found.findings["defect"].fact == "ZeroDivisionError: oops"
    assert [check.key for check in found.failures] == ["kvmmm", "os", "defect"]


def test_what_is_not_needed_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    checks_of(
        monkeypatch,
        Check("extra", "extra", lambda: missing("not here", "never mind"), is_needed=False),
        Check("odd", "odd", lambda: differs("in another way")),
    )
    assert examine().is_ok


def test_without_a_device_nothing_is_tried(monkeypatch: pytest.MonkeyPatch):
    error = KvmUnavailableError(errno.ENOENT, "/dev/kvm is missing", "type this")
    closed = Check("open", "open", raising(error))
    other = Check("other", "other", lambda: pytest.fail("it was tried"))
    monkeypatch.setattr(examination.device, "OPEN", closed)
    monkeypatch.setattr(examination, "THEMES", (("a theme", (closed, other)),))
    found = examine()
    assert found.findings["open"].remedy == "type this"
    assert found.findings["other"].result == "not tried"
    assert not found.is_ok
    assert "no KVM" in found.verdict
    assert found.as_dict()["ring0"] is None


@pytest.mark.parametrize(
    ("paging", "ratio", "words"),
    [
        ("nested", 1.2, ("nested paging", "as fast as ring 3")),
        ("shadow", 2000.0, ("shadow paging", "emulated", "work in ring 3")),
        ("shadow", 1.0, ("shadow paging", "as fast as ring 3")),
        (None, None, ("could not be told",)),
    ],
)
def test_verdicts(paging: str | None, ratio: float | None, words: tuple[str, ...]):
    found = Examination()
    found.findings = {
        "open": ok("yes"),
        "paging": Finding("ok", "", value=paging),
        "ring_speed": Finding("ok", "", value=ratio),
    }
    for word in words:
        assert word in found.verdict


def test_keys_are_unique():
    keys = [check.key for _, checks in examination.THEMES for check in checks]
    assert len(keys) == len(set(keys))
