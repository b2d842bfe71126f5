"""`kvmmm bench crossover` and `compare`: options, exit status, what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from kvmmm.bench.command import bench
from kvmmm.bench.crossover import facts, finish, sweep
from kvmmm.bench.crossover.compare import Compared
from kvmmm.bench.crossover.extras import MissingExtraError
from kvmmm.bench.crossover.sweep import Outcome, SweepError
from kvmmm.bench.registry import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Invoke = Callable[..., Result]


class Sweeps:
    """Stands for sweep.run: notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Path, dict[str, Any]]] = []
        self.outcome = Outcome(
            complete=True, interrupted=False, seconds=12.0, n_samples=34, errors=[]
        )

    def run(self, plan: Any, folder: Path, **options: Any) -> Outcome:
        self.asked.append((plan.mode, folder, options))
        options["progress"](0.5, 70.0, "process 1")
        return self.outcome


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    found = Sweeps()
    monkeypatch.setattr(sweep, "run", found.run)
    monkeypatch.setattr(
        finish, "conclude", lambda folder, tell: tell(f"the answer is in {folder.name}")
    )
    return found


@pytest.fixture
def invoke() -> Invoke:
    return lambda *args: CliRunner().invoke(bench, ["crossover", *map(str, args)])


@pytest.mark.parametrize(
    ("option", "mode"), [("--quick", "quick"), ("--full", "full"), (None, "default")]
)
def test_a_sweep_and_its_answer(
    sweeps: Sweeps, invoke: Invoke, tmp_path: Path, option: str | None, mode: str
):
    args = [option] if option else []
    result = invoke(*args, "--out", tmp_path / "here", "--seed", 5)
    assert result.exit_code == 0, result.output
    [(asked, folder, options)] = sweeps.asked
    assert (asked, folder, options["seed"], options["resume"]) == (
        mode, tmp_path / "here", 5, False,
    )  # fmt: skip
    assert result.stdout == "the answer is in here\n"
    assert "34 samples in 12 s" in result.stderr


def test_ctrl_c_has_no_answer_and_says_how_to_go_on(sweeps: Sweeps, invoke: Invoke, tmp_path: Path):
    sweeps.outcome = sweeps.outcome._replace(complete=False, interrupted=True)
    result = invoke("--out", tmp_path)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert f"--resume --out {tmp_path} goes on" in result.stderr.replace("\n", " ")


def test_errors_are_shown_and_a_sweep_that_is_not_complete_is_answered_but_fails(
    sweeps: Sweeps, invoke: Invoke, tmp_path: Path
):
    errors = [f"process {n}: died" for n in range(10)]
    sweeps.outcome = sweeps.outcome._replace(complete=False, errors=errors)
    result = invoke("--out", tmp_path)
    assert result.exit_code == 1
    assert "process 7: died" in result.stderr
    assert "2 more" in result.stderr
    assert "the answer" in result.stdout


def test_without_numpy_the_results_are_there_and_it_says_what_to_install(
    sweeps: Sweeps, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def conclude(_folder: Path, _tell: object) -> list[str]:
        raise MissingExtraError(["numpy"], "the analysis of a sweep")

    monkeypatch.setattr(finish, "conclude", conclude)
    result = invoke("--out", tmp_path)
    assert result.exit_code == 0
    assert "pip install 'kvmmm[crossover]'" in result.stderr
    assert sweeps.asked


def test_what_cannot_be_gone_on_with_is_refused(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_args: Any, **_options: Any) -> Outcome:
        raise SweepError("it is there already")

    assert "--resume needs --out" in invoke("--resume").output
    monkeypatch.setattr(sweep, "run", refuse)
    result = invoke("--resume", "--out", tmp_path)
    assert result.exit_code == 2
    assert "it is there already" in result.output


def test_other_modules_do_the_self_check_the_cluster_and_the_comparison(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path
):
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def module_of(name: str) -> Any:
        return SimpleNamespace(
            run=lambda *args: asked.append((name, args)),
            main=lambda *args: Compared(f"{name} of {len(args[0])}", agree=False),
        )

    monkeypatch.setattr(finish, "module_of", module_of)
    assert invoke("--self-check", "--out", tmp_path).exit_code == 0
    assert invoke("--cluster", "tcp://a:1", "--quick", "--out", tmp_path).exit_code == 0
    assert asked == [("selfcheck", (tmp_path,)), ("cluster", ("tcp://a:1", "quick", tmp_path))]
    result = CliRunner().invoke(bench, ["compare", str(tmp_path), str(tmp_path)])
    assert result.stdout == "compare of 2\n"
    assert result.exit_code == 0
    folders = [str(tmp_path)] * 3
    assert CliRunner().invoke(bench, ["compare", "--agree", *folders]).exit_code == 1
    assert CliRunner().invoke(bench, ["compare", str(tmp_path)]).exit_code == 2


def test_bench_knows_its_commands():
    listed = CliRunner().invoke(bench, ["--list"]).output
    unknown = CliRunner().invoke(bench, ["nothing"]).output
    for name in COMMANDS:
        result = CliRunner().invoke(bench, [name, "--help"])
        assert result.exit_code == 0
        assert f"bench {name}" in result.output
        assert name in listed
        assert name in unknown


def test_facts_of_the_host_name_what_a_reader_must_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(facts, "_kvm_kind", lambda: "none")
    monkeypatch.setattr(facts, "host_record", lambda: {"cpu": "x", "kvm": None, "date": "today"})
    found = facts.host_facts()
    assert {
        "cpu", "microcode", "kvm", "thp", "thp_shmem", "mitigations", "load", "steal_ticks",
        "tsc_mhz", "n_nodes", "max_map_count",
    } <= set(found)  # fmt: skip
    assert "date" not in found
    assert found["max_map_count"] > 0
