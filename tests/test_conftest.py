"""The switch KVMMM_TEST_KVM, seen from outside: pytest runs that use this suite's conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
NO_KVM = """
from kvmmm.errors import KvmUnavailableError
from kvmmm.platform.kvm import device

def refuse(path):
    raise KvmUnavailableError(2, f"{path} is missing", "do without")

device._open = refuse
"""
TESTS = """
import pytest

@pytest.mark.kvm
def test_kvm():
    pass

def test_plain():
    pass
"""


def run(folder: Path, mode: str | None, *, has_kvm: bool = False) -> tuple[int, str]:
    prelude = "" if has_kvm else NO_KVM
    (folder / "conftest.py").write_text(CONFTEST + prelude, encoding="utf-8")
    (folder / "test_inner.py").write_text(TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    kvm: x\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in {"KVMMM_TEST_KVM", "CI"}}
    if mode is not None:
        environment["KVMMM_TEST_KVM"] = mode
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "test_inner.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("mode", [None, "auto"])
def test_auto_skips_and_says_why(tmp_path: Path, mode: str | None):
    status, output = run(tmp_path, mode)
    assert status == 0, output
    assert "1 passed, 1 skipped" in output
    assert "/dev/kvm is missing" in output


def test_require_turns_a_missing_kvm_into_a_failure(tmp_path: Path):
    status, output = run(tmp_path, "require")
    assert status == 1, output
    assert "KVMMM_TEST_KVM=require, but /dev/kvm is missing" in output
    assert "1 passed" in output
    assert "skipped" not in output.splitlines()[-1]


@pytest.mark.kvm
def test_require_runs_where_kvm_opens(tmp_path: Path):
    status, output = run(tmp_path, "require", has_kvm=True)
    assert status == 0, output
    assert "2 passed" in output


def test_never_skips_though_kvm_may_open(tmp_path: Path):
    status, output = run(tmp_path, "never", has_kvm=True)
    assert status == 0, output
    assert "1 passed, 1 skipped" in output
    assert "KVMMM_TEST_KVM=never" in output


def test_another_value_is_refused(tmp_path: Path):
    status, output = run(tmp_path, "sometimes")
    assert status != 0
    assert "KVMMM_TEST_KVM=sometimes: it is auto, require or never" in output
