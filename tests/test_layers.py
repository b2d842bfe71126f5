"""The house rules that a machine can check: who imports whom, and how long a file may be."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 400
SOURCES = ("kvmmm", "guest", "tests", "tools")
SUFFIXES = {".py", ".pyi", ".c", ".h", ".S", ".ld"}


@pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed"
)
def test_imports_go_down():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_no_file_is_too_long():
    too_long = {}
    for top in SOURCES:
        for path in sorted((ROOT / top).rglob("*")):
            # One compiled module has one typed face.
            if path.name == "_core.pyi":
                continue
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                n_lines = len(path.read_text(encoding="utf-8").splitlines())
                if n_lines > LONGEST:
                    too_long[str(path.relative_to(ROOT))] = n_lines
    assert not too_long
