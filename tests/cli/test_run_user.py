"""`kvmmm run` of programs for ring 3: how they are recognised, words, exit codes, reports."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

from kvmmm.vmm import bundled
from tests.vmm.elf_builder import PT_INTERP, Phdr, R, X
from tests.vmm.user_program import PROGRAM, Program

from .conftest import last_line

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Command

pytestmark = pytest.mark.kvm


@pytest.mark.npt
def test_a_bundled_program(kvmmm: Command):
    done = kvmmm("run", "user_hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"hello from ring 3")
    assert b"argv[0] user_hello\n  argv[1] one\n  argv[2] two=2\n" in done.stdout
    assert done.stderr == b"kvmmm: the guest exited with status 0\n"


def test_its_words_and_environment(kvmmm: Command):
    done = kvmmm("run", "user_hello", "--env", "A=1", "--env", "B=x=y", "--", "--a word", "")
    assert b"argv[1] --a word\n  argv[2] \n  environment A=1\n  environment B=x=y\n" in done.stdout


def test_a_file_that_says_what_it_is(kvmmm: Command, tmp_path: Path):
    path = tmp_path / "program"
    path.write_bytes(bundled.find("user_hello").path.read_bytes())
    done = kvmmm("run", str(path), "--", "x")
    assert f"argv[0] {path}\n  argv[1] x\n".encode() in done.stdout
    assert kvmmm("run", str(path), "--kernel").returncode in {65, 67, 68}


def test_a_file_that_does_not(kvmmm: Command, tmp_path: Path):
    path = tmp_path / "program"
    path.write_bytes(Program().print("hi").exit(7).elf())
    done = kvmmm("run", "--user", str(path))
    assert (done.returncode, done.stdout) == (7, b"hi")
    assert kvmmm("run", str(path)).returncode not in {7, 70}, "a kernel has no system calls"


def test_a_dynamic_program_is_rejected_with_the_remedy(kvmmm_without_kvm: Command, tmp_path: Path):
    path = tmp_path / "dynamic"
    text = Phdr(flags=R | X, vaddr=PROGRAM)
    path.write_bytes(
        Program().elf(
            phdrs=[text, Phdr(PT_INTERP, R, 0x1100, 0, filesz=12)],
            contents={0x1100: b"/lib64/ld.so"},
        )
    )
    done = kvmmm_without_kvm("run", str(path))
    assert done.returncode == 65
    assert b"asks for the interpreter /lib64/ld.so" in done.stderr
    assert b"-static-pie" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "end"),
    [
        (("user_fault",), 67, "guest fault (exit code 67)"),
        (("user_fault", "--", "kind=opcode"), 68, "guest exception (exit code 68)"),
        (("user_fault", "--", "kind=nothing"), 2, "the guest exited with status 2"),
        (
            ("user_mmap", "--memory", "4M", "--", "pages=4000"),
            72,
            "guest memory is exhausted (exit code 72)",
        ),
    ],
)
def test_exit_codes(kvmmm: Command, args: tuple[str, ...], code: int, end: str):
    done = kvmmm("run", *args)
    assert done.returncode == code, done.stderr
    assert last_line(done.stderr) == f"kvmmm: {end}"


def test_a_report(kvmmm: Command):
    report = kvmmm("run", "user_fault").stderr.decode()
    assert report.startswith("guest fault: write to 0x0, where nothing is mapped\n  where  at 0x4")
    assert "=> 0x4" in report
    assert "user_fault.elf" in report
    assert "a null pointer" in report


def test_deadline_and_interrupt(kvmmm: Command, tmp_path: Path):
    path = tmp_path / "spin"
    path.write_bytes(Program().print("spins").fork(Program().spin()).spin().elf())
    done = kvmmm("run", "--user", str(path), "--timeout", "300ms")
    assert done.returncode == 73
    assert b"jmp" in done.stderr
    with kvmmm.begin("run", "--user", str(path)) as running:
        assert running.stdout is not None
        assert running.stdout.read(5) == b"spins"
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 75
    assert b"ring 3" in stderr


@pytest.mark.parametrize(
    "args",
    [
        ("user_hello", "--arena", "64M"),
        ("user_hello", "--base", "0x400000"),
        ("user_hello", "--rwx"),
        ("hello", "--env", "A=B"),
        ("user_hello", "--env", "nothing"),
        ("user_hello", "--env", "=x"),
    ],
)
def test_options_that_do_not_go_with_it(kvmmm_without_kvm: Command, args: tuple[str, ...]):
    done = kvmmm_without_kvm("run", *args)
    assert done.returncode == 64, done.stderr
    assert b"--" in done.stderr


def test_statistics_and_json(kvmmm: Command, tmp_path: Path):
    done = kvmmm("run", "user_fork", "--stats", "--json", str(tmp_path / "out"), "--", "pages=20")
    assert done.returncode == 0, done.stderr
    assert b"it adds up" in done.stderr
    assert b"system calls" in done.stderr
    record = json.loads((tmp_path / "out").read_text())
    assert record["args"] == ["pages=20"]
    assert record["stats"]["adds_up"] is True
    assert record["stats"]["syscalls"] > 50
    assert record["stats"]["page_faults"] > 20


def test_they_are_listed(kvmmm: Command):
    listed = kvmmm("guests").stdout.decode()
    assert "user_fork" in listed
    assert "programs for ring 3" in listed


def test_help_says_how_they_are_recognised(kvmmm: Command):
    text = kvmmm("run", "--help").stdout.decode()
    assert "--user / --kernel" in text
    assert "NT_GNU_ABI_TAG" in text
    assert "ENOSYS" in text
