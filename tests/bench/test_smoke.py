"""Every benchmark, once and quickly, with real guests; no time is judged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmmm.bench.command import EXIT_INTERRUPTED, bench

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.usefixtures("no_leak"),
    pytest.mark.skipif(
        "KVMMM_TEST_NPT" in os.environ, reason="an emulated CPU has no times worth measuring"
    ),
]


@pytest.mark.parametrize(
    "name",
    [
        "startup/first_exit",
        "exits/pio",
        "exits/console_lines",
        "mm/find_100k",
        "mm/cow_break_page",
        "copies/small_slice",
        pytest.param("paging/touch_64m", marks=pytest.mark.slow),
    ],
)
def test_a_case_gives_one_record(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    result = CliRunner().invoke(bench, [name, "--quick", "--json", str(path)])

    assert result.exit_code == 0, result.output
    host, case = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert {"kernel", "cpu", "governor", "n_cpus", "python", "kvmmm", "kvm", "date"} == set(
        host["host"]
    )
    assert case["case"] == name
    assert case["n"] > 0
    assert case["product_ns"] > 0
    assert case["floor_ns"] > 0


def wait_for_a_guest(process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until it has a VM: however busy the host, Ctrl-C does not come before its handler."""
    fds = Path(f"/proc/{process.pid}/fd")
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if any("kvm-vm" in str(fd.readlink()) for fd in fds.iterdir()):
                break
        time.sleep(0.01)
    time.sleep(0.3)  # and is at work


def test_ctrl_c_ends_real_guests_at_once_and_without_a_traceback() -> None:
    command = [sys.executable, "-m", "kvmmm.bench", "exits/pio"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for_a_guest(process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)

    assert process.returncode == EXIT_INTERRUPTED, output
    assert output.strip().endswith(b"interrupted")
    assert b"Traceback" not in output
