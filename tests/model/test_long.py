"""The seeded driver: what an epoch does depends on its seed alone, and a run goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvmmm.mm.pma import Removal
from tests.model import long

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "STEPS_IN_AN_EPOCH", 60)


def test_an_epoch_can_be_repeated():
    epochs = [long.Epoch(3, 7, 60) for _ in range(2)]
    for epoch in epochs:
        epoch.run(20)
    steps = [[(rule.name, arguments) for rule, arguments in e.done] for e in epochs]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 60
    assert epochs[0].options == epochs[1].options


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = tmp_path / "new" / "state.json"
    words = ["--state", str(state), "--steps", "180"]
    assert long.main([*words, "--seed", "5", "--minutes", "0"]) == long.UNFINISHED
    assert long.main([*words[:3], "120", "--seed", "5"]) == 0
    assert not state.exists()
    state.write_text(json.dumps({"seed": 9, "epochs": 2, "steps": 60}), encoding="utf-8")
    capsys.readouterr()
    assert long.main(words) == 0
    assert "seed 9, epochs 2 to 3" in capsys.readouterr().out
    state.write_text(json.dumps({"seed": 9, "epochs": 2, "steps": 60}), encoding="utf-8")
    assert long.main([*words, "--seed", "4"]) == 0
    assert "seed 4, epochs 0 to 3" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = tmp_path / "state.json"
    do = long.do

    def stopped(seed: int, number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return do(seed, number)

    monkeypatch.setattr(long, "do", stopped)
    assert long.main(["--state", str(state), "--seed", "1"]) == long.STOPPED
    assert json.loads(state.read_text(encoding="utf-8"))["epochs"] == 2


def test_a_failure_is_told_as_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Removal, "unmap", lambda *_: None)
    monkeypatch.setattr(long, "STEPS_IN_AN_EPOCH", 500)
    assert long.main(["--seed", "3", "--epoch", "0", "--check", "1", "--show", "500"]) == 1
    told = capsys.readouterr().out
    assert "seed 3, epoch 0, step " in told
    code = told[told.index("from tests.model.rules") : told.index("\nagain:")]
    names: dict[str, object] = {}
    try:
        exec(f"{code}\nworld.check()", names)  # noqa: S102
    except AssertionError:
        return
    raise AssertionError("the code does not fail")
