"""The policy of copies: its numbers, where they come from, and when a calibration is refused."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmmm.errors import PolicyError
from kvmmm.mm import calibration
from kvmmm.mm.policy import DEFAULTS, Policy, from_environment, read_calibration

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = DEFAULTS | {"mirror": 1, "mirror_reuses": 7, "release_bytes": 1 << 16}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kvmmm" / "calibration.json"


def change(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))


def in_force(path: Path, **more: str) -> Policy:
    return from_environment({"KVMMM_CALIBRATION": str(path), **more})


def test_defaults_without_a_file(tmp_path: Path):
    policy = from_environment({"XDG_CACHE_HOME": str(tmp_path)})

    assert policy.as_dict() == DEFAULTS
    assert (policy.source, policy.refused) == ("defaults", "")


def test_a_file_that_is_named_and_not_there_is_told(path: Path):
    policy = in_force(path)

    assert policy.source == "defaults"
    assert str(path) in policy.refused


def test_what_is_written_is_in_force(path: Path):
    calibration.write(path, NUMBERS, {"fault_ns": 3000.0})

    policy = in_force(path)

    assert policy.as_dict() == NUMBERS
    assert (policy.source, policy.refused) == (str(path), "")
    assert calibration.read(path)["costs"] == {"fault_ns": 3000.0}
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(path: Path):
    calibration.write(path, NUMBERS, {})

    with pytest.raises(TypeError):
        calibration.write(path, DEFAULTS, {"fault_ns": object()})

    assert read_calibration(path) == NUMBERS
    calibration.write(path, DEFAULTS, {})
    assert read_calibration(path) == DEFAULTS
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_the_environment_overrides_single_numbers(path: Path):
    calibration.write(path, NUMBERS, {})

    policy = in_force(path, KVMMM_POLICY=" mirror_reuses = 0x20, mirror=0,")

    assert policy.as_dict() == NUMBERS | {"mirror_reuses": 32, "mirror": 0}
    assert policy.source == f"KVMMM_POLICY over {path}"
    assert from_environment({"KVMMM_CALIBRATION": "off", "KVMMM_POLICY": ""}).source == "defaults"


@pytest.mark.parametrize(
    "text", ["mirror", "mirror=x", "speed=1", "mirror=-1", "mirror=4294967296"]
)
def test_a_malformed_variable_raises(text: str):
    with pytest.raises(PolicyError) as caught:
        from_environment({"KVMMM_CALIBRATION": "off", "KVMMM_POLICY": text})

    assert caught.value.source == "KVMMM_POLICY"


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"host": "x86_64; Another CPU; microcode 1; 6.1"}, "another host: it says .*Another CPU"),
        ({"host": None}, "no calibration.*host"),
        ({"host": {}}, "another host: .*its kernel was None, here it is"),
        ({"reasons": 7}, "no calibration"),
        ({"schema": 99}, "schema 99, not 2"),
        ({"build": "00000000"}, "another build"),
        ({"build": None}, "another build"),
        ({"made": days_ago(400)}, "400 days ago"),
        ({"made": days_ago(-30)}, "in the future"),
        ({"made": "yesterday"}, "when it was made"),
        ({"made": "2026-01-01T00:00:00"}, "when it was made"),
        ({"made": None}, "when it was made"),
        ({"made": 7}, "when it was made"),
        ({"policy": {"speed": 1}}, "there is no 'speed'"),
        ({"policy": {"mirror": "on"}}, "not 'on'"),
        ({"policy": {"mirror": 1.5}}, "not 1.5"),
        ({"policy": 7}, "no calibration"),
        ({"policy": None}, "no calibration.*policy"),
        ({"schema": None}, "no calibration.*schema"),
    ],
)
def test_a_foreign_or_stale_file_is_refused_with_the_reason(
    path: Path, fields: dict[str, Any], why: str
):
    calibration.write(path, NUMBERS, {})
    change(path, **fields)

    with pytest.raises(PolicyError, match=why):
        read_calibration(path)
    policy = in_force(path)
    assert policy.as_dict() == DEFAULTS
    assert policy.source == "defaults"
    assert policy.refused.startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_calibration_is_refused(path: Path, content: bytes):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)

    assert "no calibration" in in_force(path).refused


def test_a_directory_in_its_place_is_told(path: Path):
    path.mkdir(parents=True)

    assert "directory" in in_force(path).refused


@pytest.mark.parametrize("age_days", [0, 179, -0.9])
def test_a_recent_one_is_good(path: Path, age_days: float):
    calibration.write(path, NUMBERS, {})
    change(path, made=days_ago(age_days))

    assert read_calibration(path) == NUMBERS


def test_assignments_are_refused():
    policy = Policy(mirror=1, source="here")
    before = repr(policy)

    for name in (*DEFAULTS, "source", "refused", "anything"):
        with pytest.raises(AttributeError, match=name):
            setattr(policy, name, 0)
        with pytest.raises(AttributeError, match=name):
            delattr(policy, name)

    assert repr(policy) == before
    assert not hasattr(policy, "__dict__")


def test_a_policy_can_be_copied_and_sent(path: Path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    for policy in (Policy(mirror=1, mirror_vmas=9, source="here"), in_force(path)):
        sent = pickle.loads(pickle.dumps(policy))  # noqa: S301 - our own
        for same in (copy.copy(policy), copy.deepcopy(policy), sent):
            assert repr(same) == repr(policy)
            assert (same.as_dict(), same.refused) == (policy.as_dict(), policy.refused)


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    below = ("kvmmm", "calibration.json")

    assert calibration.calibration_path({}) == tmp_path.joinpath(".cache", *below)
    at = calibration.calibration_path({"XDG_CACHE_HOME": "/c"})
    assert str(at) == "/c/kvmmm/calibration.json"
    relative = calibration.calibration_path({"XDG_CACHE_HOME": "c"})
    assert relative == tmp_path.joinpath(".cache", *below)
    assert str(calibration.calibration_path({"KVMMM_CALIBRATION": "x.json"})) == "x.json"
    assert calibration.calibration_path({"KVMMM_CALIBRATION": "off"}) is None
