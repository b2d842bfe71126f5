"""What the header says about the host: asked once what takes seconds, anew what changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmmm.bench.crossover import facts

if TYPE_CHECKING:
    import pytest


def test_facts_that_last_are_found_out_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def record() -> dict[str, Any]:
        asked.append("record")
        return {"cpu": "some", "date": "now", "kvmmm": "0", "kvm": None}

    def kind() -> str:
        asked.append("kind")
        return "none"

    loads = iter([(0.5, 0, 0), (7.25, 0, 0)])
    monkeypatch.setattr(facts, "host_record", record)
    monkeypatch.setattr(facts, "_kvm_kind", kind)
    monkeypatch.setattr(facts.os, "getloadavg", lambda: next(loads))
    facts._lasting_facts.cache_clear()
    try:
        first, second = facts.host_facts(), facts.host_facts()
    finally:
        facts._lasting_facts.cache_clear()
    assert sorted(asked) == ["kind", "record"]
    assert first["load"] == [0.5, 0, 0]
    assert second["load"] == [7.25, 0, 0]
    assert {**first, "load": 0, "steal_ticks": 0} == {**second, "load": 0, "steal_ticks": 0}
    assert {"kvm", "microcode", "thp_shmem", "mitigations", "max_map_count"} <= set(first)
    assert not {"date", "kvmmm"} & set(first)
