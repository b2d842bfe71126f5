"""A sweep on a cluster: one a host, never two; what comes of each; what goes wrong with one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kvmmm.bench.crossover import cluster, cluster_host, extras
from kvmmm.bench.crossover.extras import MissingExtraError

needs_distributed = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="dask.distributed is not installed: pip install 'kvmmm[cluster]'",
)
HERE = Path(__file__).parent
COMPLETE = '{"kind": "header"}\n{"kind": "footer"}\n'


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every scenario of fake_cluster.py."""
    folder = tmp_path_factory.mktemp("cluster")
    # In a process of its own: Dask's threads stay until its end.
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cluster.py"), str(folder)],
        capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "answers.json").read_text())
    assert isinstance(found, dict)
    return found


@needs_distributed
@pytest.mark.parametrize("scenario", ["one", "process"])
def test_workers_of_one_host_make_one_sweep(answers: Any, scenario: str):
    answer = answers[scenario]

    [(host, folder, problem)] = answer["hosts"]
    assert (answer["log"].count("begin"), answer["log"].count("end")) == (1, 1)
    assert re.search(r"begin \S+ --quick --seed=3\n", answer["log"])
    assert problem == ""
    assert Path(folder).parts[-2:] == ("out", host)
    assert (Path(folder) / "results.jsonl").read_text() == COMPLETE
    assert answer["shown"] == [[1, 1, host]]
    assert not answer["interrupted"]


@needs_distributed
def test_hosts_of_one_name_have_folders_of_their_own(answers: Any):
    answer = answers["three"]

    assert len({folder for _, folder, _ in answer["hosts"]}) == 3
    assert answer["folders"] == [folder for _, folder, _ in answer["hosts"]]
    assert all((Path(folder) / "results.jsonl").exists() for folder in answer["folders"])
    # All at once: each host measures itself only.
    begins = [float(t) for t in re.findall(r"begin (\S+)", answer["log"])]
    ends = [float(t) for t in re.findall(r"end (\S+)", answer["log"])]
    assert len(begins) == len(ends) == 3


@needs_distributed
def test_one_host_that_fails_leaves_the_others(answers: Any):
    answer = answers["fails"]

    problems = [problem for _, _, problem in answer["hosts"] if problem]
    assert problems == ["it ended with 69: it cannot be measured here"]
    assert len(answer["folders"]) == 2


@needs_distributed
def test_a_host_that_is_measured_already_is_left_alone(answers: Any):
    answer = answers["busy"]

    [(_, _, problem)] = answer["hosts"]
    assert problem == "another sweep runs on this host"
    assert not answer["folders"]
    assert not answer["log"]


@needs_distributed
def test_ctrl_c_keeps_what_there_is(answers: Any):
    answer = answers["interrupt"]

    assert answer["interrupted"]
    [(_, folder, problem)] = answer["hosts"]
    assert problem == "interrupted"
    assert (Path(folder) / "results.jsonl").read_text() == '{"kind": "header"}\n'


@needs_distributed
def test_hosts_that_cannot_be_told_apart_are_not_measured(answers: Any):
    assert "no such file" in answers["broken"]["error"]


class NoWorkers:
    """A client of a cluster without workers."""

    def run(self, *_args: object, **_kwargs: object) -> dict[str, object]:
        return {}


def test_a_cluster_without_workers_is_told():
    with pytest.raises(cluster.ClusterError, match="cluster tcp://x: it has no workers"):
        cluster._hosts_of(NoWorkers(), "tcp://x", cluster_host.host_identity)


def test_without_distributed_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(extras, "find_spec", lambda _name: None)

    with pytest.raises(MissingExtraError, match=r"distributed: pip install 'kvmmm\[cluster\]'"):
        cluster.sweep_cluster("tcp://127.0.0.1:1", tmp_path, [], seconds=1)


# What happens on a host needs no cluster.


@pytest.fixture(autouse=True)
def _locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def sweep(tmp_path: Path, kind: str, *, seconds: float = 20, identity: str = "test") -> Any:
    command = [sys.executable, str(HERE / "fake_sweep.py"), kind, str(tmp_path / "log")]
    return cluster_host.sweep_here("token", f"{identity} {tmp_path}", [], command, seconds)


def test_a_host_answers_with_its_name_and_the_file(tmp_path: Path):
    assert sweep(tmp_path, "works") == (socket.gethostname(), COMPLETE.encode(), "")


def test_a_command_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        cluster_host.sweep_here("token", f"test {tmp_path}", [], ["/nonexistent/sweep"], 1)


def test_a_sweep_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster_host, "_END_S", 0.5)

    found = sweep(tmp_path, "waits", seconds=0.5)

    assert found.problem == "it was ended after 1 s"
    assert found.results == b'{"kind": "header"}\n'
    assert not any(cluster_host._running.values())


def test_a_host_is_one_kernel():
    assert cluster_host.host_identity() == cluster_host.host_identity()
    assert len(cluster_host.host_identity()) == 36


def test_names_of_hosts_become_names_of_folders():
    run = cluster._Run(None, Path("/nonexistent"), lambda *_: None)

    names = [run._name_for(name) for name in ("a.b", "a.b", "../x", "", "a.b")]

    assert names == ["a.b", "a.b-2", "x", "host", "a.b-3"]


# The command's part: who is told what.


def outcome_of(tmp_path: Path, *problems: str, interrupted: bool = False) -> cluster.ClusterOutcome:
    hosts = [
        cluster.HostOutcome(f"h{i}", None if problem else tmp_path / f"h{i}", problem)
        for i, problem in enumerate(problems)
    ]
    return cluster.ClusterOutcome(hosts, interrupted)


@pytest.mark.parametrize(
    ("problems", "interrupted", "status", "told"),
    [
        (("", ""), False, 0, "h0 beside h1"),
        (("", "it broke"), False, 1, "the answer of h0"),
        (("interrupted", ""), True, 130, "the answer of h1"),
        (("it broke",), False, 1, ""),
    ],
)
def test_every_host_is_concluded_and_all_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    problems: tuple[str, ...], interrupted: bool, status: int, told: str,
):  # fmt: skip
    from kvmmm.bench.crossover import compare

    asked: list[Any] = []

    def sweep(*args: object, **kwargs: Any) -> cluster.ClusterOutcome:
        asked.append(args)
        kwargs["progress"](0, len(problems), "")
        return outcome_of(tmp_path, *problems, interrupted=interrupted)

    def side_by_side(folders: list[Path], out: Path) -> compare.Compared:
        asked.append(out)
        return compare.Compared(" beside ".join(folder.name for folder in folders), agree=True)

    monkeypatch.setattr(cluster, "sweep_cluster", sweep)
    monkeypatch.setattr(cluster, "conclude", lambda folder: [f"the answer of {folder.name}"])
    monkeypatch.setattr(compare, "main", side_by_side)

    assert cluster.run("tcp://x", "quick", tmp_path) == status

    shown = capsys.readouterr()
    assert asked[0] == ("tcp://x", tmp_path, ["--quick"])
    assert asked[1:] == ([tmp_path] if told.startswith("h0 beside") else [])
    assert told in shown.out
    assert f"0 of {len(problems)} hosts done" in shown.err
    assert all(problem in shown.err for problem in problems)


def test_results_stay_where_they_cannot_be_analysed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_folder: Path) -> list[str]:
        raise MissingExtraError(["numpy"], "the analysis")

    monkeypatch.setattr(cluster, "sweep_cluster", lambda *_, **__: outcome_of(tmp_path, ""))
    monkeypatch.setattr(cluster, "conclude", fail)

    assert cluster.run("tcp://x", "default", tmp_path) == 0
    assert "no report: the analysis needs numpy" in capsys.readouterr().err


def test_a_self_check_is_for_one_host(tmp_path: Path):
    with pytest.raises(cluster.ClusterError, match="about one host"):
        cluster.run("tcp://x", "self-check", tmp_path)
