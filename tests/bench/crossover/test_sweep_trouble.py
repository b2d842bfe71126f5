"""A sweep in trouble: nonsense from a worker, a full disk, Ctrl-C where it is least welcome."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvmmm.bench.crossover import process, sweep
from kvmmm.bench.crossover.plan import plan_of
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.record import Writer, read_results
from kvmmm.bench.crossover.sweep import SweepError
from tests.bench.crossover.fake_worker import GARBAGE
from tests.bench.crossover.sweeping import HOST, fake, keys, run, small_plan


@pytest.mark.parametrize("kind", [kind for kind in GARBAGE if kind != "babbles"])
def test_what_no_worker_says_ends_it_and_is_not_written(tmp_path: Path, kind: str):
    outcome = run(tmp_path, kind)
    assert outcome.errors[0].startswith("process 0: wrote ")
    results = read_results(tmp_path)
    assert {(p, r) for _, p, r in keys(results)} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert run(tmp_path, resume=True).complete


def test_a_worker_that_never_reads_its_job_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A job of a full sweep is longer than a pipe holds.
    monkeypatch.setattr(process, "_GRACE_S", 0.2)
    monkeypatch.setattr(sweep, "_LEAST_S", 0.1)
    cells = plan_of("full").cells
    started = time.monotonic()
    outcome = run(tmp_path, "asleep", plan=small_plan(cells=cells, seconds=1.0, n_processes=1))
    assert outcome.errors[0] == "process 0: not done in time: ended"
    assert time.monotonic() - started < 20


def test_a_worker_that_cannot_be_started_is_told(tmp_path: Path):
    missing = [str(tmp_path / "python")]
    outcome = sweep.run(small_plan(), tmp_path / "out", host=HOST, command=missing)
    assert outcome.errors[0] == "process 0: cannot be started: No such file or directory"
    assert not outcome.complete
    assert run(tmp_path / "out", resume=True).complete


@pytest.mark.parametrize("when", ["facts", "cells"])
def test_ctrl_c_before_anything_is_measured_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    # Facts take seconds: what is more usual than to see a wrong option meanwhile.
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "facts":
            patch.setattr(sweep.facts, "commit", interrupt)
        else:
            patch.setattr(Writer, "write_other", interrupt)
        outcome = run(tmp_path, planted=Planted({}))
    assert outcome.interrupted
    assert not outcome.complete
    assert not (tmp_path / "results.jsonl").exists()
    assert run(tmp_path, resume=when == "cells").complete
    assert not list(tmp_path.glob("*.new"))


def test_ctrl_c_again_while_the_first_is_obeyed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def press(_done: float, _left: float | None, _text: str) -> None:
        if (tmp_path / "results.jsonl").read_text().count('"canary"') == 2:
            raise KeyboardInterrupt

    def write_other(self: Writer, kind: str, **fields: Any) -> None:
        if kind in {"process", "footer"}:
            raise KeyboardInterrupt
        usual(self, kind, **fields)

    usual = Writer.write_other
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_other", write_other)
        outcome = run(tmp_path, "slow", progress=press)
    assert outcome.interrupted
    assert len(keys(read_results(tmp_path))) >= 4
    assert run(tmp_path, resume=True).complete
    assert {r for _, p, r in keys(read_results(tmp_path)) if p in {0, 1}} == {0, 1, 2}


def test_a_full_disk_is_told_and_what_is_there_is_gone_on_with(tmp_path: Path):
    # A limit on files is as good as a disk: the line that does not fit is written in part.
    run(tmp_path / "other")
    beginning, _, _ = (tmp_path / "other" / "results.jsonl").read_text().partition('{"kind": "sam')
    limit = len(beginning) + 450
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from kvmmm.bench.crossover import plan, sweep\n"
        "p = plan.plan_of('self-check')\n"
        "p = p._replace(cells=p.cells[:2], seconds=20.0, rounds=3, n_processes=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try: sweep.run(p, Path(sys.argv[1]), host={'cpu': 'none'}, seed=1, command=sys.argv[3:])\n"
        "except sweep.SweepError as e: print(e)"
    )
    end = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(limit), *fake("works")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "cannot be written: File too large. Make room" in end.stdout, end
    assert "--resume" in end.stdout
    content = (tmp_path / "results.jsonl").read_bytes()
    assert len(beginning) < len(content) <= limit
    assert content.endswith(b"}\n")
    n_kept = len(read_results(tmp_path).samples)
    assert n_kept
    outcome = run(tmp_path, resume=True)
    assert outcome.complete
    assert len(read_results(tmp_path).samples) == n_kept + outcome.n_samples


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match=r"cannot be written: .* name another folder"):
        run(tmp_path / "file" / "folder")
    with pytest.raises(SweepError, match="cannot be written"):
        run(Path("/proc/sys/kvmmm"))
