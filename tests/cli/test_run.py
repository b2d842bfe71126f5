"""`kvmmm run` as a user sees it: exit codes, streams, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import last_line

if TYPE_CHECKING:
    from .conftest import Command

pytestmark = pytest.mark.kvm

TIMEOUT_SECONDS = 60


@pytest.mark.npt
def test_hello(kvmmm: Command):
    done = kvmmm("run", "hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"hello from ring 0")
    assert done.stderr == b"kvmmm: the guest exited with status 0\n"


@pytest.mark.parametrize(
    ("args", "code", "end"),
    [
        (("qemu",), 33, "the guest exited with status 33"),
        (("nox",), 67, "guest fault (exit code 67)"),
        (("null",), 67, "guest fault (exit code 67)"),
        (("triple",), 78, "the guest triple-faulted (exit code 78)"),
        (("hog", "--arena", "16M"), 72, "guest memory is exhausted (exit code 72)"),
        (("spin", "--timeout", "100ms"), 73, "the deadline passed (exit code 73)"),
        (("touch", "--", "bites=3M"), 2, "the guest exited with status 2"),
    ],
)
def test_exit_codes_and_whose_they_are(kvmmm: Command, args: tuple[str, ...], code: int, end: str):
    done = kvmmm("run", *args)
    assert done.returncode == code, done.stderr
    assert last_line(done.stderr) == f"kvmmm: {end}"
    assert b"Traceback" not in done.stderr


def test_tests_of_the_guest_are_counted(kvmmm: Command):
    done = kvmmm("run", "traps")
    assert done.returncode == 0
    assert " passed, 0 failed" in last_line(done.stderr)


def test_a_bundled_guest_has_its_own_command_line_until_the_user_gives_one(kvmmm: Command):
    assert b"[1] two=2" in kvmmm("run", "args").stdout
    given = kvmmm("run", "args", "--", "--first", "second").stdout
    assert b"--first" in given
    assert b"two=2" not in given


def test_a_file_wins_over_a_name(kvmmm: Command, tmp_path: Path):
    (tmp_path / "hello").write_bytes(b"not an ELF")
    done = kvmmm("run", "hello", cwd=tmp_path)
    assert done.returncode == 65
    assert b"not an ELF" in done.stderr


def test_a_flat_binary(kvmmm: Command, tmp_path: Path):
    flat = tmp_path / "flat.bin"
    flat.write_bytes(b"\xb8\x05\x00\x00\x00\xe7\xb8")  # mov $5, %eax; out %eax, $0xb8
    assert kvmmm("run", str(flat), "--base", "0x100000").returncode == 5
    assert kvmmm("run", str(flat)).returncode == 65


def test_rejected_images_need_no_kvm(kvmmm_without_kvm: Command, tmp_path: Path):
    image = tmp_path / "bad.elf"
    image.write_bytes(b"\x7fELF" + bytes(4))
    assert kvmmm_without_kvm("run", str(image)).returncode == 65
    assert kvmmm_without_kvm("run", str(tmp_path / "none")).returncode == 66


def test_stdin_is_the_console_input(kvmmm: Command):
    data = b"one\ntwo\n\xff\x00end"
    assert kvmmm("run", "echo", input=data).stdout == data
    assert kvmmm("run", "echo", "--no-input", input=data).stdout == b""
    assert kvmmm("run", "echo").stdout == b""


def test_stats_and_json(kvmmm: Command, tmp_path: Path):
    path = tmp_path / "run.json"
    done = kvmmm("run", "touch", "--stats", "--json", str(path))
    assert done.returncode == 0
    text = done.stderr.decode()
    assert "it adds up" in text
    assert "EPT violations" in text
    record = json.loads(path.read_text())
    stats = record["stats"]
    assert record["outcome"] == "exited"
    assert record["exit_code"] == 0
    assert stats["adds_up"]
    assert stats["mmio_faults"] > 0
    assert stats["vma_lookups"] == stats["pma_insertions"] + stats["pma_hits"]
    assert stats["guest_ns"] > 0


@pytest.mark.npt
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_spinning_guest_and_says_where_it_was(kvmmm: Command, number: int):
    process = kvmmm.begin("run", "spin", "--timeout", "60s")
    with process:
        assert process.stdout.readline().startswith(b"spin:")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert last_line(stderr) == f"kvmmm: stopped by {by} (exit code 75)"
    # In the spin, or on a slow machine still on its way there.
    assert re.search(rb" at 0x[0-9a-f]+, ring [03]: [a-z]+", stderr), stderr.decode()
    assert b"Traceback" not in stderr


def test_ctrl_c_while_the_guest_waits_for_input(kvmmm: Command):
    process = kvmmm.begin("run", "echo", "--timeout", "60s", stdin=subprocess.PIPE)
    with process:
        process.stdin.write(b"x\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"x\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_SECONDS) == 75


def test_ctrl_c_while_nobody_reads(kvmmm: Command):
    args = ("mode=lines", "bytes=1048576", "line=64")
    process = kvmmm.begin("run", "bench_console", "--timeout", "60s", "--", *args)
    with process:
        # The pipe is full when it takes no more for a while.
        while not process.stdout.peek():
            pass
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_SECONDS) == 75


def test_a_closed_pipe_ends_the_run(kvmmm: Command):
    process = kvmmm.begin("run", "straddle", "--timeout", "60s")
    with process:
        assert process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 74
    assert last_line(stderr) == "kvmmm: nobody reads the guest's console any more (exit code 74)"


@pytest.mark.parametrize(("redirection", "code"), [("<&-", 0), (">&-", 74), ("2>&-", 0)])
def test_streams_that_the_shell_has_closed(redirection: str, code: int):
    command = f"{sys.executable} -m kvmmm run hello {redirection}"
    done = subprocess.run(command, shell=True, timeout=TIMEOUT_SECONDS, check=False)  # noqa: S602
    assert done.returncode == code


@pytest.mark.npt
@pytest.mark.parametrize("args", [("run", "hello"), ("doctor",)])
def test_without_kvm_it_says_what_to_type(kvmmm_without_kvm: Command, args: tuple[str, ...]):
    done = kvmmm_without_kvm(*args)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 69
    assert "/nonexistent/kvm is missing" in said
    assert "modprobe kvm_intel" in said
    assert "Traceback" not in said


def _group_of_kvm() -> int:
    status = Path("/dev/kvm").stat()
    if not status.st_mode & stat.S_IRGRP or not status.st_gid:
        pytest.skip("/dev/kvm has no group of its own")
    return status.st_gid


def _as_nobody(kvmmm: Command, groups: str, *args: str) -> subprocess.CompletedProcess[bytes]:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root, with setpriv, can become another user")
    kvmmm.prefix = [setpriv, "--reuid=65534", "--regid=65534", groups, *kvmmm.prefix]
    if kvmmm("--version").returncode != 0:
        pytest.skip("another user cannot read this environment")
    return kvmmm(*args)


def test_an_ordinary_user_with_access(kvmmm: Command):
    done = _as_nobody(kvmmm, f"--groups={_group_of_kvm()}", "run", "hello")
    assert done.returncode == 0, done.stderr


def test_an_ordinary_user_without_access(kvmmm: Command):
    if Path("/dev/kvm").stat().st_mode & stat.S_IROTH:
        pytest.skip("everybody may open /dev/kvm here")
    done = _as_nobody(kvmmm, "--clear-groups", "run", "hello")
    assert done.returncode == 77
    assert b"/dev/kvm is closed to you" in done.stderr
    assert b"usermod -aG kvm" in done.stderr
    doctor = kvmmm("doctor")
    assert doctor.returncode == 69
    assert b"usermod -aG kvm" in doctor.stdout
