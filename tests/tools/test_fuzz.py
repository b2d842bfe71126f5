"""tools/fuzz: it runs, it finds what is planted, it can be made to find it again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.fuzz.entries import ENTRIES, Call
from tools.fuzz.hostile import Exporter, Index, LyingList, Truth, show
from tools.fuzz.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

REPOSITORY = Path(__file__).resolve().parents[2]


def run_tool(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.fuzz", *arguments],
        check=False, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY,
    )  # fmt: skip


def provoked(what: str) -> tuple[str, ...]:
    return (
        "--seed", "7", "--minutes", "0.5", "--cases", "50", "--findings", "2", "--deadline", "3",
        "--provoke", what,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hanging() -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """A run in which hangs are found: it mostly waits, so it runs beside other tests."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run_tool, *provoked("hang"))


@pytest.mark.slow
@pytest.mark.usefixtures("hanging")
def test_it_runs_and_finds_nothing():
    done = run_tool("--seed", "1", "--minutes", "0.05", "--cases", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("from seed 1 on, 0.05 minutes\n")
    assert "nothing found" in done.stdout
    match = re.search(r"(\d+) cases in (\d+) epochs", done.stdout)
    assert match is not None
    assert int(match[1]) >= 300
    # What is called how often.
    assert all(
        re.search(rf"\d+ {name}", done.stdout) for name in ("copy_in", "vec", "MirrorWindow")
    )
    assert "(not there)" not in done.stdout.replace("PageWalk (not there)", "")
    assert "minutes left" in done.stderr


@pytest.mark.slow
def test_a_replay_finds_it_again_with_as_few_cases_as_will_do():
    done = run_tool("--seed", "5", "--replay", "--cases", "40", "--provoke", "reference at 30")
    assert done.returncode == 1
    assert "reference in seed 5" in done.stdout
    assert "it takes the cases from 30 on (--first 30)" in done.stdout
    calm = run_tool("--seed", "5", "--replay", "--cases", "40", "--minutes", "0.2")
    assert (calm.returncode, "nothing found" in calm.stdout) == (0, True), calm.stdout


@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_summary():
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.fuzz", "--seed", "1", "--cases", "20"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith("from seed 1")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        shown = process.stdout.read()
    assert process.wait(30) == 130
    assert shown.startswith("\nstopped\n")
    assert "nothing found" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind"),
    [("crash", "crash (SIGSEGV)"), ("leak", "leak"), ("invariant", "invariant"), ("hang", "hang")],
)
def test_it_finds_what_is_planted(
    what: str, kind: str, hanging: Future[subprocess.CompletedProcess[str]]
):
    done = hanging.result() if what == "hang" else run_tool(*provoked(what))
    assert done.returncode == 1
    assert f"found: {kind}, seed 7\nfound: {kind}, seed 8\n" in done.stdout
    assert f"{kind} in seed 7" in done.stderr
    # What leads there, and how to see it again.
    assert f"    provoke {what}\n" in done.stderr
    assert 'again: make fuzz ARGS="--seed 7 --replay"' in done.stderr
    if what == "hang":
        assert "signal.pause" in done.stderr or "_provoke" in done.stderr


def test_a_record_keeps_the_last_lines(tmp_path: Path):
    with Record(tmp_path / "record") as record, Record(tmp_path / "record") as other:
        assert (record.last(), record.tail(3)) == (0, [])
        for n in range(10_000):
            record.note(f"case {n} " + "x" * (n % 400))
        assert other.last() == 10_000
        tail = other.tail(3)
        assert [line.split(" x")[0] for line in tail] == ["case 9997", "case 9998", "case 9999"]
        assert max(map(len, tail)) < 256
        record.note("\ud800 and \0")
        assert other.last() == 10_001


def test_whatever_it_is_it_can_be_shown():
    class Unshowable:
        def __repr__(self) -> str:
            raise KeyError

    released = memoryview(b"")
    released.release()
    for thing, shown in (
        (5, "5"), (1 << 20, "0x100000"), (-4096, "-0x1000"), (True, "True"), (None, "None"),
        (b"abc", "bytes[3]"), (bytearray(9), "bytearray[9]"), (released, "memoryview(released)"),
        (memoryview(b"ab"), "memoryview(ro 'B'(2,))"), ((1, [b"x"]), "(1, [bytes[1]])"),
        (Unshowable(), "Unshowable (KeyError)"), (Truth(), "Truth()"), (LyingList(), "LyingList()"),
        (Index(8, list, "quiet"), "Index(8, quiet)"), (Exporter(5), "Exporter(5)"),
        ("x" * 99, repr("x" * 99)[:60] + "..."),
    ):  # fmt: skip
        assert show(thing) == shown
    assert str(Call(print, 5, b"x", options={"opts": None})) == "(5, bytes[1], opts=None)"


def test_every_entry_point_is_one():
    from tests.mm.copying import Ground

    with Ground() as ground:
        for name in ENTRIES:
            if (
                name.islower()
                and " " not in name
                and name not in {"vec", "many", "disturb", "streams"}
            ):
                assert callable(getattr(ground.mm, name))
