"""`bench faults --out`, `bench exits --out`: from the sweep to the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")  # here: it starts a thread that stays

from click.testing import CliRunner

from kvmmm.bench.command import bench
from kvmmm.bench.crossover import sweep
from kvmmm.bench.crossover.extras import MissingExtraError
from kvmmm.bench.crossover.record import read_results
from kvmmm.bench.crossover.sweep import Outcome, SweepError
from kvmmm.bench.economics import command
from kvmmm.bench.economics.worker import COMMAND
from kvmmm.bench.progress import duration_text
from tests.bench.economics.simulated import simulated, write_results

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


class Sweeps:
    """Stands for sweep.run: writes a sweep that never ran."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.outcome = Outcome(True, False, 12.0, 34, [])

    def run(self, plan: Any, folder: Path, **options: Any) -> Outcome:
        self.asked.append((plan.mode, options))
        options["progress"](0.5, 70.0, "process 1")
        write_results(folder, simulated(subject=plan.mode.partition("-")[0]))
        return self.outcome


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    found = Sweeps()
    monkeypatch.setattr(sweep, "run", found.run)
    return found


def invoke(*args: object) -> Result:
    return CliRunner().invoke(bench, list(map(str, args)))


def test_a_quick_sweep_ends_with_answer_and_report(sweeps: Sweeps, tmp_path: Path):
    folder = tmp_path / "here"
    result = invoke("faults", "--quick", "--out", folder, "--seed", 5)

    assert result.exit_code == 0, result.output
    [(mode, options)] = sweeps.asked
    assert (mode, options["seed"], options["resume"]) == ("faults-quick", 5, False)
    assert options["command"] == COMMAND
    answer = (folder / "answer.txt").read_text(encoding="utf-8")
    assert result.stdout == f"{answer}report: {folder / 'report.html'}\n"
    assert "surely pay" in answer
    assert "34 samples in 12 s" in result.stderr
    assert (folder / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert not (folder / "figures").exists()


def test_a_whole_sweep_has_figures_for_papers(sweeps: Sweeps, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = invoke("exits", "--out", tmp_path, "--resume")

    assert result.exit_code == 0, result.output
    assert sweeps.asked[0][0] == "exits"
    assert sweeps.asked[0][1]["resume"] is True
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"exits.svg", "exits.png"}


def test_without_matplotlib_it_says_what_to_install(
    sweeps: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("numpy", reason="numpy is not installed")
    monkeypatch.setattr("kvmmm.bench.crossover.report.figures.have_matplotlib", lambda: False)
    result = invoke("exits", "--out", tmp_path)

    assert result.exit_code == 0, result.output
    assert "pip install 'kvmmm[crossover]'" in result.stdout
    assert sweeps.asked


def test_without_numpy_the_results_are_there(
    sweeps: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def conclude(*_args: object, **_options: object) -> None:
        raise MissingExtraError(["numpy"], "the analysis of a sweep")

    monkeypatch.setattr(command, "conclude", conclude)
    result = invoke("faults", "--out", tmp_path)

    assert result.exit_code == 0
    assert "pip install 'kvmmm[crossover]'" in result.stderr
    assert sweeps.asked


def test_a_folder_that_takes_no_report_keeps_the_results(sweeps: Sweeps, tmp_path: Path):
    pytest.importorskip("numpy", reason="numpy is not installed")
    (tmp_path / "report.html").mkdir()
    result = invoke("exits", "--quick", "--out", tmp_path)

    assert result.exit_code == 1
    assert "no report: " in result.stderr
    assert "the results are kept" in result.stderr
    assert sweeps.asked


def test_ctrl_c_has_no_answer_and_says_how_to_go_on(sweeps: Sweeps, tmp_path: Path):
    sweeps.outcome = sweeps.outcome._replace(complete=False, interrupted=True)
    result = invoke("faults", "--quick", "--out", tmp_path)

    assert result.exit_code == 130
    assert result.stdout == ""
    assert f"kvmmm bench faults --quick --resume --out {tmp_path} goes on" in result.stderr


def test_errors_are_shown_and_what_is_not_complete_is_answered_but_fails(
    sweeps: Sweeps, tmp_path: Path
):
    pytest.importorskip("numpy", reason="numpy is not installed")
    errors = [f"process {n}: died" for n in range(10)]
    sweeps.outcome = sweeps.outcome._replace(complete=False, errors=errors)
    result = invoke("exits", "--quick", "--out", tmp_path)

    assert result.exit_code == 1
    assert "process 7: died" in result.stderr
    assert "2 more" in result.stderr
    assert "This host alone" in result.stdout


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: Any, **_options: Any) -> Outcome:
        raise SweepError("it is there already")

    monkeypatch.setattr(sweep, "run", refuse)
    result = invoke("faults", "--out", tmp_path)

    assert result.exit_code == 2
    assert "it is there already" in result.output


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0.4, "0:00"), (125, "2:05")])
def test_time_left(seconds: float | None, text: str):
    assert duration_text(seconds) == text


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.skipif("KVMMM_TEST_NPT" in os.environ, reason="an emulated CPU has no times")
def test_a_real_sweep_is_interrupted_keeps_what_is_done_and_is_not_begun_twice(tmp_path: Path):
    arguments = [sys.executable, "-m", "kvmmm", "bench", "exits", "--quick", "--out", tmp_path]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        path = tmp_path / "results.jsonl"
        until = time.monotonic() + 60
        while not path.exists() or b'"sample"' not in path.read_bytes():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert (child.returncode, out) == (130, b"")
    assert b"--resume" in err
    results = read_results(tmp_path)
    assert results.footer is not None
    assert not results.footer.complete
    assert results.samples
    assert results.header.mode == "exits-quick"
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    again = subprocess.run(arguments, capture_output=True, timeout=60, check=False)
    assert again.returncode == os.EX_USAGE
    assert b"is there already" in again.stderr
