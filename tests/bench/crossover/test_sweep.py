"""The sweep, whose workers die, hang or are interrupted: what is done is kept, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmmm.bench.crossover import process, sweep
from kvmmm.bench.crossover.plan import estimate_s, plan_of
from kvmmm.bench.crossover.planted import Planted
from kvmmm.bench.crossover.record import Footer, ResultsError, Writer, read_results
from kvmmm.bench.crossover.sweep import SweepError
from kvmmm.bench.crossover.worker import Job
from tests.bench.crossover.sweeping import HOST, fake, keys, processes, run, small_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmmm.bench.crossover.plan import Plan


def test_everything_is_written(tmp_path: Path):
    outcome = run(tmp_path / "new" / "folder")
    assert outcome.complete
    assert not outcome.interrupted
    assert outcome.n_samples == 12
    assert outcome.errors == []
    results = read_results(tmp_path / "new" / "folder")
    assert results.header.mode == "self-check"
    assert results.header.seed == 1
    assert results.header.host == HOST
    assert list(results.cells.values()) == list(small_plan().cells)
    assert keys(results) == [(c, p, r) for p in (0, 1) for r in (0, 1, 2) for c in ("c0", "c1")]
    assert len(results.canaries) == 6
    assert results.footer is not None
    assert results.footer.complete


def test_planted_costs_are_told(tmp_path: Path):
    run(tmp_path, planted=Planted({"mirror": (200.0, 0.0)}))
    [line] = [line for line in read_results(tmp_path).others if line["kind"] == "planted"]
    assert Planted.from_json(line) == Planted({"mirror": (200.0, 0.0)})


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("dies", "died (signal 9): no memory left"),
        ("hangs", "not done in time: ended"),
        ("babbles", "wrote b'hello'"),
    ],
)
def test_a_process_that_fails_is_ended_and_told_and_the_next_one_runs(
    tmp_path: Path, kind: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(process, "_GRACE_S", 0.2)
    outcome = run(tmp_path, kind, plan=small_plan(seconds=3.0 if kind == "hangs" else 20.0))
    assert outcome.errors[0] == f"process 0: {why}"
    assert not outcome.complete
    results = read_results(tmp_path)
    done = [key for key in keys(results) if key[1] == 0]
    assert done == [(c, 0, r) for r in (0, 1) for c in ("c0", "c1")]
    first, second = processes(results)
    assert first["rounds_left"] == [1, 2]
    assert second["complete"]


@pytest.mark.parametrize("kind", ["deaf", "silent"])
def test_processes_that_measure_nothing_make_no_complete_sweep(tmp_path: Path, kind: str):
    outcome = run(tmp_path, kind)
    assert not outcome.complete
    assert len(outcome.errors) == 2
    assert outcome.n_samples == 0
    again = run(tmp_path, resume=True)
    assert again.complete
    assert again.n_samples == 12


def test_a_state_that_cannot_be_verified_is_told_and_no_number(tmp_path: Path):
    outcome = run(tmp_path, "complains")
    assert outcome.errors == ["c0: not resident"]
    assert outcome.complete
    errors = [line for line in read_results(tmp_path).others if line["kind"] == "error"]
    assert [line["process"] for line in errors] == [0, 1]


def test_the_rounds_that_are_missing_are_done_by_another_process(tmp_path: Path):
    assert not run(tmp_path, "dies").complete
    assert run(tmp_path, resume=True).complete
    results = read_results(tmp_path)
    third = processes(results)[2]
    assert (third["process"], third["continues"], third["complete"]) == (2, 0, True)
    assert {r for _, p, r in keys(results) if p == 2} == {1, 2}
    assert results.footer is not None
    assert results.footer.complete
    # Nothing is left.
    assert run(tmp_path, resume=True).n_samples == 0


def test_a_sweep_that_was_killed_goes_on_from_what_the_file_says(tmp_path: Path):
    run(tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"process": 0, "round": 2' in line)
    path.write_text("".join(lines[:cut]) + lines[cut][:20])
    assert run(tmp_path, resume=True).complete
    results = read_results(tmp_path)
    assert {(p, r) for _, p, r in keys(results)} == {
        (0, 0), (0, 1), (1, 2), (2, 0), (2, 1), (2, 2),
    }  # fmt: skip


def test_time_that_was_used_up_does_not_come_back(tmp_path: Path):
    run(tmp_path, "dies")
    with Writer(tmp_path / "results.jsonl", append=True) as writer:
        writer.write(Footer(complete=False, seconds=19.0))
    outcome = run(tmp_path, "slow", resume=True, plan=small_plan(seconds=20.0, rounds=50))
    assert outcome.seconds < 30


def test_ctrl_c_keeps_what_is_done(tmp_path: Path):
    def press(_done: float, _left: float | None, _text: str) -> None:
        if (tmp_path / "results.jsonl").read_text().count('"canary"') == 2:
            raise KeyboardInterrupt

    outcome = run(tmp_path, "slow", progress=press)
    assert outcome.interrupted
    assert not outcome.complete
    results = read_results(tmp_path)
    assert results.footer is not None
    assert not results.footer.complete
    assert processes(results)[0]["rounds_left"] == [2]
    assert run(tmp_path, resume=True).complete
    rounds = [r for _, p, r in keys(read_results(tmp_path)) if p in {0, 1}]
    assert sorted(set(rounds)) == [0, 1, 2]


def test_a_real_ctrl_c_ends_the_worker_too(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from kvmmm.bench.crossover import plan, sweep\n"
        "p = plan.plan_of('self-check')\n"
        "p = p._replace(cells=p.cells[:2], seconds=60.0, rounds=99)\n"
        "o = sweep.run(p, Path(sys.argv[1]), host={}, command=sys.argv[2:])\n"
        "sys.exit(130 if o.interrupted else 0)"
    )
    path = tmp_path / "results.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), *fake("slow")], start_new_session=True
    ) as child:
        end = time.monotonic() + 30
        while not path.exists() or "canary" not in path.read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(workers) == 1
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(20) == 130
    assert not Path(f"/proc/{workers[0]}").exists()
    footer = read_results(tmp_path).footer
    assert footer is not None
    assert not footer.complete


def test_results_are_not_written_over(tmp_path: Path):
    run(tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(SweepError, match="is there already"):
        run(tmp_path)
    with pytest.raises(SweepError, match="of other cells"):
        run(tmp_path, resume=True, plan=small_plan(cells=small_plan().cells[:1]))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ResultsError):
        run(tmp_path, resume=True)


def two_parts() -> Plan:
    cells = [cell for cell in plan_of("full").cells if cell.bytes == 4096 and cell.caller == "c"]
    of_each = [
        next(c for c in cells if (c.layout, c.order) == layout and c.operation == operation)
        for operation in ("copy_in", "copy_out")
        for layout in (("60000", "contiguous"), ("60000", "scattered"))
    ]
    return small_plan(cells=[cell._replace(id=f"c{n}") for n, cell in enumerate(of_each)])


def test_what_no_process_has_memory_for_is_measured_by_others(tmp_path: Path):
    # Two full mirrors of 60,000 segments are more VMAs than a process may have.
    assert run(tmp_path, plan=two_parts()).complete
    results = read_results(tmp_path)
    by_process: dict[int, set[str]] = {}
    for sample in results.samples:
        by_process.setdefault(sample.process, set()).add(results.cells[sample.cell].order)
    assert by_process == {0: {"contiguous"}, 1: {"scattered"}, 2: {"contiguous"}, 3: {"scattered"}}
    assert [line["part"] for line in processes(results)] == [0, 1, 0, 1]


@pytest.mark.parametrize("told", [True, False])
def test_each_part_is_gone_on_with_by_itself(tmp_path: Path, told: bool):
    # Whether the process that was cut off could still say which one it was, or not.
    run(tmp_path, plan=two_parts())
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"process": 1, "round": 2' in line)
    end = {
        "kind": "process", "process": 1, "complete": False, "rounds_left": [2], "continues": None,
        "part": 1, "seconds": 1,
    }  # fmt: skip
    path.write_text("".join(lines[:cut]) + (json.dumps(end) + "\n" if told else ""))
    assert run(tmp_path, plan=two_parts(), resume=True).complete
    results = read_results(tmp_path)
    rounds = [s.round for s in results.samples if results.cells[s.cell].order == "scattered"]
    assert sorted(rounds) == sorted([0, 1, 2] * 2 * 2)
    assert {line["part"] for line in processes(results) if line["continues"] == 1} == {1}


def test_time_that_a_killed_attempt_took_counts(tmp_path: Path):
    run(tmp_path, "dies")
    with Writer(tmp_path / "results.jsonl", append=True) as writer:
        writer.write_other(
            "process", process=2, complete=False, rounds_left=[1, 2], continues=0, seconds=500.0
        )
    outcome = run(tmp_path, resume=True)
    assert outcome.seconds >= 500


def test_before_anything_is_measured_progress_says_how_long_it_will_take(tmp_path: Path):
    the_plan = plan_of("full")._replace(n_processes=1)
    seen: list[float | None] = []

    def stop(_done: float, left: float | None, _text: str) -> None:
        seen.append(left)
        raise KeyboardInterrupt

    assert run(tmp_path, plan=the_plan, progress=stop).interrupted
    assert seen[0] == pytest.approx(estimate_s(the_plan), abs=30)


def test_how_it_was_measured_is_told(tmp_path: Path):
    run(tmp_path)
    [told] = [line for line in read_results(tmp_path).others if line["kind"] == "method"]
    assert told["operations_cold"] == 3
    assert set(told["no_references"]) == {"zero_out", "swap", "cas", "absent"}


def test_progress_comes_to_its_end(tmp_path: Path):
    seen: list[tuple[float, float | None]] = []
    run(tmp_path, progress=lambda done, left, _text: seen.append((done, left)))
    fractions = [done for done, _ in seen]
    assert all(0 <= done <= 1 for done in fractions)
    assert fractions[-1] > 0.9
    assert all(left is None or 0 <= left <= 20 for _, left in seen)


def test_a_job_travels():
    job = Job(3, small_plan().cells, range(2), 12.5, 7, Planted({"mirror": (1.0, 2.0)}))
    assert Job.from_json(job.as_json()) == job._replace(rounds=[0, 1], cells=list(job.cells))
    assert Job.from_json(job._replace(planted=None).as_json()).planted is None


@pytest.mark.slow
def test_real_workers_measure_in_time(tmp_path: Path):
    # One cell of each kind, in real processes.
    cells = [
        cell
        for cell in plan_of("quick").cells
        if cell.bytes == 4096 and cell.layout in {"1", "1000"} and cell.operation == "copy_in"
    ]
    threads = threading.active_count()
    started = time.monotonic()
    outcome = sweep.run(
        plan_of("quick")._replace(cells=cells, seconds=16.0, n_processes=2, rounds=3), tmp_path,
        host=HOST,
    )  # fmt: skip
    assert time.monotonic() - started < 20
    assert outcome.errors == []
    assert outcome.complete
    results = read_results(tmp_path)
    assert all(isinstance(line["spoiled"], dict) for line in processes(results))
    by_cell: dict[str, int] = {}
    for sample in results.samples:
        by_cell[sample.cell] = by_cell.get(sample.cell, 0) + 1
        assert {"internal", "internal2", "mirror", "walk"} <= set(sample.ns)
    assert set(by_cell) == {cell.id for cell in cells}
    assert all(0.2 < canary.ghz < 10 for canary in results.canaries)
    assert threading.active_count() == threads


def test_lines_of_the_file_are_json(tmp_path: Path):
    run(tmp_path)
    kinds: Sequence[str] = [
        json.loads(line)["kind"] for line in (tmp_path / "results.jsonl").read_text().splitlines()
    ]
    assert kinds[:3] == ["header", "cell", "cell"]
    assert kinds[-1] == "footer"
