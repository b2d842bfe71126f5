"""The doctor's line about the policy of copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.doctor import examination, policy
from kvmmm.errors import PolicyError
from kvmmm.mm import calibration
from kvmmm.mm.policy import DEFAULTS

if TYPE_CHECKING:
    from pathlib import Path

    from kvmmm.doctor.finding import Finding


def find() -> Finding:
    [check] = policy.CHECKS
    return check.probe()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("KVMMM_CALIBRATION", str(path))
    monkeypatch.delenv("KVMMM_POLICY", raising=False)
    return path


def test_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVMMM_CALIBRATION", "off")

    found = find()

    assert (found.result, found.value) == ("ok", "defaults")
    assert found.fact == "internal mappings, the GIL released from 128 KiB: defaults"


def test_a_calibration(path: Path):
    numbers = DEFAULTS | {"mirror": 1, "release_bytes": 1 << 16}
    calibration.write(path, numbers, {}, {"mirror": "it wins"})

    found = find()

    assert found.result == "ok"
    assert found.fact.startswith(
        f"the mirror where it is resident, the GIL released from 64 KiB: {path}, new; "
    )
    assert "mirror 1: it wins" in found.fact


def test_one_that_changes_nothing(path: Path):
    calibration.write(path, DEFAULTS, {}, {"mirror": "it loses"})

    assert find().fact.endswith("new; the defaults fit this host")


def test_none_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("KVMMM_CALIBRATION")
    monkeypatch.delenv("KVMMM_POLICY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    found = find()

    assert (found.result, found.value) == ("ok", "defaults")
    assert "`kvmmm calibrate`" in found.fact


def test_one_that_was_refused(path: Path):
    calibration.write(path, DEFAULTS, {})
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 1'))

    found = find()

    assert found.result == "works differently"
    assert f"refused: {path}: schema 1, not 2" in found.fact
    assert "kvmmm calibrate" in found.remedy
    assert found.value == "defaults"


def test_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVMMM_CALIBRATION", "off")
    monkeypatch.setenv("KVMMM_POLICY", "mirror=1")
    assert find().value == "KVMMM_POLICY over defaults"

    calibration.write(path, DEFAULTS, {}, {"mirror": "it loses"})
    monkeypatch.setenv("KVMMM_CALIBRATION", str(path))
    assert "mirror 1: overridden by KVMMM_POLICY; the calibration says 0" in find().fact

    monkeypatch.setenv("KVMMM_POLICY", "nonsense")
    with pytest.raises(PolicyError):
        find()


def test_the_doctor_asks():
    themes = dict(examination.THEMES)
    assert policy.CHECKS[0] in themes["copies"]
