"""`kvmmm doctor`: one JSON object, lines for people, an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Command


@pytest.mark.kvm
@pytest.mark.npt
def test_json_and_exit_code(kvmmm: Command):
    done = kvmmm("doctor", "--json")
    record = json.loads(done.stdout)
    broken = [
        c
        for c in record["checks"]
        if c["needed"] and c["result"] not in {"ok", "works differently"}
    ]
    assert not broken
    assert record["ok"]
    assert done.returncode == 0
    assert record["paging"] in {"nested", "shadow"}
    assert record["ring0"] in {"native", "emulated"}
    keys = [check["key"] for check in record["checks"]]
    assert len(keys) == len(set(keys))


@pytest.mark.kvm
def test_lines_for_people(kvmmm: Command):
    done = kvmmm("doctor")
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert "All that kvmmm needs works" in text
    assert "console ring, doorbell" in text
    assert not done.stderr


def test_without_kvm_nothing_else_is_tried(kvmmm_without_kvm: Command):
    record = json.loads(kvmmm_without_kvm("doctor", "--json").stdout)
    results = {check["key"]: check["result"] for check in record["checks"]}
    assert results.pop("open") == "missing"
    assert set(results.values()) == {"not tried"}
    assert not record["ok"]
    assert record["paging"] is None
