"""`bench policy`: its workloads use what their policy says; its values are worst cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmmm.bench import policies
from kvmmm.bench.policies import CALIBRATED, DEFAULT, FIXED, WORKLOADS, Workloads, ratios_of
from kvmmm.bench.runner import measure
from kvmmm.mm import MemoryManager
from kvmmm.mm.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def workloads() -> Iterator[Workloads]:
    with Workloads() as workloads:
        yield workloads


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_fills_the_mirror_if_its_policy_has_one(
    workloads: Workloads, name: str, monkeypatch: pytest.MonkeyPatch
):
    n_mirrored: list[int] = []
    close = MemoryManager.close

    def look(mm: MemoryManager) -> None:
        n_mirrored.append(mm.mirror.n_resident_pages if mm.mirror else 0)
        close(mm)

    monkeypatch.setattr(MemoryManager, "close", look)
    assert workloads.all[name](Policy(**FIXED["internal"])) > 0
    assert not any(n_mirrored)
    n_mirrored.clear()
    assert workloads.all[name](Policy(**FIXED["mirror_always"])) > 0
    assert any(n_mirrored)


def test_all_workloads_are_run_in_all_ways():
    ns = {CALIBRATED: 30, DEFAULT: 20, "x": 10, "y": 15}
    calls: list[str] = []

    def run(policy: Policy) -> int:
        calls.append(policy.source)
        return ns.get(policy.source, 10) * (1 + 9 * (calls.count(policy.source) == 1))

    given = {name: Policy(source=name) for name in (*FIXED, CALIBRATED, DEFAULT)}
    sample = policies.compare({"stream": run}, given)

    assert set(sample) == {
        name for p in (CALIBRATED, DEFAULT) for name in ratios_of(p) if "stream" in name
    }
    assert sample["calibrated stream/internal"] == 3.0
    assert sample["default stream/mirror_16"] == 2.0
    assert set(calls) == set(given)


def small(monkeypatch: pytest.MonkeyPatch, runs: dict[str, Callable[[Policy], int]]) -> None:
    monkeypatch.setattr(policies, "RANDOM_COPIES", 10)
    monkeypatch.setattr(policies, "FORKS", 1)
    init = Workloads.__init__

    def begin(workloads: Workloads) -> None:
        init(workloads)
        workloads.all.update(runs)

    monkeypatch.setattr(Workloads, "__init__", begin)


def test_the_group_gives_the_worst_of_all(monkeypatch: pytest.MonkeyPatch):
    # One fixed policy is twice as good for forks as all others.
    def fork(policy: Policy) -> int:
        return 50 if policy.source == "mirror_16" else 100

    def alike(_policy: Policy) -> int:
        return 100

    small(monkeypatch, {"fork": fork, "random": alike, "stream": alike})
    [group] = policies.GROUPS
    monkeypatch.setattr(group, "rounds", 2)
    monkeypatch.setattr(group, "warm_up", 0)

    records = {record.case.name: record for record in measure(group)}

    for name, policy in (
        ("policy/calibrated_worst", CALIBRATED),
        ("policy/default_worst", DEFAULT),
    ):
        assert records[name].value == 2.0
        assert records[name].extra["worst"] == f"{policy} fork/mirror_16"
        assert records[name].extra[f"{policy} random/internal"] == 1.0
        assert "product_ns" not in records[name].extra
